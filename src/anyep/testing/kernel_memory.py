"""Where a kernel set finds the memory of an exam: on another device, the bytes are carried there and back."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 4096
"""Addresses there lie like addresses here up to this: no array is aligned better than the exam meant."""


class ExamMemory(Protocol):
    """One piece of memory that the kernels under examination can reach."""

    def place(self, num_bytes: int, *, like: int) -> int:
        """Return the address of ``num_bytes``, equal to ``like`` modulo 4096; valid until the next call."""
        ...

    def write(self, content: NDArray[np.uint8]) -> None:
        """Fill the piece before a call."""
        ...

    def read(self) -> NDArray[np.uint8]:
        """Wait until the call is done and return what the piece holds."""
        ...


class DeviceMemory:
    """Memory of a torch device, filled and read through torch's current stream, on which the kernels launch too."""

    def __init__(self, device: torch.device | str) -> None:
        self._pool = torch.empty(0, dtype=torch.uint8, device=device)
        self._piece = self._pool

    def place(self, num_bytes: int, *, like: int) -> int:
        if self._pool.numel() < num_bytes + _ALIGNMENT:
            self._pool = torch.empty(num_bytes + _ALIGNMENT, dtype=torch.uint8, device=self._pool.device)
        first = (like - self._pool.data_ptr()) % _ALIGNMENT
        self._piece = self._pool[first : first + num_bytes]
        return self._piece.data_ptr()

    def write(self, content: NDArray[np.uint8]) -> None:
        self._piece.copy_(torch.from_numpy(content))

    def read(self) -> NDArray[np.uint8]:
        held: NDArray[np.uint8] = self._piece.cpu().numpy()
        return held
