"""How a control segment is laid out, and what a rank's state word says. Pure integers, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from anyep.transport.base import Lane

_LINE = 64
_BLAMED_AT = 192  # signals.BLAMED_AT, without importing compiled code
MAX_SEGMENTS = 512
"""Entries of the directory; an arena that grows by quarters has fewer than 100 at any size."""


class State(IntEnum):
    """A rank's state word."""

    OPEN = 0
    CLOSED = 1
    LOST = 2
    """it left because ranks that it names were lost"""
    TIMED_OUT = 3
    """it left because ranks that it names were silent"""


@dataclass(frozen=True, kw_only=True)
class ControlLayout:
    """Doorbell, state, blamed ranks, the directory of the arena's segments, then each lane's mailboxes [ring, R]."""

    num_ranks: int
    ring: int
    lane_words: tuple[int, ...]

    @classmethod
    def of(cls, lanes: Sequence[Lane], ring: int, num_ranks: int) -> ControlLayout:
        assert [lane.index for lane in lanes] == list(range(len(lanes))), "lanes are numbered from 0"
        return cls(num_ranks=num_ranks, ring=ring, lane_words=tuple(lane.words for lane in lanes))

    def stride(self, lane: Lane) -> int:
        """Bytes from one source's mailbox to the next: the signal word and the payload, in whole lines."""
        return _lines(8 + 8 * lane.words)

    def mailbox_offset(self, lane: Lane, epoch: int, source: int) -> int:
        """Offset of the mailbox of ``source`` for ``epoch``."""
        return self._lane_offset(lane.index) + (epoch % self.ring * self.num_ranks + source) * self.stride(lane)

    @property
    def num_bytes(self) -> int:
        return self._lane_offset(len(self.lane_words))

    def directory_offset(self, segment: int) -> int:
        """Offset of the int64 that says which descriptor of its owner a segment is."""
        return _lines(_BLAMED_AT + self.num_ranks) + 8 * segment

    def _lane_offset(self, index: int) -> int:
        before = sum(_lines(8 + 8 * words) for words in self.lane_words[:index])
        return _lines(self.directory_offset(MAX_SEGMENTS)) + before * self.ring * self.num_ranks


def _lines(num_bytes: int) -> int:
    return -(-num_bytes // _LINE) * _LINE
