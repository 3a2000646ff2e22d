"""A rank's memory: segments that are only ever added, and blocks that come back when their last tensor dies."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from anyep.errors import CapacityError
from anyep.layout.regions import aligned
from anyep.machine import linux
from anyep.transport.base import Place
from anyep.transport.heap import Heap

_SEGMENT_UNIT = 2 << 20
_GROWTH = 4
"""A new segment is at least a quarter of the arena, so that an arena of any size grows in few steps."""
_POISON = 0xFF
"""0xff is NaN in every float format, and -1 in every integer one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """Memory mapped here; unmapped when nothing refers to it any more."""

    memory: mmap.mmap
    address: int
    descriptor: int
    """of the memory file; -1 where the memory is this process's own"""

    @property
    def num_bytes(self) -> int:
        return len(self.memory)


@dataclass(frozen=True, kw_only=True, eq=False)
class ArenaBlock:
    """See transport/base.py."""

    place: Place
    address: int
    num_bytes: int
    memory: memoryview


def private_segment(num_bytes: int) -> Segment:
    """Map memory that only this process sees."""
    try:
        memory = mmap.mmap(-1, num_bytes)
    except (OSError, OverflowError) as error:
        raise CapacityError(f"cannot map {num_bytes / 2**20:.1f} MiB: {error}") from error
    linux.populate(memory, write=True)
    return Segment(memory=memory, address=address_of(memory), descriptor=-1)


def shared_segment(num_bytes: int) -> Segment:
    """Map memory that peers of this host can map too."""
    descriptor = linux.shared_memory_file(num_bytes)
    memory = mmap.mmap(descriptor, num_bytes)
    linux.populate(memory, write=True)
    return Segment(memory=memory, address=address_of(memory), descriptor=descriptor)


def address_of(memory: mmap.mmap) -> int:
    """Return where a writable mapping lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Arena:
    """Segments, the heap on them, and the blocks that are out."""

    def __init__(self, new_segment: Callable[[int], Segment], *, poison: bool) -> None:
        self._new_segment = new_segment
        self._poison = poison
        self._heap = Heap()
        self._out: dict[int, tuple[weakref.ref[memoryview], Place, int]] = {}
        self._returned: deque[int] = deque()
        self._next_key = 0
        self.segments: list[Segment] = []

    def grow(self, num_bytes: int) -> None:
        """Add a segment of at least ``num_bytes``; CapacityError when the machine lacks the memory."""
        size = -(-num_bytes // _SEGMENT_UNIT) * _SEGMENT_UNIT
        available = linux.available_bytes()
        if size > available:
            raise CapacityError(
                f"the arena ({self.committed_bytes / 2**20:.1f} MiB) needs {size / 2**20:.1f} MiB more and "
                f"{available / 2**20:.1f} MiB are available; release received tensors, send fewer tokens a step, "
                "or run fewer ranks on this machine"
            )
        self.segments.append(self._new_segment(size))
        self._heap.add_segment(size)

    def allocate(self, num_bytes: int) -> ArenaBlock:
        """Cut a block; grow where nothing fits."""
        self._take_back()
        place = self._heap.take(num_bytes) if num_bytes else Place(segment=0, offset=0)
        if place is None:
            self.grow(max(aligned(num_bytes), self.committed_bytes // _GROWTH))
            place = self._heap.take(num_bytes)
            assert place is not None, "a fresh segment of this size has room"
        segment = self.segments[place.segment]
        memory = memoryview(segment.memory)[place.offset : place.offset + num_bytes]
        if self._poison:
            ctypes.memset(segment.address + place.offset, _POISON, num_bytes)
        if num_bytes:
            self._watch(memory, place, num_bytes)
        return ArenaBlock(place=place, address=segment.address + place.offset, num_bytes=num_bytes, memory=memory)

    def locate(self, address: int, num_bytes: int) -> Place | None:
        """Return the place of an address range of this arena."""
        for index, segment in enumerate(self.segments):
            offset = address - segment.address
            if 0 <= offset and offset + num_bytes <= segment.num_bytes:
                return Place(segment=index, offset=offset)
        return None

    @property
    def committed_bytes(self) -> int:
        return sum(self._heap.sizes)

    @property
    def free_bytes(self) -> int:
        self._take_back()
        return self._heap.free_bytes

    def _watch(self, memory: memoryview, place: Place, num_bytes: int) -> None:
        """Note when the block's last user dies. The note is one append: finalizers run anywhere, and take no lock."""
        key = self._next_key
        self._next_key += 1
        returned = self._returned
        self._out[key] = (weakref.ref(memory, lambda _: returned.append(key)), place, num_bytes)

    def _take_back(self) -> None:
        while self._returned:
            _, place, num_bytes = self._out.pop(self._returned.popleft())
            self._heap.give_back(place, num_bytes)
