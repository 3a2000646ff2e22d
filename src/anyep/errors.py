"""What goes wrong in the world, as one tree; the caller's own mistakes are ``ValueError`` and ``TypeError``.

::

    AnyEPError
     ├── PeerError            another rank is at fault; carries .rank and .step
     │    ├── PeerLost        it died, or closed its buffer, while this rank needed it
     │    └── PeerTimeout     it is alive and silent for longer than timeout_s, and does not wait itself
     ├── CapacityError        memory or a fixed number of rows is too small for this call
     ├── ClosedError          the buffer was closed, or broke earlier (the cause is chained)
     └── Unavailable          asked for, and impossible here; says what is possible
"""

from __future__ import annotations

from collections.abc import Sequence


class AnyEPError(Exception):
    """Base of every error that AnyEP raises about the world."""


class PeerError(AnyEPError):
    """Another rank is at fault.

    ``ranks`` names every culprit in ascending order, ``step`` the operation and its half
    (for example ``"dispatch 12: rows"``; 12 counts all operations of the buffer, combines and barriers too).
    ``holders`` has the culprits' processes, by numbers that are the same in all buffers, so that the error of one can
    be told to the ranks of another; for a silent rank that waits in another buffer it has the one for which it waits
    there. ``()`` where that is not known.
    """

    def __init__(self, message: str, *, ranks: Sequence[int], step: str, holders: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
        self.step = step
        self.holders = tuple(holders)

    @property
    def rank(self) -> int:
        """The first culprit."""
        return self.ranks[0]


class PeerLost(PeerError):
    """A rank died, or closed its buffer, while this rank needed it."""


class PeerTimeout(PeerError):
    """A rank is alive and did not take part within ``timeout_s``."""


class CapacityError(AnyEPError):
    """Memory, or a fixed number of rows, is too small for this call."""


class ClosedError(AnyEPError):
    """The buffer was closed, or an earlier error ended it."""


class Unavailable(AnyEPError):
    """Asked for, and impossible on this machine or in this installation."""
