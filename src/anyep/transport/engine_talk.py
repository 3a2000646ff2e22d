"""How two ranks agree on where a message goes: the protocol that engines share, without a network.

A small message is *eager*: it travels inside a note. Of a larger one the receiver says where it may be put; the
sender puts it there, and a note that follows on the same way says that it is there. No byte is ever received without a
place, and none is copied on the way. Notes between two ranks arrive in the order in which they were told.

=======  ==============================================================================================
EAGER    from the sender: here is the whole message
READY    from the receiver: put the message there (or, of an eager size: I expect an eager one)
OFFER    from the sender: I have a message, and have not heard of a place for it
DONE     from the sender: the message is there; it had ``num_bytes``
MISFIT   from the receiver: an eager message came where I had given a place; take the place back
BYE      nothing will come any more; answered by HEARD
ASK      answer when you have heard all this
HEARD    the answer
=======  ==============================================================================================

A message of a wrong size ends like any other, with what fits of it put where the receiver said, so that nothing stays
behind under its tag: only its receiver is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from anyep.transport.engine import Bytes, Failure
from anyep.transport.engine_checks import peer_lost, tag_taken, wrong_size
from anyep.transport.engine_parcel import Note, NoteKind, Parcel, Wire
from anyep.transport.liveness import Departure

_NOTHING = np.zeros(0, np.uint8)
_GOODBYE_S = 0.1
"""How long a close waits for the answers to its BYE, of all ranks together."""


class Talk:
    """One rank's side of all messages between it and one other. ``lock``: held while anything here changes."""

    def __init__(self, rank: int, own_rank: int, wire: Wire, lock: AbstractContextManager[Any]) -> None:
        self.rank = rank
        self.departure: Departure | None = None
        self._own_rank = own_rank
        self._wire = wire
        self._lock = lock
        self._sends: dict[int, Parcel] = {}
        """waiting for a place, or on their way to it"""
        self._receives: dict[int, Parcel] = {}
        self._places: dict[int, tuple[int, Bytes]] = {}
        """sizes and places that the other side has told of before this side had a message for them"""
        self._early: dict[int, Bytes] = {}
        """eager messages before their receive"""
        self._offers: set[int] = set()
        self._unanswered = 0
        """ASKs without an answer"""
        self._obstacle: Failure | None = None
        self._why = ""

    def send(self, tag: int, memory: Bytes) -> Parcel:
        with self._lock:
            if tag in self._sends:
                raise tag_taken(self.rank, tag, "sent to")
            parcel = self._parcel(tag, memory, incoming=False)
            if self._is_blocked(parcel):
                return parcel
            if memory.size <= self._wire.eager_bytes:
                self._wire.tell(self.rank, NoteKind.EAGER, tag, memory.size, memory)
                parcel.finish()
                return parcel
            self._sends[tag] = parcel
            if tag in self._places:
                self._put(parcel, *self._places.pop(tag))
            else:
                self._wire.tell(self.rank, NoteKind.OFFER, tag, memory.size, _NOTHING)
            return parcel

    def receive(self, tag: int, memory: Bytes) -> Parcel:
        with self._lock:
            if tag in self._receives:
                raise tag_taken(self.rank, tag, "received from")
            parcel = self._parcel(tag, memory, incoming=True)
            if tag in self._early:  # also from a rank that has left since
                self._take(parcel, self._early.pop(tag))
                return parcel
            if self._is_blocked(parcel):
                return parcel
            self._receives[tag] = parcel
            if memory.size > self._wire.eager_bytes:
                self._wire.tell(self.rank, NoteKind.READY, tag, memory.size, self._wire.expose(parcel))
            elif tag in self._offers:
                self._wire.tell(self.rank, NoteKind.READY, tag, memory.size, _NOTHING)
            self._offers.discard(tag)
            return parcel

    @property
    def is_busy(self) -> bool:
        """Whether a message is under way."""
        return bool(self._sends or self._receives)

    def ask(self) -> None:
        """Let the other side say when it has heard everything: :attr:`is_heard` then."""
        with self._lock:
            if self.departure is None and self._obstacle is None:
                self._unanswered += 1
                self._wire.tell(self.rank, NoteKind.ASK, 0, 0, _NOTHING)

    def say_goodbye(self) -> None:
        """Tell the other side that nothing will come any more, which answers that too."""
        with self._lock:
            if self.departure is None and self._obstacle is None:
                self._unanswered += 1
                self._wire.tell(self.rank, NoteKind.BYE, 0, 0, _NOTHING)

    @property
    def is_heard(self) -> bool:
        """Whether it has, or has left."""
        return not self._unanswered or self.departure is not None

    def awaited(self, tag: int) -> Parcel | None:
        """Return the receive that is under way under a tag."""
        return self._receives.get(tag)

    def heard(self, note: Note) -> None:
        """Act on what the other side told."""
        with self._lock:
            kind, tag, num_bytes, rest = note
            if self._obstacle is not None or self.departure is not None:
                return
            if kind == NoteKind.EAGER:
                self._heard_eager(tag, rest)
            elif kind == NoteKind.DONE:
                self._heard_done(tag, num_bytes)
            elif kind == NoteKind.READY:
                self._heard_ready(tag, num_bytes, rest)
            elif kind == NoteKind.OFFER:
                self._heard_offer(tag)
            elif kind == NoteKind.MISFIT:
                self._put(self._parcel(tag, np.zeros(1, np.uint8), incoming=False), *self._places.pop(tag), num_bytes)
            elif kind == NoteKind.ASK:
                self._wire.tell(self.rank, NoteKind.HEARD, 0, 0, _NOTHING)
            elif kind == NoteKind.HEARD:
                self._unanswered -= 1
                self._wire.settled()
            elif kind == NoteKind.BYE:
                self.end(Departure(how="closed"))
                self._wire.tell(self.rank, NoteKind.HEARD, 0, 0, _NOTHING)

    def end(self, departure: Departure, why: str = "") -> None:
        """The other side has left: fail what cannot be done any more. The first reason stays."""
        with self._lock:
            if self.departure is None:
                self.departure = departure
                self._why = why
                self._fail_all()

    def close(self, failure: Failure) -> None:
        """This rank leaves: fail all that is under way."""
        with self._lock:
            self._obstacle = failure
            self._fail_all()
            self._early.clear()

    def sent(self, parcel: Parcel) -> None:
        """The network has taken a parcel's bytes: its memory is free."""
        with self._lock:
            if self._sends.get(parcel.tag) is parcel:
                del self._sends[parcel.tag]
            parcel.finish()
            self._wire.settled()

    def _parcel(self, tag: int, memory: Bytes, *, incoming: bool) -> Parcel:
        return Parcel(self.rank, tag, memory, incoming=incoming, look=self._wire.look)

    def _heard_eager(self, tag: int, message: Bytes) -> None:
        parcel = self._receives.get(tag)
        if parcel is None:
            self._early[tag] = message.copy()
        elif parcel.memory.size > self._wire.eager_bytes:
            self._wire.tell(self.rank, NoteKind.MISFIT, tag, message.size, _NOTHING)
        else:
            del self._receives[tag]
            self._take(parcel, message)

    def _heard_done(self, tag: int, num_bytes: int) -> None:
        parcel = self._receives.pop(tag)
        self._wire.withdraw(parcel)
        self._conclude(parcel, num_bytes)

    def _heard_ready(self, tag: int, num_bytes: int, place: Bytes) -> None:
        if tag in self._sends:
            self._put(self._sends[tag], num_bytes, place)
        else:
            self._places[tag] = num_bytes, place.copy()

    def _heard_offer(self, tag: int) -> None:
        parcel = self._receives.get(tag)
        if parcel is None:
            self._offers.add(tag)
        elif parcel.memory.size <= self._wire.eager_bytes:
            self._wire.tell(self.rank, NoteKind.READY, tag, parcel.memory.size, _NOTHING)

    def _put(self, parcel: Parcel, room: int, place: Bytes, told_bytes: int | None = None) -> None:
        count = min(room, parcel.memory.size) if room > self._wire.eager_bytes else 0
        self._wire.put(parcel, count, place, parcel.memory.size if told_bytes is None else told_bytes)

    def _take(self, parcel: Parcel, message: Bytes) -> None:
        if message.size == parcel.memory.size:
            parcel.memory[:] = message
        self._conclude(parcel, message.size)

    def _conclude(self, parcel: Parcel, num_bytes: int) -> None:
        if num_bytes == parcel.memory.size:
            parcel.finish()
        else:
            parcel.fail(partial(wrong_size, self.rank, parcel.tag, parcel.memory.size, num_bytes))
        self._wire.settled()

    def _is_blocked(self, parcel: Parcel) -> bool:
        """Fail a parcel that can never be done."""
        if self._obstacle is not None:
            parcel.fail(self._obstacle)
        elif self.departure is not None:
            verb = "awaits from" if parcel.incoming else "sends to"
            parcel.fail(partial(peer_lost, self.rank, self._own_rank, parcel.tag, self.departure, verb, self._why))
        return parcel.settled

    def _fail_all(self) -> None:
        for parcel in (*self._sends.values(), *self._receives.values()):
            self._is_blocked(parcel)
            self._wire.withdraw(parcel)
        self._sends.clear()
        self._receives.clear()
        self._places.clear()
        self._offers.clear()
        self._wire.settled()


def part(talks: Iterable[Talk], look: Callable[[], object]) -> None:
    """Say BYE to all, and wait a moment until they have heard it, looking again and again.

    A connection that is closed with words of the other side unread takes back what that has not read either. Nobody
    waits for those that have not answered before.
    """
    known = [*talks]
    answering = [talk for talk in known if talk.is_heard]
    for talk in known:
        talk.say_goodbye()
    deadline = time.monotonic() + _GOODBYE_S
    while not all(talk.is_heard for talk in answering) and time.monotonic() < deadline:
        look()
