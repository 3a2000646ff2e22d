"""What a tensor is to a collective: bytes at an address, and a few words that say which shape and dtype they have."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from anyep.exchange.arguments import shape_text
from anyep.transport.base import Block, Words

MOST_DIMENSIONS = 14
DESCRIPTION_WORDS = 2 + MOST_DIMENSIONS
"""A dtype's number, how many dimensions, their sizes."""

_DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""In the order of their numbers, which every rank has to agree on."""


def describe(shape: Sequence[int], dtype: torch.dtype) -> Words:
    """Return int64 [DESCRIPTION_WORDS].

    >>> describe((3, 2), torch.float32)[:4].tolist()
    [8, 2, 3, 2]
    """
    words = np.zeros(DESCRIPTION_WORDS, np.int64)
    words[:2] = _DTYPES.index(dtype), len(shape)
    words[2 : 2 + len(shape)] = shape
    return words


def read_description(words: Words) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape and dtype that :func:`describe` wrote down.

    >>> read_description(describe((3, 2), torch.float32))
    ((3, 2), torch.float32)
    """
    number, dimensions, *sizes = words.tolist()
    return tuple(sizes[:dimensions]), _DTYPES[number]


def bytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return how many bytes a dense tensor takes."""
    return prod(shape) * dtype.itemsize


def dense(name: str, value: object) -> torch.Tensor:
    """Return a row-major CPU tensor with the values of ``value``: itself, or a copy where it has strides.

    Raises TypeError for what is no tensor, or has no bytes of a known dtype; ValueError for another device or more
    than 14 dimensions.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.device.type != "cpu":
        raise ValueError(f"{name} is on {value.device}; collectives work on cpu tensors: pass {name}.cpu()")
    if value.dtype not in _DTYPES or value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor of plain numbers, got {value.layout}, {value.dtype}")
    if value.dim() > MOST_DIMENSIONS:
        raise ValueError(f"{name} may have {MOST_DIMENSIONS} dimensions, got {value.dim()}: reshape it")
    plain = value.detach().resolve_conj().resolve_neg().contiguous()
    if plain.data_ptr() == 0 and plain.numel() > 0:
        raise TypeError(f"{name} must have memory of its own, got {type(value).__name__}")
    return plain


def check_out(out: object, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return ``out`` if results of this shape and dtype can be written there; TypeError or ValueError otherwise."""
    if not isinstance(out, torch.Tensor) or out.dtype != dtype:
        found = out.dtype if isinstance(out, torch.Tensor) else type(out).__name__
        raise TypeError(f"out must be a tensor of {dtype}, got {found}")
    if out.device.type != "cpu" or tuple(out.shape) != tuple(shape) or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous cpu tensor {shape_text(shape)}, got {shape_text(out.shape)} with strides "
            f"{out.stride()} on {out.device}"
        )
    return out.detach()


def view_on(block: Block, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor on the bytes of a block from ``offset`` on; it keeps the block."""
    num_bytes = bytes_of(shape, dtype)
    if num_bytes == 0:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    flat = torch.frombuffer(block.memory, dtype=torch.uint8, count=num_bytes, offset=offset)
    return flat.view(dtype).view(tuple(shape))
