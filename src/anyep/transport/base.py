"""The seam: a transport gives a rank memory that its peers can address, and lanes of words that say when.

An *arena* is a rank's memory: a heap that grows by segments. A *place* is (segment, offset), two integers that mean
the same on every rank; :meth:`Transport.address` turns a peer's place into an address here.

A *lane* is a ring of mailboxes, one for each (source rank, ring slot), each holding ``words`` int64. Lane slots
are used again after ``ring`` operations and nobody acknowledges: every operation awaits one message of its first lane
from every rank, so with F operations in flight no rank can be more than 2 F operations ahead of another, and a ring
of 2 F slots is never overwritten before it is read. On later lanes a message may go to some ranks only, and be awaited
from some: the first lane alone keeps ranks together.

Memory order, in one sentence: :meth:`Transport.post` fences (non-temporal stores too) and then publishes with release
order, :meth:`Transport.wait` acquires.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int64]
Ranks = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Lane:
    """A kind of message: at most ``words`` int64 from each rank to each rank per operation."""

    index: int
    name: str
    words: int


class Place(NamedTuple):
    """Where bytes lie in a rank's arena; the same integers on every rank.

    A tuple, for every allocation makes one and looks it up, which takes twice as long with a frozen dataclass.
    """

    segment: int
    offset: int


class Block(Protocol):
    """A piece of this rank's arena. It returns to the heap when the block and the last tensor cut from it are gone."""

    @property
    def place(self) -> Place: ...

    @property
    def address(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def memory(self) -> memoryview:
        """The writable bytes; whoever holds it (``torch.frombuffer``) keeps the block."""
        ...


@dataclass(frozen=True, kw_only=True)
class Blame:
    """Why this rank leaves: told to the peers, so that they name the culprit and not the messenger."""

    ranks: tuple[int, ...]
    timeout: bool


class Transport(Protocol):
    """How bytes move between the ranks of one group. ``anyep.testing.check_transport`` is the exam."""

    name: str
    rank: int
    size: int
    holders: Sequence[int]
    """A name by rank of the process, or thread, that it is: the same in all transports, however they number it."""
    waited_ns: Words
    """Nanoseconds [R] that :meth:`wait` has waited for each rank, in all: how long after a wait began the rank posted
    what was awaited. It only grows. A message carries the time at which it was posted, by the clock that a host's ranks
    share (CLOCK_MONOTONIC); between hosts, whose clocks differ, the time at which it arrived stands for it."""

    def allocate(self, num_bytes: int) -> Block:
        """Cut a block from this rank's arena, 128-byte aligned; the arena grows when it is full.

        Raises CapacityError with the sizes when the machine has no memory for it. 0 bytes are allowed.
        """
        ...

    def trim(self, block: Block, num_bytes: int) -> None:
        """Keep the first ``num_bytes`` of a block and give the rest back: for one cut before its size was known.

        Nothing may lie on the rest. Raises ValueError when the block is smaller than that.
        """
        ...

    def locate(self, address: int, num_bytes: int) -> Place | None:
        """Return where [address, address + num_bytes) lies in this rank's own arena, or None."""
        ...

    def address(self, rank: int, place: Place) -> int:
        """Return the address, in this process, of a place in ``rank``'s arena (mapped on first use).

        Raises PeerLost when that rank is gone, and its memory with it.
        """
        ...

    def post(self, lane: Lane, epoch: int, words: Words, ranks: Ranks | None = None) -> None:
        """Send row d of ``words`` (int64 [R, n], n <= lane.words) to rank d, for each d of ``ranks``.

        ``ranks``: int64 [m], distinct, possibly none; None: every rank, oneself included. Raises TypeError and
        ValueError, with nothing sent, for words or ranks of another dtype, shape or range.
        """
        ...

    def wait(self, lane: Lane, epoch: int, step: str, ranks: Ranks | None = None) -> Words:
        """Return what ``ranks`` (None: all) posted on ``lane`` for ``epoch``: int64 [R, lane.words], row s from rank s.

        Rows of other ranks hold anything. A view that is valid until the operation ends: then others may use its slots
        again. Waits without the GIL and without burning a core. Raises PeerLost or PeerTimeout, naming those of
        ``ranks`` that are missing (or whom they blame, or wait for themselves) and ``step``; Ctrl-C works.
        """
        ...

    def arrived(self, lane: Lane, epoch: int) -> bool:
        """Return whether :meth:`wait` for all ranks would return at once. Never waits."""
        ...

    def check(self, epoch: int, step: str) -> None:
        """Raise PeerLost or PeerTimeout if a rank that takes part has left because of an error, whatever it posted."""
        ...

    def leave_out(self, ranks: Collection[int]) -> None:
        """From the next operation on "every rank" means all but these, until called again; nothing they do matters.

        All ranks that are left say so between the same two operations. What a rank that was left out posts meanwhile
        is not heard; it may be taken in again if it has counted as many operations.
        """
        ...

    def claim(self, epoch: int) -> bool:
        """Say that this rank takes part in an operation from which a rank can be expelled; False where it has been.

        Only for ranks that share memory, as :meth:`expel`: Unavailable for others.
        """
        ...

    def expel(self, rank: int, epoch: int) -> bool:
        """Begin ``epoch`` without a rank that has not claimed it; False where it has. All get the same answer."""
        ...

    def leave(self, blame: Blame | None = None) -> None:
        """Tell the peers that nothing more will come, and why. Idempotent; does not wait for peers of this host.

        Between hosts it waits until that has been heard, as long as anything moves (transport/farewells.py).

        From then on every call raises ClosedError, and so does, within 100 ms, a wait that is under way in another
        thread of this rank. All memory stays mapped: such a thread may be copying to a peer. A peer that already has
        every message it waits for is not disturbed.
        """
        ...

    def close(self) -> None:
        """Leave, and free the arena once its last tensor is gone: when no thread works here any more. Idempotent."""
        ...

    def describe(self) -> dict[str, str]:
        """Facts for ``explain()``: memory committed, segments, how waits work here."""
        ...
