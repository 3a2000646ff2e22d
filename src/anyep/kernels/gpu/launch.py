"""How kernels come onto a device: launched on its current stream, only compiled, or whatever else a launch may be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import triton

from anyep.errors import Unavailable
from anyep.kernels.gpu.target import Target
from anyep.kernels.tapes import Play, placed, split
from anyep.machine.compiler import compiling

if TYPE_CHECKING:
    from anyep.kernels.gpu.driver import Driver, Launched

Constants = dict[str, int]


class Launch(Protocol):
    """What a kernel set does with a kernel. A grid of nothing is never handed over."""

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], constants: Constants, threads: int
    ) -> object: ...


class Noted(NamedTuple):
    """The arguments of a launch."""

    kernel: Any
    grid: tuple[int, ...]
    numbers: tuple[int, ...]
    constants: Constants
    threads: int


def options_of(kernel: Any, target: Target, threads: int) -> dict[str, int | bool]:
    """Return the compiler's options: products are rounded before they are added, as the oracle does."""
    options: dict[str, int | bool] = {"num_warps": threads // target.warp_size, "enable_fp_fusion": False}
    if kernel.registers_on is not None and target.name.startswith(kernel.registers_on[0]):
        options["maxnreg"] = kernel.registers_on[1]
    return options


class OnStream:
    """Launch on the stream that is torch's current one for the device: whoever wants another one enters it before.

    Triton's own call looks at every number and option again before it launches, which takes longer than most of these
    kernels run. What it compiled is therefore kept here, by what decides over it, and launched as it is.
    """

    def __init__(self, device: torch.device, target: Target) -> None:
        self._device = device
        self._target = target
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[int, ...]]] = {}

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], constants: Constants, threads: int
    ) -> None:
        compiled, last = self.prepare(kernel, grid, numbers, constants, threads)
        if torch.cuda.current_device() == self._device.index:
            compiled[(*grid, 1, 1)[:3]](*numbers, *last)
        else:
            with torch.cuda.device(self._device):
                compiled[(*grid, 1, 1)[:3]](*numbers, *last)

    def tape(self, launches: Sequence[Noted]) -> Play:
        """Make all ready to be launched at once, on a stream that is named then; numbers are counted from bases."""
        if torch.version.hip is None:
            return self._driver.tape([self._lowered(one) for one in launches])
        runs = [(*self.prepare(*one), (*one.grid, 1, 1)[:3], [split(n) for n in one.numbers]) for one in launches]

        def play(bases: Sequence[int], stream: int) -> None:
            with torch.cuda.device(self._device):
                for compiled, last, grid, numbers in runs:
                    compiled[grid](*(placed(number, bases) for number in numbers), *last, stream=stream)

        return play

    @cached_property
    def _driver(self) -> Driver:
        with compiling():
            from anyep.kernels.gpu.driver import Driver
        assert self._device.index is not None, "kernels are loaded for one device"
        return Driver(self._device.index)

    def _lowered(self, one: Noted) -> Launched:
        """Return a launch as the driver takes it. Triton's own parameters come last, and are 0."""
        from anyep.kernels.gpu.driver import Launched, hidden_parameters

        compiled, _ = self.prepare(*one)
        made = compiled.metadata
        assert (made.num_ctas, made.launch_cooperative_grid, made.global_scratch_size) == (1, False, 0), "plain kernels"
        hidden = hidden_parameters(compiled.asm["ptx"], len(one.numbers))
        x, y, z = (*one.grid, 1, 1)[:3]
        return Launched(
            function=compiled.function,
            grid=(x, y, z),
            threads=one.threads,
            shared_bytes=made.shared,
            numbers=(*(split(number) for number in one.numbers), *[(0, 0)] * hidden),
        )

    def prepare(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], constants: Constants, threads: int
    ) -> tuple[Any, tuple[int, ...]]:
        """Compile, or load from Triton's cache, and bring onto the device; launch nothing.

        Loading in the middle of exchanges would wait for what runs on the device, and a graph cannot hold it: then, and
        with Triton's reason, Unavailable.
        """
        form = (kernel, threads, *constants.items())
        found = self._compiled.get(form)
        if found is not None:
            return found
        if torch.cuda.is_current_stream_capturing():
            raise Unavailable(
                f"a graph is being captured, and kernel {kernel.__name__} is not on the device yet: make this call "
                "once outside of it before"
            )
        try:
            with torch.cuda.device(self._device):
                compiled = kernel.warmup(*numbers, grid=grid, **constants, **options_of(kernel, self._target, threads))
                compiled[(1, 1, 1)]  # finds out, too, whether the device has the registers and the memory for it
        except Exception as error:
            raise Unavailable(
                f"Triton {triton.__version__} could not bring kernel {kernel.__name__} onto {self._target.name}: "
                f"{type(error).__name__}: {error}. It needs a C compiler and Python's headers beside the GPU's driver"
            ) from error
        found = compiled, tuple(constants[name] for name in kernel.arg_names if name in constants)
        self._compiled[form] = found
        return found


class InInterpreter:
    """Run the programs of the grid one by one in Python; needs TRITON_INTERPRET=1 from before Triton was imported."""

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], constants: Constants, threads: int
    ) -> None:
        kernel[grid](*numbers, **constants)
