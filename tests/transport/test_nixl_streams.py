"""How messages go through windows in pieces, over an agent that needs no NIXL: two ranks of one thread."""

from __future__ import annotations

import contextlib
from collections import deque

import numpy as np
import pytest

from anyep.errors import PeerLost
from anyep.transport.engine_parcel import Note, NoteKind
from anyep.transport.engine_talk import Talk
from anyep.transport.liveness import Departure
from anyep.transport.nixl_streams import BEGUN, PIECE_BYTES, SLOTS, Streams


class Side:
    """One rank of two: the wire of its talk, and the agent of its streams. What it writes or tells waits in a line."""

    eager_bytes = 64

    def __init__(self, rank):
        self.rank = rank
        self.other = self
        self.line = deque()
        self.begun = self.most_begun = 0
        self.is_broken = False
        self.memory = np.full((2, SLOTS * PIECE_BYTES), 0xFF, np.uint8)
        self.written = []
        self.talk = Talk(1 - rank, rank, self, contextlib.nullcontext())
        self.streams = Streams(self, {1 - rank: self.talk}, self.tell, self.lose)

    def outbox(self, rank):
        return self.memory[1]

    def window(self, rank):
        return self.memory[0]

    def write(self, rank, offset, num_bytes, note):
        if self.is_broken:
            raise RuntimeError("the cable was pulled")
        handle = len(self.written)
        self.written.append(False)
        self.begun += 1
        self.most_begun = max(self.most_begun, self.begun)
        self.line.append(lambda: self.arrive(handle, slice(offset, offset + num_bytes), note))
        return handle

    def arrive(self, handle, where, note):
        self.other.window(self.rank)[where] = self.outbox(1 - self.rank)[where]
        self.written[handle] = True
        self.begun -= 1
        self.line.append(lambda: self.other.streams.take(self.rank, note))

    def is_written(self, handle):
        if self.is_broken:
            raise RuntimeError("the cable was pulled")
        return self.written[handle]

    def tell(self, rank, kind, tag, num_bytes, rest):
        self.line.append(lambda: self.other.hear(kind, tag, num_bytes, rest))

    def hear(self, kind, tag, num_bytes, rest):
        if kind == NoteKind.CREDIT:
            self.streams.free(1 - self.rank, num_bytes)
        else:
            self.talk.heard(Note(kind, tag, num_bytes, rest))

    def lose(self, rank, error):
        self.talk.end(Departure(how="died"), str(error))

    def expose(self, parcel):
        parcel.registration = 0
        return np.zeros(0, np.uint8)

    def withdraw(self, parcel):
        """Nothing was exposed."""

    def put(self, parcel, count, place, told_bytes):
        self.streams.put(parcel, count, told_bytes)

    def settled(self):
        """Nobody waits."""

    def look(self):
        """Steps are taken by hand."""


@pytest.fixture
def sides():
    first, second = Side(0), Side(1)
    first.other, second.other = second, first
    return first, second


def run(sides, steps=10_000):
    """Let everything happen that can, one thing at a time and in the order of each side's line."""
    for _ in range(steps):
        moved = False
        for side in sides:
            if side.line:
                side.line.popleft()()
                moved = True
            moved = side.streams.look_after_writes() or moved
        if not moved:
            return
    raise AssertionError("it never ends")


def message(number, num_bytes):
    return np.arange(number, number + num_bytes, dtype=np.int64).astype(np.uint8)


def test_messages_longer_than_the_window_arrive_and_few_pieces_are_under_way(sides):
    """Of several messages each way, so that notes queue behind pieces."""
    sizes = [2 * SLOTS * PIECE_BYTES + 5, PIECE_BYTES, 65, 3 * PIECE_BYTES + 1]
    sent = [[side.talk.send(tag, message(tag, size)) for tag, size in enumerate(sizes)] for side in sides]
    memory = [[np.full(size, 0xFF, np.uint8) for size in sizes] for _ in sides]
    received = [[side.talk.receive(tag, one) for tag, one in enumerate(memory[side.rank])] for side in sides]
    run(sides)
    for side in sides:
        assert all(parcel.done() for parcel in (*sent[side.rank], *received[side.rank]))
        assert not side.streams.is_writing
        assert side.most_begun == BEGUN
        for tag, size in enumerate(sizes):
            assert np.array_equal(memory[side.rank][tag], message(tag, size)), (side.rank, tag)


def test_a_message_of_another_size_ends_with_what_fits(sides):
    first, second = sides
    sent = first.talk.send(7, message(7, 5 * PIECE_BYTES))
    memory = np.zeros(2 * PIECE_BYTES + 1, np.uint8)
    received = second.talk.receive(7, memory)
    run(sides)
    assert sent.done()
    with pytest.raises(ValueError, match=r"rank 0.*bytes"):
        received.done()
    later = np.zeros(PIECE_BYTES, np.uint8)
    again = second.talk.receive(7, later)
    first.talk.send(7, message(8, PIECE_BYTES))
    run(sides)
    assert again.done()
    assert np.array_equal(later, message(8, PIECE_BYTES))


@pytest.mark.parametrize("when", ["before the first piece", "between pieces"])
def test_a_rank_that_cannot_be_reached_any_more_fails_what_is_under_way(sides, when):
    first, second = sides
    second.talk.receive(0, np.zeros(4 * PIECE_BYTES, np.uint8))
    sent = first.talk.send(0, message(0, 4 * PIECE_BYTES))
    if when == "between pieces":
        while not first.begun:
            for side in sides:
                if side.line:
                    side.line.popleft()()
    first.is_broken = True
    run(sides)
    with pytest.raises(PeerLost, match="the cable was pulled") as caught:
        sent.done()
    assert caught.value.ranks == (1,)
    assert not first.streams.is_writing
