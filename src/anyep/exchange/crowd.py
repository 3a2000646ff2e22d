"""Ranks that take no part any more: neither told nor waited for, as if they had nothing to send.

The ranks that are left must leave out the same ones between the same two operations; then all of them work out the same
places. A rank that is left out and still calls waits for the others in vain.

Where a crowd *expels*, ranks that miss another's announcement of a padded operation go on without it. One word of that
rank decides (``transport/board.py``): either it says before it announces that it takes part, or the first who misses it
writes that it does not. So no two ranks can differ in who took part, however slow one of them is.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from anyep.exchange.ledger import CAPACITY, WAY
from anyep.exchange.opening import BODY
from anyep.transport.base import Transport, Words

_ROOM = 1 << 40
"""Whoever receives nothing has room for it."""


class Crowd:
    """Who takes part, in operations that begin from now on."""

    def __init__(self) -> None:
        self.absent: list[int] = []
        self.expels = False
        """whether padded operations go on without ranks that do not come"""
        self.expelled: set[int] = set()

    def leave_out(self, transport: Transport, ranks: Collection[int]) -> None:
        """Replace the set of ranks that are left out. ValueError where one is taken in that was expelled."""
        back = self.expelled.difference(ranks)
        if back:
            raise ValueError(f"rank {sorted(back)[0]} was expelled, and its buffer ended: make a new one on all ranks")
        self.absent = sorted(ranks)
        transport.leave_out(self.absent)

    def check_routes(self, rows_R: NDArray[np.int32]) -> None:
        """Raise ValueError where a batch has rows for a rank that is left out."""
        named = [rank for rank in self.absent if rows_R[rank]]
        if named:
            raise ValueError(f"topk_idx names experts of rank {named[0]}, which is left out: put -1 there")

    def expel(self, transport: Transport, ranks: Collection[int], epoch: int) -> bool:
        """Go on without ranks that have not begun ``epoch``; False if all of them have."""
        gone = [rank for rank in ranks if rank not in self.absent and transport.expel(rank, epoch)]
        self.expelled.update(gone)
        self.leave_out(transport, {*self.absent, *gone})
        return bool(gone)

    def speak_for_absent(self, opened_RW: Words, header: Words) -> Words:
        """Return the announcements with those of absent ranks: the same operation, no rows, nothing to wait for."""
        heard_RW: Words = opened_RW.copy()
        heard_RW[self.absent] = 0
        heard_RW[self.absent, : len(header)] = header
        heard_RW[self.absent, BODY + WAY] = 1
        heard_RW[self.absent, BODY + CAPACITY] = _ROOM
        return heard_RW
