"""What lies where in the memory that a rank keeps for messages to it. Pure integers, the same on every rank.

First a header of int64 words, by index::

    0 token      names this transport; a peer that mapped something else finds out
    1 state      open, closed, or failed and how
    2 growing    bytes this rank is about to commit
    3 segments   how many stand in the table
    4 network    1 while it passes on what comes from other hosts, or waits for that
    5 claim      the last operation that needs it in which the rank takes part; -1 - n: the others began n without it
    6 outsider   which rank of another of its transports, that takes no part here, it waits for there
    7 outside    when it last said so; 0: it does not
    8 doorbell   two words on a cache line of their own (transport/signals.py)
    16 table     64 x (fd, inode, bytes)
    208 blamed   one word a rank
    then waiting, one word a rank: when it last said that it waits for that one; 0: it does not
    then one word: the name of the outsider's holder (transport/elsewhere.py)

then each lane's mailboxes [ring, R], in whole cache lines: a signal word, the time of posting, the lane's words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyep.transport.base import Lane

TOKEN, STATE, GROWING, SEGMENTS, NETWORK, CLAIM, OUTSIDER, OUTSIDE, TABLE = 0, 1, 2, 3, 4, 5, 6, 7, 16
MAX_SEGMENTS = 64
"""A new segment is at least half of all before it, so no machine has memory for more."""
BLAMED = TABLE + 3 * MAX_SEGMENTS
DOORBELL_OFFSET = 64
_LINE_BYTES = 64
TIME_OFFSET, WORDS_OFFSET = 8, 16
"""Bytes from a mailbox's signal word to its time and to its message."""


def _lines(num_bytes: int) -> int:
    return -(-num_bytes // _LINE_BYTES) * _LINE_BYTES


@dataclass(frozen=True, kw_only=True)
class ControlLayout:
    """Offsets in bytes. Lanes are numbered from 0."""

    num_ranks: int
    ring: int
    lane_words: tuple[int, ...]

    @classmethod
    def of(cls, lanes: Sequence[Lane], ring: int, num_ranks: int) -> ControlLayout:
        """Raises ValueError for lanes or a ring that make no sense."""
        if [lane.index for lane in lanes] != list(range(len(lanes))):
            raise ValueError(f"lanes must be numbered from 0 in order, got {[lane.index for lane in lanes]}")
        if any(lane.words < 0 for lane in lanes):
            raise ValueError(f"lanes must have at least 0 words, got {[lane.words for lane in lanes]}")
        if ring < 1:
            raise ValueError(f"ring must be at least 1, got {ring}")
        return cls(num_ranks=num_ranks, ring=ring, lane_words=tuple(lane.words for lane in lanes))

    def mailbox_bytes(self, lane: int) -> int:
        """Return what one mailbox takes, and so how far the next source's is."""
        return _lines(WORDS_OFFSET + 8 * self.lane_words[lane])

    def mailbox_offset(self, lane: int, slot: int, source: int) -> int:
        """Return where the mailbox of ``source`` in a ring slot begins."""
        before = sum(self.mailbox_bytes(other) for other in range(lane)) * self.ring * self.num_ranks
        return self._header_bytes + before + (slot * self.num_ranks + source) * self.mailbox_bytes(lane)

    @property
    def num_bytes(self) -> int:
        """Everything together."""
        boxes = sum(self.mailbox_bytes(lane) for lane in range(len(self.lane_words)))
        return self._header_bytes + boxes * self.ring * self.num_ranks

    @property
    def _header_bytes(self) -> int:
        return _lines(8 * (BLAMED + 2 * self.num_ranks + 1))
