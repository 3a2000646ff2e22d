"""Carries an operation's rows between hosts: several messages each way, pieces on their way bounded, nobody idle.

A *part* is one stream of messages, to or from one rank. All parts of an operation advance together, whichever can: a
rank that only sent before it received could wait for one that does the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from anyep.exchange.across import WINDOW
from anyep.transport.engine import Bytes, Transfer
from anyep.transport.hierarchical import HierarchicalTransport, tag_of

ROUTING, DATA, WEIGHTS = 4, 5, 6
"""Kinds of messages, beside the lanes' own numbers (transport/hierarchical.py)."""


class Part(Protocol):
    """One stream of messages."""

    def advance(self) -> bool:
        """Do what can be done at once; return whether anything was."""
        ...

    def pending(self) -> list[Transfer]:
        """Return what has to come before more can be done; empty when all is done."""
        ...


def carry(parts: Sequence[Part], transport: HierarchicalTransport, epoch: int, step: str) -> None:
    """Advance all parts to their ends. Raises PeerLost and PeerTimeout, naming the rank that does not come."""
    began_ns = time.monotonic_ns()
    while True:
        moved = [part.advance() for part in parts]
        waiting = [transfer for part in parts for transfer in part.pending()]
        if not waiting:
            return
        if any(moved):
            began_ns = time.monotonic_ns()
        else:
            transport.await_transfers(waiting, epoch, step, began_ns)


class Outbox:
    """Messages of one operation to one rank, at most WINDOW on their way."""

    def __init__(self, transport: HierarchicalTransport, rank: int, epoch: int) -> None:
        self._transport = transport
        self._rank = rank
        self._epoch = epoch
        self._sent: list[tuple[Transfer, Bytes]] = []
        self._spare: list[Bytes] = []

    def room(self) -> bool:
        """Look what has left; return whether another message may be sent."""
        for sent in [sent for sent in self._sent if self._transport.is_done(sent[0])]:
            self._sent.remove(sent)
            self._spare.append(sent[1])
        return len(self._sent) < WINDOW

    def memory(self, num_bytes: int) -> Bytes:
        """Return memory for the next message, any content."""
        for index, spare in enumerate(self._spare):
            if spare.size >= num_bytes:
                return self._spare.pop(index)
        return np.empty(num_bytes, np.uint8)

    def send(self, kind: int, number: int, memory: Bytes, num_bytes: int) -> None:
        message = memory[:num_bytes]
        tag = tag_of(kind, self._epoch, number)
        self._sent.append((self._transport.engine.send(self._rank, tag, message), memory))

    def pending(self) -> list[Transfer]:
        """Return what had not left when :meth:`room` looked: empty would say that no message is to follow."""
        return [transfer for transfer, _ in self._sent]


class Inbox:
    """Messages of one operation from one rank: awaited in order, asked for WINDOW ahead."""

    def __init__(self, transport: HierarchicalTransport, rank: int, epoch: int) -> None:
        self._transport = transport
        self._rank = rank
        self._epoch = epoch
        self._asked: list[tuple[Transfer, Bytes]] = []

    def room(self) -> bool:
        return len(self._asked) < WINDOW

    def ask(self, kind: int, number: int, memory: Bytes) -> None:
        """Give memory to the next message."""
        tag = tag_of(kind, self._epoch, number)
        self._asked.append((self._transport.engine.receive(self._rank, tag, memory), memory))

    def take(self) -> Bytes | None:
        """Return the oldest message that was asked for, if it is here."""
        if not self._asked or not self._transport.is_done(self._asked[0][0]):
            return None
        return self._asked.pop(0)[1]

    def pending(self) -> list[Transfer]:
        return [transfer for transfer, _ in self._asked[:1]]
