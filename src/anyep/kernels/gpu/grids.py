"""From the calls of a set to grids: what all of a device's launches have in common."""

from __future__ import annotations

import torch
import triton

from anyep.kernels.gpu.launch import Launch
from anyep.kernels.gpu.target import Target

PIECE = 2048
"""Bytes of a row that a program moves: 16 for each of its 128 threads."""
NUM_THREADS = 128
SMALL = 64
"""Threads of a program that moves little; every target can launch as few."""
NUMBER_BLOCK = 1024
"""Numbers that a program looks at, one by one."""


def power_of_two(n: int, least: int) -> int:
    """Return the least power of two that is at least ``n`` and ``least``, so that few numbers make few kernels."""
    return max(least, int(triton.next_power_of_2(n)))


class Launches:
    """One device, and how kernels come onto it."""

    def __init__(self, device: torch.device, target: Target, launch: Launch) -> None:
        self.device = device
        self.target = target
        self._launch_one = launch

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

    def _share(self, num_stretches: int) -> int:
        """Return how many programs share a stretch whose length only the device knows."""
        return max(1, self.target.programs // max(1, num_stretches))
