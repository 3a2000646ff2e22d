"""Checks of what a caller passes, before a word is exchanged: a refused call costs the other ranks nothing."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

import torch

CPU = torch.device("cpu")
_Tensor, _STRIDED = torch.Tensor, torch.strided


def shape_text(shape: Sequence[object]) -> str:
    """Write a shape as ``[4096, 7168]``."""
    return "[" + ", ".join(str(n) for n in shape) + "]"


def dtype_text(*dtypes: torch.dtype) -> str:
    """Write dtypes without their module, joined by "or"."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    name: str,
    value: object,
    *,
    dtypes: Collection[torch.dtype],
    shape: tuple[int | None, ...],
    legend: str,
    device: torch.device = CPU,
) -> torch.Tensor:
    """Return ``value`` if it is a dense tensor on ``device``, of one of ``dtypes`` and of ``shape`` (None: any size).

    ``legend`` names the expected shape for the message, for example ``"[T, hidden]"``. Raises TypeError for another
    type or dtype, ValueError for another shape, device or memory order.
    """
    if (  # each line costs every tensor of every call
        type(value) is _Tensor
        and value.dtype in dtypes
        and value.shape == shape
        and value.is_contiguous()
        and (value.is_cpu if device is CPU else value.device == device)
        and value.layout is _STRIDED
        and (value.data_ptr() or not value.numel())
    ):
        return value
    _refuse(name, value, dtypes=dtypes, shape=shape, legend=legend, device=device)
    return value  # type: ignore[return-value]  # a subclass that is as good


def _fits(found: torch.Size, wanted: Sequence[int | None]) -> bool:
    return len(found) == len(wanted) and all(n is None or n == m for n, m in zip(wanted, found, strict=True))


def _refuse(
    name: str,
    value: object,
    *,
    dtypes: Collection[torch.dtype],
    shape: Sequence[int | None],
    legend: str,
    device: torch.device,
) -> None:
    """Say what is wrong with a tensor; nothing may be, where it is of a subclass."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {legend}, got {type(value).__name__}")
    if value.device != device:
        way = ".cpu()" if device.type == "cpu" else f".to({str(device)!r})"
        raise ValueError(f"{name} is on {value.device}; this buffer works on {device} tensors: pass {name}{way}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {dtype_text(*dtypes)}, got {dtype_text(value.dtype)}")
    if not _fits(value.shape, shape):
        expected = shape_text(["any" if n is None else n for n in shape])
        raise ValueError(f"{name} must have shape {legend} = {expected}, got {shape_text(value.shape)}")
    if value.layout is not torch.strided or not _has_memory(value):
        raise TypeError(
            f"{name} must be a dense tensor with memory of its own, got {type(value).__name__}, {value.layout}"
        )
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {value.stride()}: pass {name}.contiguous()")


def _has_memory(value: torch.Tensor) -> bool:
    """Return whether kernels can read the tensor: fake, functional and vmapped ones have no address."""
    try:
        if type(value) is torch.Tensor:
            return value.data_ptr() != 0 or value.numel() == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a fake tensor's address is 0, after a warning
            return value.data_ptr() != 0 or value.numel() == 0
    except (RuntimeError, UserWarning):
        return False


def check_integer(name: str, value: object, *, at_least: int, at_most: int | None = None) -> int:
    """Return ``value`` if it is an integer in the range; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < at_least or (at_most is not None and value > at_most):
        upper = "" if at_most is None else f" and at most {at_most}"
        raise ValueError(f"{name} must be at least {at_least}{upper}, got {value}")
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``; ValueError with the list otherwise."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)
