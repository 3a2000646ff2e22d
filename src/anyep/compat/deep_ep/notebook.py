"""Memory for what a dispatch notes of its rows: pieces of blocks, as an array for each costs 5 us from cold caches."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from anyep.machine.addresses import address_of

Bytes = NDArray[np.uint8]
_BLOCK_BYTES = 64 << 10
"""Kept as long as any piece of it is: 90 decode batches of 700 rows, or 8 of 8192."""


class Notebook:
    """Hands out pieces of memory that nobody gives back: a block goes with the last array on it."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._begin(_BLOCK_BYTES)

    def _begin(self, num_bytes: int) -> None:
        self._block: Bytes = np.empty(num_bytes, np.uint8)
        self._next = address_of(self._block)
        self._left = num_bytes

    def piece(self, num_bytes: int) -> tuple[Bytes, int]:
        """Return a block, and the address in it from which so many bytes are the caller's, as long as it keeps it."""
        with self._turn:
            if num_bytes > self._left:
                self._begin(max(num_bytes, _BLOCK_BYTES))
            address = self._next
            self._next += num_bytes
            self._left -= num_bytes
            return self._block, address


def bytes_at(block: Bytes, address: int, num_bytes: int) -> Bytes:
    """Return a piece; a view."""
    first = address - address_of(block)
    return block[first : first + num_bytes]
