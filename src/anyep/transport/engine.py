"""The seam to a network: messages of bytes between ranks of different hosts, matched by tag.

An engine moves bytes and knows nothing of tokens. Two verbs, both of which return at once: the message that one rank
sends to another under a tag arrives in the memory that the other gave for this sender and tag, whichever of the two
came first. Messages under different tags overtake each other freely, so that several operations may be in flight.

``anyep.testing.check_engine`` is the exam.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from anyep.errors import PeerError
from anyep.transport.liveness import Departure

Bytes = NDArray[np.uint8]
"""One-dimensional and contiguous."""
Failure = Callable[[], Exception]
"""Makes the error of a message that cannot come, anew for everyone who looks: one that is raised twice keeps the stacks
of those who looked, and with them the callers' tensors."""
NUM_TAGS = 1 << 30
"""Tags are 0 to NUM_TAGS - 1. One is free again when its message was sent and received."""


class Transfer(Protocol):
    """A message on its way. Its memory must not change (sent), or be read (received), before it is done."""

    rank: int
    """the other side"""

    def done(self) -> bool:
        """Return whether the memory belongs to the caller again. Never waits; once True, always True.

        Raises PeerLost, naming the other side, when the message cannot come any more.
        """
        ...


def has_come(transfer: Transfer) -> bool:
    """Return whether a message has come through; False too when it never will."""
    try:
        return transfer.done()
    except PeerError:
        return False


class Engine(Protocol):
    """One rank's access to the network. Made collectively by all ranks of a group."""

    name: str
    rank: int
    size: int
    sent_bytes: int
    """payload handed to the network so far; it only grows"""

    def send(self, rank: int, tag: int, memory: Bytes) -> Transfer:
        """Send ``memory`` to ``rank``. Raises ValueError for a rank or tag that is none, ClosedError."""
        ...

    def receive(self, rank: int, tag: int, memory: Bytes) -> Transfer:
        """Await a message of exactly ``memory.size`` bytes from ``rank``.

        A message of another size is an error that names both sizes (ValueError, when it is done).
        """
        ...

    def wait(self, transfers: Sequence[Transfer], timeout_s: float) -> None:
        """Return when one of ``transfers`` may be done, or after ``timeout_s``; without burning a core."""
        ...

    def flush(self, quiet_s: float, without: Collection[int] = ()) -> bool:
        """Wait until the other sides have heard all that was sent, or have left; return whether they have.

        Not for the ranks ``without``, which may never say so. Gives up when nothing has moved for ``quiet_s``. Before a
        close: what still waits to be sent goes with it.
        """
        ...

    def departures(self) -> Mapping[int, Departure]:
        """Return the ranks whose end the network has told of."""
        ...

    def describe(self) -> dict[str, str]:
        """Facts for ``explain()``: interfaces, devices, versions, window."""
        ...

    def close(self) -> None:
        """Give up what is under way and leave. Idempotent; waits for peers for 0.1 s at most."""
        ...
