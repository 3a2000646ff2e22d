"""The set itself: one object a device. Importing this module needs Triton, so import it through the registry."""

from __future__ import annotations

from typing import Any

from anyep.kernels.gpu import flags
from anyep.kernels.gpu.launch import Constants, Noted, OnStream
from anyep.kernels.gpu.number_launches import NumberLaunches
from anyep.kernels.gpu.send_launches import SendLaunches
from anyep.kernels.gpu.settle_launches import SettleLaunches
from anyep.kernels.tapes import Act, Play

_ONE_WARP = 64
"""Threads of the smallest program that every target can launch."""


class GpuKernels(NumberLaunches, SettleLaunches, SendLaunches):
    """A :class:`~anyep.kernels.spec_device.DeviceKernels`; addresses are device addresses, tables lie there too.

    Calls launch and return; ``route`` and ``gather`` wait for their verdicts, ``begin_route``, ``begin_gather`` do not.
    They launch on the stream that is torch's current one for the device, in the order of the calls.
    """

    name = "gpu"

    def tape(self, act: Act) -> Play:
        """Record what ``act`` launches (kernels/tapes.py). Of kernels that are launched on a device."""
        assert isinstance(self._launch_one, OnStream), "only what comes onto a device is played there"
        noted: list[Noted] = []

        def note(
            kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], constants: Constants, threads: int
        ) -> None:
            noted.append(Noted(kernel, grid, numbers, constants, threads))

        act(GpuKernels(self.device, self.target, note, self._num_sms))
        return self._launch_one.tape(noted)

    def tick(self, clock_addr: int, epoch_addr: int) -> None:
        self._launch(flags.tick, (1,), clock_addr, epoch_addr, threads=_ONE_WARP)

    def signal(self, peer_word_addr: int, num_ranks: int, epoch_addr: int, counts_addr: int) -> None:
        self._launch(flags.signal, (num_ranks,), peer_word_addr, epoch_addr, counts_addr, threads=_ONE_WARP)

    def wait(
        self,
        words_addr: int,
        num_ranks: int,
        epoch_addr: int,
        limit: int,
        counts_addr: int,
        errors_addr: int,
        error_bytes: int,
    ) -> None:
        numbers = (words_addr, epoch_addr, limit, counts_addr, errors_addr, error_bytes)
        self._launch(flags.wait, (num_ranks,), *numbers, threads=_ONE_WARP)

    def meet(
        self,
        peer_word_addr: int,
        words_addr: int,
        num_ranks: int,
        epoch_addr: int,
        limit: int,
        errors_addr: int,
        error_bytes: int,
    ) -> None:
        numbers = (peer_word_addr, words_addr, epoch_addr, limit, errors_addr, error_bytes)
        self._launch(flags.meet, (num_ranks,), *numbers, threads=_ONE_WARP)
