"""What two ranks of an engine tell each other, and one half of a message: the words of engine_talk.py."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple, Protocol

from anyep.transport.engine import Bytes, Failure


class NoteKind(IntEnum):
    EAGER = 0
    READY = 1
    OFFER = 2
    DONE = 3
    MISFIT = 4
    BYE = 5
    CREDIT = 6
    """for the wire alone: it only tells how many notes were heard"""
    ASK = 7
    HEARD = 8


class Note(NamedTuple):
    """``rest``: an eager message, or the place of a READY. It is valid until the note has been heard."""

    kind: NoteKind
    tag: int
    num_bytes: int
    rest: Bytes


class Wire(Protocol):
    """What the protocol needs of a network. Called with the lock of the talk held; nothing here waits."""

    eager_bytes: int
    """the largest message that travels inside a note; the same on all ranks"""

    def tell(self, rank: int, kind: NoteKind, tag: int, num_bytes: int, rest: Bytes) -> None:
        """Send a note. ``rest`` may change as soon as this returns."""
        ...

    def expose(self, parcel: Parcel) -> Bytes:
        """Let the other side put a message into ``parcel.memory``; return where that is, in the network's words."""
        ...

    def withdraw(self, parcel: Parcel) -> None:
        """The parcel is done, or never will be: let go of its memory."""
        ...

    def put(self, parcel: Parcel, count: int, place: Bytes, told_bytes: int) -> None:
        """Bring the first ``count`` bytes there, then tell DONE of ``told_bytes``; finish the parcel when they left."""
        ...

    def settled(self) -> None:
        """A parcel is done: wake who waits."""
        ...

    def look(self) -> None:
        """A chance to make progress, for networks on which nobody else does. Called without the lock."""
        ...


class Parcel:
    """One half of a message: see :class:`anyep.transport.engine.Transfer`."""

    def __init__(self, rank: int, tag: int, memory: Bytes, *, incoming: bool, look: Callable[[], None]) -> None:
        """``look``: a chance for the network to make progress."""
        self.rank = rank
        self.tag = tag
        self.memory = memory
        self.incoming = incoming
        self.finished = False
        self.failure: Failure | None = None
        self.registration: object = None
        """whatever the network keeps of the memory"""
        self._look = look

    def done(self) -> bool:
        if self.finished:
            return True
        self._look()
        if self.finished:
            return True
        if self.failure is not None:
            raise self.failure()
        return False

    @property
    def settled(self) -> bool:
        return self.finished or self.failure is not None

    def finish(self) -> None:
        if self.failure is None:
            self.finished = True

    def fail(self, failure: Failure) -> None:
        if not self.finished and self.failure is None:
            self.failure = failure
