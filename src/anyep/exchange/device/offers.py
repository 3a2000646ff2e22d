"""Second offers of memory, where the first were too small, for ranks whose calls one thread plays.

All ranks must offer again before any can go on, and each does so in its own ``wait()``. A thread that plays several
ranks is in the ``wait()`` of one of them, where nobody would ever answer. So who waits offers for all ranks of this
process whose calls the same thread has begun; they find it done when they are awaited. A rank that is a thread of its
own offers for itself alone, while others are at whatever they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple


class _Offer(NamedTuple):
    thread: int
    """who has begun the call"""
    act: Callable[[], None]
    """offers again, if that rank has not yet"""


class Offers:
    """The dispatches of all ranks of this process that may have to offer again."""

    def __init__(self) -> None:
        self._making = threading.RLock()
        self._open: dict[tuple[int, int], _Offer] = {}

    def enter(self, epoch: int, rank: int, act: Callable[[], None]) -> None:
        """Say that this thread has begun a rank's dispatch. ``act`` is called under one lock, once or more often."""
        with self._making:
            self._open[epoch, rank] = _Offer(threading.get_ident(), act)

    def make(self, epoch: int, rank: int) -> None:
        """Offer again for a rank, and for those that can only do so now. Raises what offering for it raised."""
        with self._making:
            thread = self._open[epoch, rank].thread
            for (other_epoch, other), offer in sorted(self._open.items()):
                if other_epoch == epoch and other != rank and offer.thread == thread:
                    offer.act()
            self._open[epoch, rank].act()

    def leave(self, epoch: int, rank: int) -> None:
        """Forget a dispatch that is over."""
        with self._making:
            del self._open[epoch, rank]
