"""Where blocks lie in an arena: best fit over segments, neighbours joined again. Pure integers."""

from __future__ import annotations

from bisect import bisect_left, insort

from anyep.layout.regions import aligned
from anyep.transport.base import Place


class Heap:
    """Free space of a growing list of segments. Sizes are rounded up to the arena's alignment."""

    def __init__(self) -> None:
        self._free: list[list[tuple[int, int]]] = []  # a segment's free ranges (begin, end), ascending
        self.sizes: list[int] = []

    def add_segment(self, num_bytes: int) -> None:
        """Append a segment, all free."""
        self.sizes.append(num_bytes)
        self._free.append([(0, num_bytes)] if num_bytes else [])

    def take(self, num_bytes: int) -> Place | None:
        """Return the tightest free place of at least ``num_bytes``, or None."""
        needed = aligned(num_bytes)
        fits = [
            (end - begin, segment, begin)
            for segment, ranges in enumerate(self._free)
            for begin, end in ranges
            if end - begin >= needed
        ]
        if not fits:
            return None
        size, segment, begin = min(fits)
        ranges = self._free[segment]
        at = bisect_left(ranges, (begin, begin + size))
        ranges[at : at + 1] = [(begin + needed, begin + size)] if size > needed else []
        return Place(segment=segment, offset=begin)

    def give_back(self, place: Place, num_bytes: int) -> None:
        """Free what :meth:`take` returned for ``num_bytes``."""
        ranges = self._free[place.segment]
        begin, end = place.offset, place.offset + aligned(num_bytes)
        at = bisect_left(ranges, (begin, end))
        if at < len(ranges) and ranges[at][0] == end:
            end = ranges.pop(at)[1]
        if at > 0 and ranges[at - 1][1] == begin:
            begin = ranges.pop(at - 1)[0]
        insort(ranges, (begin, end))

    @property
    def free_bytes(self) -> int:
        return sum(end - begin for ranges in self._free for begin, end in ranges)
