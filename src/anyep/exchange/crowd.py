"""Ranks that take no part any more: neither told nor waited for, as if they had nothing to send.

The ranks that are left must leave out the same ones between the same two operations; then all of them work out the same
places. A rank that is left out and still calls waits for the others in vain.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from anyep.exchange.ledger import CAPACITY, WAY
from anyep.exchange.opening import BODY
from anyep.transport.base import Words

_ROOM = 1 << 40
"""Whoever receives nothing has room for it."""


class Crowd:
    """Who takes part, in operations that begin from now on."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self.absent: list[int] = []
        self.present: Words | None = None
        """int64 [m]; None: every rank"""

    def leave_out(self, ranks: Collection[int]) -> None:
        """Replace the set of ranks that are left out."""
        self.absent = sorted(ranks)
        present = [rank for rank in range(self._num_ranks) if rank not in self.absent]
        self.present = np.array(present, np.int64) if self.absent else None

    def speak_for_absent(self, opened_RW: Words, header: Words) -> Words:
        """Return the announcements with those of absent ranks: the same operation, no rows, nothing to wait for."""
        heard_RW: Words = opened_RW.copy()
        heard_RW[self.absent] = 0
        heard_RW[self.absent, : len(header)] = header
        heard_RW[self.absent, BODY + WAY] = 1
        heard_RW[self.absent, BODY + CAPACITY] = _ROOM
        return heard_RW
