"""Messages on their way through NIXL's windows, cut into pieces: a rank's own, and those that come to it.

A note behind a piece, and every other note to the same rank, waits for the pieces in front of it. So few are begun at a
time: with all of a window under way a link of 1 Gbit/s stood still for 16 % of the time, since one side waited for
notes that queued behind what the other was sending.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from anyep.transport.engine import Bytes
from anyep.transport.engine_parcel import Note, NoteKind, Parcel
from anyep.transport.engine_talk import Talk

PIECE_KIND = 16
"""Beside those of ``engine_parcel.NoteKind``."""
PIECE_BYTES = 256 << 10
SLOTS = 16
BEGUN = 2
"""Pieces to a rank that are begun and not written. Dispatch and combine over 1 Gbit/s took 1512 ms with 2, 1525 with 3,
1520 with 4 and 1718 with 8; over a link as fast as the machine 2 carry as much as 16."""
_PIECE = struct.Struct("<IIQQQI")
"""PIECE_KIND, tag, what the whole message has, what comes of it, where this piece begins in it, its slot."""
_NOTHING = np.zeros(0, np.uint8)


class Agent(Protocol):
    """What is needed of :class:`anyep.transport.nixl_agent.NixlAgent`."""

    def window(self, rank: int) -> Bytes: ...

    def outbox(self, rank: int) -> Bytes: ...

    def write(self, rank: int, offset: int, num_bytes: int, note: bytes) -> Any: ...

    def is_written(self, handle: Any) -> bool: ...


@dataclass(kw_only=True, eq=False)
class _Stream:
    """A message on its way into a window, piece by piece."""

    parcel: Parcel
    count: int
    told_bytes: int
    begun: int = 0
    pieces: int = 0
    """on their way"""


@dataclass(kw_only=True, eq=False)
class _Way:
    """To one other rank."""

    talk: Talk
    slots: deque[int] = field(default_factory=lambda: deque(range(SLOTS)))
    """free ones of our window there"""
    streams: deque[_Stream] = field(default_factory=deque)
    """those with pieces that have not begun"""
    begun: int = 0
    """pieces on their way"""


class Streams:
    """Of one rank, to and from all others. Used with the engine's lock held.

    ``tell(rank, kind, tag, num_bytes, rest)`` sends a note; ``lose(rank, error)``: NIXL does not reach a rank any more.
    """

    def __init__(
        self,
        agent: Agent,
        talks: Mapping[int, Talk],
        tell: Callable[[int, NoteKind, int, int, Bytes], None],
        lose: Callable[[int, Exception], None],
    ) -> None:
        self._agent = agent
        self._ways = {rank: _Way(talk=talk) for rank, talk in talks.items()}
        self._tell = tell
        self._lose = lose
        self._writes: list[tuple[Any, _Way, _Stream]] = []

    @property
    def is_writing(self) -> bool:
        return bool(self._writes)

    def put(self, parcel: Parcel, count: int, told_bytes: int) -> None:
        """Bring the first ``count`` bytes into the window there; the message counts as one of ``told_bytes``."""
        way = self._ways[parcel.rank]
        way.streams.append(_Stream(parcel=parcel, count=count, told_bytes=told_bytes))
        self._pump(way)

    def free(self, rank: int, slot: int) -> None:
        """The other side has emptied a slot of our window there."""
        way = self._ways[rank]
        way.slots.append(slot)
        self._pump(way)

    def take(self, rank: int, raw: bytes) -> None:
        """Copy a piece that has come to its place, and give its slot back; with the last one the message is here."""
        _, tag, told_bytes, count, begin, slot = _PIECE.unpack(raw)
        talk = self._ways[rank].talk
        parcel = talk.awaited(tag)
        if parcel is None:  # this side has failed it since
            return
        size = min(PIECE_BYTES, count - begin)
        window = self._agent.window(rank)
        parcel.memory[begin : begin + size] = window[slot * PIECE_BYTES : slot * PIECE_BYTES + size]
        self._tell(rank, NoteKind.CREDIT, 0, slot, _NOTHING)
        assert isinstance(parcel.registration, int), "it counts the bytes that have come"
        parcel.registration += size
        if parcel.registration == count:
            talk.heard(Note(NoteKind.DONE, tag, told_bytes, _NOTHING))

    def look_after_writes(self) -> bool:
        """Return whether any piece has been written since."""
        writes, self._writes = self._writes, []
        left = [write for write in writes if not self._is_over(*write)]
        self._writes += left
        return len(left) < len(writes)

    def _pump(self, way: _Way) -> None:
        """Begin as many pieces as may be under way."""
        while way.streams and way.slots and way.begun < BEGUN and way.talk.departure is None:
            stream = way.streams[0]
            self._begin(way, stream, way.slots.popleft())
            if stream.begun == stream.count:
                way.streams.popleft()

    def _begin(self, way: _Way, stream: _Stream, slot: int) -> None:
        begin, size = stream.begun, min(PIECE_BYTES, stream.count - stream.begun)
        stream.begun += size
        stream.pieces += 1
        way.begun += 1
        offset, rank = slot * PIECE_BYTES, way.talk.rank
        self._agent.outbox(rank)[offset : offset + size] = stream.parcel.memory[begin : begin + size]
        note = _PIECE.pack(PIECE_KIND, stream.parcel.tag, stream.told_bytes, stream.count, begin, slot)
        try:
            handle = self._agent.write(rank, offset, size, note)
        except Exception as error:  # its errors have no common kind
            self._lose(rank, error)
        else:
            self._writes.append((handle, way, stream))

    def _is_over(self, handle: Any, way: _Way, stream: _Stream) -> bool:
        """Whether a piece is written. A message is done with its last piece, not as soon as that is copied: its sender
        may close the engine then, and what has not left would be lost."""
        try:
            if not self._agent.is_written(handle):
                return False
        except Exception as error:  # as above
            self._lose(way.talk.rank, error)
            return True
        stream.pieces -= 1
        way.begun -= 1
        self._pump(way)
        if stream.begun == stream.count and not stream.pieces:
            way.talk.sent(stream.parcel)
        return True
