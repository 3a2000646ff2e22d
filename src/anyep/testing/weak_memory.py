"""Memory that promises no more than a device does: what a rank may see of what others wrote.

Each rank has a buffer of stores that others do not see yet, and a view of memory as it was when it last acquired. A
buffered byte may become visible at any step, in any order; a *release* makes all of them visible first. A load gives
what memory holds now or what the view holds, byte sequences at a time; an *acquire* renews the view. What a rank
wrote, and what it has once read, it does not forget: each place by itself never goes back in time.
"""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class WeakMemory:
    """The views of several ranks of one array of bytes; everything outside the array is ordinary memory."""

    def __init__(self, memory: Bytes, num_ranks: int, chance: random.Random) -> None:
        self._memory = memory
        self._base = int(memory.ctypes.data)
        self._chance = chance
        self._pending: list[dict[int, int]] = [{} for _ in range(num_ranks)]
        self._views = [memory.copy() for _ in range(num_ranks)]

    def holds(self, addresses: NDArray[np.uint64]) -> bool:
        """Say whether addresses lie in this memory; all of one access do, or none."""
        first = int(addresses.flat[0]) - self._base if addresses.size else -1
        return 0 <= first < self._memory.size

    def store(self, rank: int, addresses: NDArray[np.uint64], values: NDArray[np.generic]) -> None:
        """Write elements for ``rank`` alone."""
        for offset, content in self._elements(addresses, values):
            self._views[rank][offset : offset + len(content)] = content
            self._pending[rank].update(zip(range(offset, offset + len(content)), content.tolist(), strict=True))

    def load(self, rank: int, addresses: NDArray[np.uint64], values: NDArray[np.generic]) -> None:
        """Replace elements of ``values``, which an ordinary load read, by what ``rank`` sees."""
        view, pending, is_new = self._views[rank], self._pending[rank], self._chance.random() < 0.5
        for offset, content in self._elements(addresses, values):
            if is_new:
                for place in range(offset, offset + len(content)):
                    if place not in pending:
                        view[place] = self._memory[place]
            content[:] = view[offset : offset + len(content)]

    def trickle(self) -> bool:
        """Let some bytes of every rank become visible; say whether any did."""
        count = 0
        for pending in self._pending:
            for place in [place for place in pending if self._chance.random() < 0.1]:
                self._memory[place] = pending.pop(place)
                count += 1
        return count > 0

    def release(self, rank: int) -> None:
        for place, byte in self._pending[rank].items():
            self._memory[place] = byte
        self._pending[rank].clear()

    def acquire(self, rank: int) -> None:
        view, pending = self._views[rank], self._pending[rank]
        view[:] = self._memory
        for place, byte in pending.items():
            view[place] = byte

    def is_quiet(self) -> bool:
        """Say whether nobody's stores wait to become visible."""
        return not any(self._pending)

    def _elements(self, addresses: NDArray[np.uint64], values: NDArray[np.generic]) -> list[tuple[int, Bytes]]:
        """Return (offset, bytes) of every element; the bytes are views of ``values``, which must be dense."""
        width = values.dtype.itemsize
        rows = values.reshape(-1).view(np.uint8).reshape(-1, width)
        offsets = (addresses.reshape(-1).astype(np.int64) - self._base).tolist()
        return list(zip(offsets, rows, strict=True))
