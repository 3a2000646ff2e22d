"""How kernels come onto a device: launched on its current stream, only compiled, or whatever else a launch may be."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from anyep.kernels.gpu.target import Target

Constants = dict[str, int]


class Launch(Protocol):
    """What a kernel set does with a kernel. A grid of nothing is never handed over."""

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], constants: Constants, threads: int
    ) -> None: ...


def options_of(target: Target, threads: int) -> dict[str, int | bool]:
    """Return the compiler's options: products are rounded before they are added, as the oracle does."""
    return {"num_warps": threads // target.warp_size, "enable_fp_fusion": False}


class OnStream:
    """Launch on the stream that is torch's current one for the device: whoever wants another one enters it before."""

    def __init__(self, device: torch.device, target: Target) -> None:
        self._device = device
        self._target = target

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], constants: Constants, threads: int
    ) -> None:
        with torch.cuda.device(self._device):
            kernel[grid](*numbers, **constants, **options_of(self._target, threads))


class CompileOnly:
    """Compile for the device, or load from Triton's cache, and launch nothing."""

    def __init__(self, device: torch.device, target: Target) -> None:
        self._device = device
        self._target = target

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], constants: Constants, threads: int
    ) -> None:
        with torch.cuda.device(self._device):
            kernel.warmup(*numbers, grid=grid, **constants, **options_of(self._target, threads))


class InInterpreter:
    """Run the programs of the grid one by one in Python; needs TRITON_INTERPRET=1 from before Triton was imported."""

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], constants: Constants, threads: int
    ) -> None:
        kernel[grid](*numbers, **constants)
