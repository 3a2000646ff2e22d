"""Carries an operation's rows between hosts: several messages each way, a bounded number on their way, nobody idle.

A *part* is one stream of messages, to or from one rank. All parts of an operation advance together, whichever can: a
rank that only sent before it received could wait for one that does the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from anyep.exchange.across import Across
from anyep.transport.engine import Bytes, Transfer
from anyep.transport.hierarchical import HierarchicalTransport, tag_of

RETRACTED, ROUTING, DATA, STRAIGHT = 3, 4, 5, 6
"""Kinds of messages, beside the lanes' own numbers (transport/hierarchical.py)."""


class Part(Protocol):
    """One stream of messages, or work that goes on beside them."""

    def advance(self) -> bool:
        """Do what can be done at once, or a small part of it; return whether anything was done."""
        ...

    def pending(self) -> list[Transfer]:
        """Return what has to come before more can be done; empty when all is done."""
        ...


def carry(parts: Sequence[Part], transport: HierarchicalTransport, epoch: int, step: str) -> None:
    """Advance all parts to their ends. Raises PeerLost and PeerTimeout, naming the rank that does not come."""
    with transport.passing_on():
        _carry(parts, transport, epoch, step)


def _carry(parts: Sequence[Part], transport: HierarchicalTransport, epoch: int, step: str) -> None:
    """All is done when a pass moves nothing in front of which everything had come.

    What comes between a part's turn and the question what is pending is acted on in the next pass.
    """
    began_ns = time.monotonic_ns()
    all_came = False
    while True:
        moved = [part.advance() for part in parts]
        waiting = [transfer for part in parts for transfer in part.pending()]
        if any(moved):
            began_ns = time.monotonic_ns()
        elif not waiting and all_came:
            return
        else:
            late = [transfer for transfer in waiting if not transport.is_done(transfer)]
            if late:  # others have come, and are not wanted before these
                transport.await_transfers(late, epoch, step, began_ns)
        all_came = not waiting


def piece_memory(num_bytes: int) -> Bytes:
    """Return memory for a piece, any content."""
    return np.empty(num_bytes, np.uint8)


class _Shelf:
    """Memory of pieces that is used again."""

    def __init__(self) -> None:
        self._spare: list[Bytes] = []

    def take(self, num_bytes: int) -> Bytes:
        for index, spare in enumerate(self._spare):
            if spare.size >= num_bytes:
                return self._spare.pop(index)
        self._spare = self._spare[1:]  # one that is too small makes room for one that is not
        return piece_memory(num_bytes)

    def give_back(self, memory: Bytes) -> None:
        self._spare.append(memory)


class Outbox:
    """Messages of one operation to one rank, at most ``across.window`` on their way."""

    def __init__(self, across: Across, rank: int, epoch: int) -> None:
        self._transport = across.transport
        self._window = across.window
        self._rank = rank
        self._epoch = epoch
        self._sent: list[tuple[Transfer, Bytes]] = []
        self._shelf = _Shelf()

    def room(self) -> bool:
        """Look what has left; return whether another message may be sent."""
        for sent in [sent for sent in self._sent if self._transport.is_done(sent[0])]:
            self._sent.remove(sent)
            self._shelf.give_back(sent[1])
        return len(self._sent) < self._window

    def memory(self, num_bytes: int) -> Bytes:
        """Return memory for the next message, any content."""
        return self._shelf.take(num_bytes)

    def send(self, kind: int, number: int, memory: Bytes, num_bytes: int) -> None:
        message = memory[:num_bytes]
        tag = tag_of(kind, self._epoch, number)
        self._sent.append((self._transport.engine.send(self._rank, tag, message), memory))

    def pending(self) -> list[Transfer]:
        """Return what had not left when :meth:`room` looked: empty would say that no message is to follow."""
        return [transfer for transfer, _ in self._sent]


class Inbox:
    """Messages of one operation from one rank, in order: at most ``across.window`` asked for, or taken and kept."""

    def __init__(self, across: Across, rank: int, epoch: int) -> None:
        self._transport = across.transport
        self._window = across.window
        self._rank = rank
        self._epoch = epoch
        self._asked: list[tuple[Transfer, Bytes]] = []
        self._kept = 0
        self._shelf = _Shelf()

    def room(self) -> bool:
        return len(self._asked) + self._kept < self._window

    def ask(self, kind: int, number: int, num_bytes: int) -> None:
        """Ask for the next message."""
        self._ask(kind, number, self._shelf.take(num_bytes), num_bytes)

    def ask_into(self, kind: int, number: int, memory: Bytes) -> None:
        """Ask for the next message, where it is to stay: it is not given back."""
        self._ask(kind, number, memory, memory.size)

    def take(self) -> Bytes | None:
        """Return the oldest message that was asked for, if it is here: it counts until it is given back."""
        if not self._asked or not self._transport.is_done(self._asked[0][0]):
            return None
        self._kept += 1
        return self._asked.pop(0)[1]

    def give_back(self, memory: Bytes | None) -> None:
        """Let go of a message that was taken; None: of one that stays."""
        self._kept -= 1
        if memory is not None:
            self._shelf.give_back(memory)

    def pending(self) -> list[Transfer]:
        return [transfer for transfer, _ in self._asked[:1]]

    def _ask(self, kind: int, number: int, memory: Bytes, num_bytes: int) -> None:
        tag = tag_of(kind, self._epoch, number)
        transfer = self._transport.engine.receive(self._rank, tag, memory[:num_bytes])
        self._asked.append((transfer, memory))
