"""GPU kernels without a GPU: Triton's interpreter, with conversions that round as devices do. For tests only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from anyep.errors import Unavailable
from anyep.kernels.spec import KernelSet

_FEW_PROGRAMS = 3


def interpreted_kernels(*, native_fp8: bool = True) -> KernelSet:
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
    return GpuKernels(torch.device("cpu"), target, InInterpreter())


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


class _Outermost:
    """The language as the interpreter changes it for a kernel, until the kernel returns."""

    current: _Outermost | None = None

    def __init__(self, scope: Any) -> None:
        self._scope = scope
        _Outermost.current = self

    def restore(self) -> None:
        _Outermost.current = None
        self._scope.restore()


def _patch_once() -> None:
    """Let the interpreter change the language once a kernel, not once a call in it: 4 times as fast.

    Triton 3.6 reads a number out of an array in a way that NumPy 2.4 refuses; that is mended with it.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    if getattr(patch, "is_ours", False):
        return
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_outermost(_function: Any) -> _Kept | _Outermost:
        if _Outermost.current is not None:
            return _Kept()
        scope = patch(everything)
        scope.set_attr(tl.tensor, "__index__", lambda number: int(number.handle.data.item()))
        return _Outermost(scope)

    patch_outermost.is_ours = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_outermost
