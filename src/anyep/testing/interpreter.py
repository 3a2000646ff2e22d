"""GPU kernels without a GPU: Triton's interpreter, with conversions that round as devices do. For tests only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from anyep.errors import Unavailable
from anyep.kernels.spec_device import DeviceKernels

_FEW_PROGRAMS = 3


def interpreted_kernels(*, native_fp8: bool = True, num_sms: int | None = None) -> DeviceKernels:
    """Return the GPU kernel set on host memory; needs a process that was started with TRITON_INTERPRET=1.

    ``native_fp8`` chooses between the two ways to FP8 that kernels have. Raises Unavailable in any other process:
    Triton decides when it is imported whether it compiles or interprets.
    """
    import triton

    if not triton.knobs.runtime.interpret:
        raise Unavailable("this process compiles Triton kernels; to interpret them, start one with TRITON_INTERPRET=1")
    from anyep.kernels.gpu.kernels import GpuKernels
    from anyep.kernels.gpu.launch import InInterpreter
    from anyep.kernels.gpu.target import Fp8, Target

    _mend_conversions()
    _patch_once()
    fp8 = Fp8.NATIVE if native_fp8 else Fp8.ARITHMETIC
    target = Target(name="interpreter", warp_size=32, fp8=fp8, programs=_FEW_PROGRAMS)
    return GpuKernels(torch.device("cpu"), target, InInterpreter(), num_sms)


def _mend_conversions() -> None:
    """Let floats become other floats by torch's casts: nearest even, FP8 saturating and NaN kept.

    Triton's own interpreter cuts bits off on the way to BF16 and loses the carry into the exponent on the way to FP8.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    dtypes = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
    }

    def convert(numbers: Any, source: Any, target: Any, _rounding: Any) -> Any:
        bits = torch.from_numpy(numbers.copy())
        x = bits.view(dtypes[source]).to(torch.float32)
        if target is tl.float8e4nv:
            codes = x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
            return torch.where(torch.isnan(x), 0x7F, codes).to(torch.uint8).numpy()
        result = x.to(dtypes[target])
        return (result.view(torch.int16).numpy().view("uint16") if result.itemsize == 2 else result.numpy()).copy()

    interpreter._convert_float = convert


class _Kept:
    """What an inner function of a kernel undoes when it returns: nothing."""

    def restore(self) -> None:
        pass


class _Language:
    """Triton's language as the interpreter changes it: once a kernel, not once a call in it, which is 4 times as fast.

    Triton 3.6 reads a number out of an array in a way that NumPy 2.4 refuses; that is mended with it.
    """

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self._patch = patch
        self._depth = 0

    def __call__(self, _function: object) -> Any:
        """Stand in for the interpreter's own function, which is called before each call of a kernel's functions."""
        if self._depth:
            return _Kept()
        self.hold()
        return SimpleNamespace(restore=self.let_go)

    def hold(self) -> None:
        import triton.language as tl

        self._depth += 1
        if self._depth == 1:
            self._scope = self._patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            self._scope.set_attr(tl.tensor, "__index__", lambda number: int(number.handle.data.item()))

    def let_go(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._scope.restore()


def _patch_once() -> _Language:
    from triton.runtime import interpreter

    if not isinstance(interpreter._patch_lang, _Language):
        interpreter._patch_lang = _Language(interpreter._patch_lang)
    language: _Language = interpreter._patch_lang
    return language


@contextmanager
def language_kept() -> Iterator[None]:
    """Keep the interpreter's changes of the language while kernels of several ranks run in turns."""
    language = _patch_once()
    language.hold()
    try:
        yield
    finally:
        language.let_go()
