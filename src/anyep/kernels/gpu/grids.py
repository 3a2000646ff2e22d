"""From the calls of a set to grids: what all of a device's launches have in common."""

from __future__ import annotations

import torch

from anyep.kernels.gpu.launch import Launch
from anyep.kernels.gpu.target import PROGRAMS_A_UNIT, Target

PIECE = 2048
"""Bytes of a row that a program moves: 16 for each of its 128 threads."""
NUM_THREADS = 128
SMALL = 64
"""Threads of a program that moves little; every target can launch as few."""
NUMBER_BLOCK = 1024
"""Numbers that a program looks at, one by one."""


def power_of_two(n: int, least: int) -> int:
    """Return the least power of two that is at least ``n`` and ``least``, so that few numbers make few kernels."""
    return max(least, 1 << max(0, n - 1).bit_length())


def parts(n: int, size: int) -> int:
    """Return how many parts of ``size`` hold ``n``; Triton's own function takes microseconds."""
    return -(-n // size)


class Launches:
    """One device, and how kernels come onto it.

    ``num_sms``: on how many multiprocessors a kernel that moves rows may be at a time; None: on all of them, with a
    program a token.
    """

    def __init__(self, device: torch.device, target: Target, launch: Launch, num_sms: int | None = None) -> None:
        self.device = device
        self.target = target
        self._launch_one = launch
        self._num_sms = num_sms
        self._most = None if num_sms is None else num_sms * PROGRAMS_A_UNIT

    def _launch(
        self,
        kernel: object,
        grid: tuple[int, ...],
        *numbers: int,
        threads: int = NUM_THREADS,
        **constants: int,
    ) -> None:
        if 0 not in grid:
            self._launch_one(kernel, grid, numbers, constants, threads)

    @property
    def _is_bounded(self) -> bool:
        return self._most is not None

    def _step(self, num_tokens: int, pieces: int) -> int:
        """Return how many programs share the tokens of each piece."""
        return num_tokens if self._most is None else min(num_tokens, max(1, self._most // pieces))

    def _share(self, num_stretches: int) -> int:
        """Return how many programs share a stretch whose length only the device knows."""
        return max(1, (self._most or self.target.programs) // max(1, num_stretches))
