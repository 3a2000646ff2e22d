"""The two ways in which DeepEP refuses a call, so that callers who catch them keep working.

What its Python asserts is an AssertionError here too, what its C++ host code asserts a RuntimeError. The texts are
ours: they say what was expected and what came.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from anyep.errors import Unavailable


def host_assert(condition: bool, text: str) -> None:
    """Raise RuntimeError, as upstream's host checks do. Where every call passes and its text costs: :func:`refuse`."""
    if not condition:
        refuse(text)


def refuse(text: str) -> NoReturn:
    """Raise the RuntimeError of a host check."""
    raise RuntimeError(f"Assertion exception: {text}")


def check_count(name: str, value: Any, least: int) -> None:
    """TypeError for what is no whole number (as upstream's binding), RuntimeError for less than ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    host_assert(number >= least, f"{name} must be at least {least}, got {number}")


is_deterministic: Callable[[], bool] = torch._C._get_deterministic_algorithms
"""What torch.are_deterministic_algorithms_enabled calls: every call asks, and from cold caches that one takes 4 us."""


def check_torch_deterministic() -> None:
    """AssertionError where torch would overwrite freshly allocated tensors with NaN (as upstream, on every call)."""
    fills: bool = getattr(torch.utils.deterministic, "fill_uninitialized_memory")  # noqa: B009  # not in torch's types
    assert not (fills and is_deterministic()), (
        "torch's deterministic algorithms fill uninitialised memory; "
        "set torch.utils.deterministic.fill_uninitialized_memory = False"
    )


def check_device(name: str, value: object) -> None:
    """Raise Unavailable for a tensor of a device that nothing here exchanges."""
    if isinstance(value, torch.Tensor) and not (value.is_cpu or value.is_cuda):
        raise Unavailable(f"{name} is on {value.device}, and CPU and CUDA tensors are exchanged: pass {name}.cpu()")


def check_dense(
    name: str, value: object, dtype: torch.dtype | None, shape: Sequence[int | None], legend: str
) -> torch.Tensor:
    """Return ``value`` if it is a contiguous tensor of ``dtype`` and ``shape`` (None: any), else RuntimeError.

    On the CPU or a GPU: that it lies where its buffer works is said by the native call.
    """
    if (
        isinstance(value, torch.Tensor)
        and (value.is_cpu or value.is_cuda)
        and (dtype is None or value.dtype == dtype)
        and _fits(value.shape, shape)
        and value.is_contiguous()
        and not value.is_quantized
    ):
        return value
    return _explain(name, value, dtype, shape, legend)


def _fits(found: torch.Size, wanted: Sequence[int | None]) -> bool:
    if len(found) != len(wanted):
        return False
    same = True
    for n, m in zip(wanted, found, strict=True):  # a loop: a generator costs every tensor of every call a microsecond
        same = same and (n is None or n == m)
    return same


def _explain(name: str, value: object, dtype: torch.dtype | None, shape: Sequence[int | None], legend: str) -> NoReturn:
    """Say what is wrong with a tensor."""
    check_device(name, value)
    if not isinstance(value, torch.Tensor):
        refuse(f"{name} must be a tensor {legend}, got {type(value).__name__}")
    if dtype is not None and value.dtype != dtype:
        refuse(f"{name} must be {dtype}, got {value.dtype}")
    if not _fits(value.shape, shape):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        refuse(f"{name} must be {legend} = [{wanted}], got {list(value.shape)}")
    if value.is_quantized:
        refuse(f"{name} must be plain numbers, got torch's {value.dtype}: pass {name}.int_repr()")
    refuse(f"{name} must be contiguous, got strides {value.stride()}")


def check_streams(previous_event: object, async_finish: bool, allocate_on_comm_stream: bool) -> None:
    """RuntimeError where memory would be taken on another stream without anything to order it by (as upstream)."""
    host_assert(
        not allocate_on_comm_stream or (previous_event is not None and async_finish),
        "allocate_on_comm_stream=True needs previous_event and async_finish=True",
    )
