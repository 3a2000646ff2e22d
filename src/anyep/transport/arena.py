"""A rank's arena: segments of memory, who uses which bytes of them, and blocks that come back by themselves."""

from __future__ import annotations

import sys
import threading
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from anyep.errors import CapacityError, ClosedError
from anyep.layout.regions import aligned
from anyep.machine.linux import Memory
from anyep.transport.base import Place
from anyep.transport.control import MAX_SEGMENTS

SEGMENT_UNIT_BYTES = 2 << 20
"""Segments are whole huge pages."""
_POISON = 0xFF
_SEGMENT_SHIFT = 48
_OFFSET_BITS = (1 << _SEGMENT_SHIFT) - 1


def rounded_to_segments(num_bytes: int) -> int:
    """Return the size of the segment that holds ``num_bytes``."""
    return -(-num_bytes // SEGMENT_UNIT_BYTES) * SEGMENT_UNIT_BYTES


class Heap:
    """Which bytes of which segments are free: best fit, neighbours merge. Integers only, in whole units of 128 bytes.

    A position is one number, ``segment << 48 | offset``, and ranges are two lists of them. Positions become places only
    where somebody asks: behind a copy of megabytes, making one takes 7 us.

    >>> heap = Heap()
    >>> heap.add_segment(1024, reserved_bytes=128)
    >>> heap.take(256), heap.take(1024)
    (128, None)
    """

    def __init__(self) -> None:
        self._begins: list[int] = []  # ascending; ranges never touch
        self._ends: list[int] = []
        self._num_segments = 0

    def add_segment(self, num_bytes: int, *, reserved_bytes: int = 0) -> None:
        """Add the next segment; its first ``reserved_bytes`` are never given out."""
        if reserved_bytes < num_bytes:
            self._begins.append(self._num_segments << _SEGMENT_SHIFT | reserved_bytes)
            self._ends.append(self._num_segments << _SEGMENT_SHIFT | num_bytes)
        self._num_segments += 1

    def take(self, num_bytes: int) -> int | None:
        """Cut ``num_bytes`` (more than 0) from the smallest free range that holds them; None when none does."""
        begins, ends = self._begins, self._ends
        best, best_bytes = -1, sys.maxsize
        for index, begin in enumerate(begins):
            free_bytes = ends[index] - begin
            if num_bytes <= free_bytes < best_bytes:
                best, best_bytes = index, free_bytes
        if best < 0:
            return None
        begin = begins[best]
        if best_bytes == num_bytes:
            del begins[best], ends[best]
        else:
            begins[best] = begin + num_bytes
        return begin

    def give(self, begin: int, num_bytes: int) -> None:
        """Take back what :meth:`take` cut, or a part of it."""
        begins, ends, end = self._begins, self._ends, begin + num_bytes
        index = bisect_left(begins, begin)
        joins_before = index > 0 and ends[index - 1] == begin
        if index < len(begins) and begins[index] == end:
            if joins_before:
                del begins[index], ends[index - 1]
            else:
                begins[index] = begin
        elif joins_before:
            ends[index - 1] = end
        else:
            begins.insert(index, begin)
            ends.insert(index, end)

    @property
    def free_bytes(self) -> int:
        return sum(self._ends) - sum(self._begins)

    def free_ranges(self) -> list[tuple[int, int]]:
        """Return where each free range begins, ascending, and its bytes."""
        return [(begin, end - begin) for begin, end in zip(self._begins, self._ends, strict=True)]


class ArenaBlock:
    """A piece of an arena (``transport/base.py``: Block). 0 bytes are a block too, at the arena's beginning.

    Only :meth:`Arena.trim` changes it. ``position``: as the heap counts.
    """

    __slots__ = ("address", "memory", "num_bytes", "position")

    def __init__(self, position: int, address: int, num_bytes: int, memory: memoryview) -> None:
        self.position = position
        self.address = address
        self.num_bytes = num_bytes
        self.memory = memory

    @property
    def place(self) -> Place:
        return Place(self.position >> _SEGMENT_SHIFT, self.position & _OFFSET_BITS)

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
        self._out: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._returned: deque[int] = deque()
        self._closed = False
        self.segments: list[Memory] = []
        self._arrays: list[Any] = []  # of the segments: a slice is cut in a fifth of an array's time

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
        whole_bytes = aligned(num_bytes)
        with self._turn:
            self._check_open()
            if num_bytes == 0:
                return ArenaBlock(0, self.segments[0].address, 0, memoryview(bytearray()))
            position = self._take_again(whole_bytes) if self._returned else None
            if position is None:
                position = self._heap.take(whole_bytes)
            if position is None:
                position = self._grow(whole_bytes)
            return self._cut(position, num_bytes, whole_bytes)

    def trim(self, block: ArenaBlock, num_bytes: int) -> None:
        """Keep the first ``num_bytes`` of a block and take the rest back. Raises ValueError, ClosedError.

        The finalizer stays, and gives back what the block is by then. A block trimmed to nothing keeps one unit, for
        two blocks may not share a place.
        """
        if not 0 <= num_bytes <= block.num_bytes:
            raise ValueError(f"a block of {block.num_bytes} bytes can be trimmed to 0 up to that many, got {num_bytes}")
        with self._turn:
            self._check_open()
            if block.num_bytes:
                reference, had = self._out[block.position]
                kept = aligned(num_bytes or 1)
                if kept < had:
                    self._out[block.position] = reference, kept
                    self._heap.give(block.position + kept, had - kept)
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

    def _cut(self, position: int, num_bytes: int, whole_bytes: int) -> ArenaBlock:
        """Make the block. It comes back when the array under its memoryview dies.

        Every view of the block keeps that array: tensors, slices, NumPy arrays. (A slice does not keep the memoryview
        it was cut from.) The finalizer is one append: it runs on any thread at any moment, and takes no lock.
        """
        segment, offset, returned = position >> _SEGMENT_SHIFT, position & _OFFSET_BITS, self._returned
        array = self._arrays[segment][offset : offset + num_bytes]
        self._out[position] = weakref.ref(array, lambda _: returned.append(position)), whole_bytes
        if self._poison:
            array.fill(_POISON)
        return ArenaBlock(position, self.segments[segment].address + offset, num_bytes, memoryview(array))

    def _take_again(self, whole_bytes: int) -> int | None:
        """Take back what has returned; a last block of that size is handed out again, without the heap's search."""
        position = self._returned.popleft()
        if not self._returned and self._out[position][1] == whole_bytes:
            del self._out[position]
            return position
        self._returned.appendleft(position)
        self._take_back()
        return None

    def _take_back(self) -> None:
        while self._returned:
            position = self._returned.popleft()
            _, whole_bytes = self._out.pop(position)
            self._heap.give(position, whole_bytes)

    def _grow(self, num_bytes: int) -> int:
        try:
            self._add_segment(max(num_bytes, self.committed_bytes // 2))
        except CapacityError:
            self._add_segment(num_bytes)  # as little as serves
        position = self._heap.take(num_bytes)
        assert position is not None
        return position

    def _add_segment(self, num_bytes: int, *, reserved_bytes: int = 0) -> None:
        if len(self.segments) == MAX_SEGMENTS:
            raise CapacityError(
                f"the arena has {MAX_SEGMENTS} segments of {self.committed_bytes} bytes together and no room for "
                f"{num_bytes} more; begin with more memory (arena_bytes)"
            )
        size = rounded_to_segments(num_bytes)
        memory = self._commit(size)
        self._arrays.append(np.frombuffer(memory.bytes, np.uint8))
        self.segments.append(memory)
        self._heap.add_segment(size, reserved_bytes=reserved_bytes)
