"""Eager rows: memory at every receiver in which small batches arrive together with their announcement.

An *eager slot* holds what one source sends one receiver in one operation: the parts of a row one after the other, as in
a batch of as many rows as fit. Who sends decides alone, pair by pair, whether its rows come along (:class:`EagerRule`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anyep.layout.regions import ALIGNMENT_BYTES, RowBytes, aligned, row_region
from anyep.transport.base import Block, Words

SLOT_BYTES = 1 << 20
"""What a slot holds at most by default: 128 tokens of 7168 channels in FP8."""
AREA_BYTES = 64 << 20
"""What all slots of a rank take at most by default."""


def slot_bytes_for(widest_row: int, max_tokens: int, num_slots: int, eager_bytes: int | None) -> int:
    """Return the size of a slot: what a pair can need, within the limits, or what ``eager_bytes`` asks for.

    >>> slot_bytes_for(7488, 128, 64, None), slot_bytes_for(7488, 128, 2048, None), slot_bytes_for(100, 8, 64, 0)
    (959488, 32768, 0)
    """
    most = aligned(widest_row * max_tokens + 8 * ALIGNMENT_BYTES)
    if eager_bytes is not None:
        return min(most, aligned(eager_bytes + 8 * ALIGNMENT_BYTES)) if eager_bytes else 0
    return min(most, SLOT_BYTES, AREA_BYTES // num_slots // ALIGNMENT_BYTES * ALIGNMENT_BYTES)


class EagerSlots:
    """Where the slots of all ranks lie. ``bases`` int64 [R]: each rank's area, as seen from here."""

    def __init__(self, block: Block, bases_R: Words, rank: int, *, slot_bytes: int) -> None:
        self._block = block  # this rank's area: kept as long as peers may write there
        self._bases_R = bases_R
        self._rank = rank
        self.slot_bytes = slot_bytes
        self.num_ranks = len(bases_R)

    def sending(self, index: int) -> Words:
        """Return where this rank's slot lies at every receiver, int64 [R], in ring slot ``index``."""
        slots_R: Words = self._bases_R + (index * self.num_ranks + self._rank) * self.slot_bytes
        return slots_R

    def receiving(self, index: int) -> Words:
        """Return where every source's slot lies here."""
        numbers_R = index * self.num_ranks + np.arange(self.num_ranks)
        slots_R: Words = self._bases_R[self._rank] + numbers_R * self.slot_bytes
        return slots_R

    def capacity(self, row_bytes: int) -> int:
        """Return how many rows of this size a slot holds."""
        return max(0, self.slot_bytes - 5 * ALIGNMENT_BYTES) // max(1, row_bytes)

    def offsets(self, row: RowBytes) -> list[int]:
        """Return where each part of the rows begins in a slot."""
        region = row_region(row, self.capacity(row.sent))
        routing = aligned(region.data_bytes)
        return [0, region.scales_offset, routing, routing + region.weights_offset, routing + region.token_offset]


@dataclass(frozen=True, kw_only=True)
class EagerRule:
    """Up to how many bytes a pair's rows come along, and why.

    ``one_way``: rows of a rank whose pairs lie on both sides of the border all go the way that most of them take. Who
    receives rows both ways pays for both: copies from slots, and a second round of messages all the same.
    """

    pair_bytes: int
    reason: str
    one_way: bool = False

    def limit_rows(self, row_bytes: int, capacity: int) -> int:
        """Return up to how many rows go eagerly."""
        return min(capacity, self.pair_bytes // max(1, row_bytes))
