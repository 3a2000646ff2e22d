"""The yardstick: how fast all ranks together copy memory past the caches, measured between the other operations."""

from __future__ import annotations

import torch

from anyep.kernels.registry import load

COPY = "copy"
COPY_BYTES = 32 << 20
"""By each rank and round: far larger than the caches, a fraction of a prefill batch."""


class CopyProbe:
    """One rank's share of a copy that all ranks make at once, by the kernel that moves rows."""

    def __init__(self) -> None:
        self._kernels = load("cpu")
        self._source = torch.ones(COPY_BYTES, dtype=torch.uint8)
        self._target = torch.zeros(COPY_BYTES, dtype=torch.uint8)

    def run(self) -> None:
        self._kernels.copy(self._source.data_ptr(), self._target.data_ptr(), COPY_BYTES)
        self._kernels.fence()
