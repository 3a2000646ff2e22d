"""A rank's arena: segments of memory, who uses which bytes of them, and blocks that come back by themselves."""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from anyep.errors import CapacityError, ClosedError
from anyep.layout.regions import ALIGNMENT_BYTES, aligned
from anyep.machine.linux import Memory
from anyep.transport.base import Place
from anyep.transport.control import MAX_SEGMENTS

SEGMENT_UNIT_BYTES = 2 << 20
"""Segments are whole huge pages."""
_POISON = 0xFF


def rounded_to_segments(num_bytes: int) -> int:
    """Return the size of the segment that holds ``num_bytes``."""
    return -(-num_bytes // SEGMENT_UNIT_BYTES) * SEGMENT_UNIT_BYTES


class Heap:
    """Which bytes of which segments are free: best fit, neighbours merge. Integers only.

    >>> heap = Heap()
    >>> heap.add_segment(1024, reserved_bytes=128)
    >>> heap.take(200), heap.take(1000)
    (Place(segment=0, offset=128), None)
    """

    def __init__(self) -> None:
        self._free: list[tuple[int, int, int]] = []  # (segment, begin, end), ascending, never touching
        self._num_segments = 0

    def add_segment(self, num_bytes: int, *, reserved_bytes: int = 0) -> None:
        """Add the next segment; its first ``reserved_bytes`` are never given out."""
        begin = aligned(reserved_bytes)
        if begin < num_bytes:
            self._free.append((self._num_segments, begin, num_bytes))
        self._num_segments += 1

    def take(self, num_bytes: int) -> Place | None:
        """Cut ``num_bytes`` (more than 0) from the smallest free range that holds them; None when none does."""
        need = aligned(num_bytes)
        fits = [(end - begin, index) for index, (_, begin, end) in enumerate(self._free) if end - begin >= need]
        if not fits:
            return None
        _, index = min(fits)
        segment, begin, end = self._free[index]
        if begin + need == end:
            del self._free[index]
        else:
            self._free[index] = (segment, begin + need, end)
        return Place(segment=segment, offset=begin)

    def give(self, place: Place, num_bytes: int) -> None:
        """Take back what :meth:`take` cut."""
        segment, begin, end = place.segment, place.offset, place.offset + aligned(num_bytes)
        index = bisect_left(self._free, (segment, begin, end))
        if index < len(self._free) and self._free[index][:2] == (segment, end):
            end = self._free.pop(index)[2]
        if index > 0 and self._free[index - 1][0] == segment and self._free[index - 1][2] == begin:
            index -= 1
            begin = self._free.pop(index)[1]
        self._free.insert(index, (segment, begin, end))

    @property
    def free_bytes(self) -> int:
        return sum(end - begin for _, begin, end in self._free)


class ArenaBlock:
    """A piece of an arena (``transport/base.py``: Block). 0 bytes are a block too, at the arena's beginning.

    Only :meth:`Arena.trim` changes it.
    """

    __slots__ = ("address", "memory", "num_bytes", "place")

    def __init__(self, place: Place, address: int, num_bytes: int, memory: memoryview) -> None:
        self.place = place
        self.address = address
        self.num_bytes = num_bytes
        self.memory = memory

    def __repr__(self) -> str:
        return f"<block of {self.num_bytes} bytes at segment {self.place.segment}, offset {self.place.offset}>"


class Arena:
    """Cuts blocks from segments and grows. Empty until :meth:`begin`.

    ``commit(num_bytes)`` makes a segment or raises CapacityError. ``poison``: fill each block with 0xFF before it is
    given out (tests). Memory stays mapped while a tensor lies on it, whatever happens to the arena.
    """

    def __init__(self, commit: Callable[[int], Memory], *, poison: bool = False) -> None:
        self._commit = commit
        self._poison = poison
        self._turn = threading.Lock()
        self._heap = Heap()
        self._reserved_bytes = 0
        self._out: dict[Place, tuple[weakref.ref[Any], int]] = {}
        self._returned: deque[Place] = deque()
        self._closed = False
        self.segments: list[Memory] = []

    def begin(self, *, reserved_bytes: int, heap_bytes: int) -> None:
        """Commit segment 0, whose first ``reserved_bytes`` stay outside the heap. Raises CapacityError."""
        self._reserved_bytes = aligned(reserved_bytes)
        self._add_segment(self._reserved_bytes + heap_bytes, reserved_bytes=self._reserved_bytes)

    @property
    def committed_bytes(self) -> int:
        return sum(memory.size for memory in self.segments)

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks that somebody still holds."""
        with self._turn:
            self._take_back()
            return sum(num_bytes for _, num_bytes in self._out.values())

    def allocate(self, num_bytes: int) -> ArenaBlock:
        """Cut a block, 128-byte aligned; grow when none is free. Raises CapacityError, ValueError, ClosedError."""
        if num_bytes < 0:
            raise ValueError(f"num_bytes must be at least 0, got {num_bytes}")
        with self._turn:
            self._check_open()
            if num_bytes == 0:
                return ArenaBlock(Place(segment=0, offset=0), self.segments[0].address, 0, memoryview(bytearray()))
            self._take_back()
            return self._cut(self._heap.take(num_bytes) or self._grow(num_bytes), num_bytes)

    def trim(self, block: ArenaBlock, num_bytes: int) -> None:
        """Keep the first ``num_bytes`` of a block and take the rest back. Raises ValueError, ClosedError.

        The finalizer stays: it takes back what the block then is. At least one unit is kept, for two blocks may not
        share a place.
        """
        if not 0 <= num_bytes <= block.num_bytes:
            raise ValueError(f"a block of {block.num_bytes} bytes can be trimmed to 0 up to that many, got {num_bytes}")
        with self._turn:
            self._check_open()
            if block.num_bytes:
                reference, had = self._out[block.place]
                kept = aligned(num_bytes) or ALIGNMENT_BYTES
                if kept < had:
                    self._out[block.place] = reference, kept
                    self._heap.give(block.place._replace(offset=block.place.offset + kept), had - kept)
            block.num_bytes = num_bytes
            block.memory = block.memory[:num_bytes]

    def locate(self, address: int, num_bytes: int) -> Place | None:
        """Return where [address, address + num_bytes) lies in the heap, or None."""
        for index, memory in enumerate(self.segments):
            offset = address - memory.address
            begin = self._reserved_bytes if index == 0 else 0
            if begin <= offset and offset + num_bytes <= memory.size:
                return Place(segment=index, offset=offset)
        return None

    def close(self) -> None:
        """Give out nothing any more. Peers can map no further segments; what is mapped stays valid. Idempotent."""
        with self._turn:
            if not self._closed:
                self._closed = True
                for memory in self.segments:
                    memory.close_fd()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this arena is closed; open a new transport")

    def _cut(self, place: Place, num_bytes: int) -> ArenaBlock:
        """Make the block. It comes back when the array under its memoryview dies.

        Every view of the block keeps that array: tensors, slices, NumPy arrays. (A slice does not keep the memoryview
        it was cut from.) The finalizer is one append: it runs on any thread at any moment, and takes no lock.
        """
        memory, returned = self.segments[place.segment], self._returned
        array = np.ndarray((num_bytes,), np.uint8, buffer=memory.bytes, offset=place.offset)
        self._out[place] = weakref.ref(array, lambda _: returned.append(place)), aligned(num_bytes)
        if self._poison:
            array.fill(_POISON)
        return ArenaBlock(place, memory.address + place.offset, num_bytes, memoryview(array))

    def _take_back(self) -> None:
        while self._returned:
            place = self._returned.popleft()
            _, num_bytes = self._out.pop(place)
            self._heap.give(place, num_bytes)

    def _grow(self, num_bytes: int) -> Place:
        try:
            self._add_segment(max(num_bytes, self.committed_bytes // 2))
        except CapacityError:
            self._add_segment(num_bytes)  # as little as serves
        place = self._heap.take(num_bytes)
        assert place is not None
        return place

    def _add_segment(self, num_bytes: int, *, reserved_bytes: int = 0) -> None:
        if len(self.segments) == MAX_SEGMENTS:
            raise CapacityError(
                f"the arena has {MAX_SEGMENTS} segments of {self.committed_bytes} bytes together and no room for "
                f"{num_bytes} more; begin with more memory (arena_bytes)"
            )
        size = rounded_to_segments(num_bytes)
        self.segments.append(self._commit(size))
        self._heap.add_segment(size, reserved_bytes=reserved_bytes)
