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

from anyep.errors import PeerLost
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

    def expelled_since(self, absent: Collection[int], step: str, *, goes_on: bool) -> list[int]:
        """Return who was expelled since only ``absent`` were. PeerLost where an operation does not go on without them.

        An operation under way may have been announced to them, with rows.
        """
        late = [rank for rank in self.absent if rank not in absent]
        if late and not goes_on:
            raise PeerLost(
                f"{step}: rank {late[0]} was expelled by an earlier padded operation while this one was under way, and "
                "only those of layout='padded' that are not cached go on without a rank; close this buffer",
                ranks=late,
                step=step,
            )
        return late

    def _absent_with(self, rows_R: NDArray[np.int32]) -> list[int]:
        """Return the ranks that are left out for which there are rows: they took part when those were announced."""
        return [rank for rank in self.absent if rows_R[rank]]

    def check_routes(self, rows_R: NDArray[np.int32]) -> None:
        """Raise ValueError where a batch has rows for a rank that is left out."""
        if absent := self._absent_with(rows_R):
            raise ValueError(f"topk_idx names experts of rank {absent[0]}, which is left out: put -1 there")

    def check_handle(self, rows_R: NDArray[np.int32]) -> None:
        """Raise ValueError where rows of an earlier dispatch went to a rank that is left out, or came from it."""
        if absent := self._absent_with(rows_R):
            raise ValueError(
                f"rank {absent[0]} took part in this handle's dispatch and is left out now: dispatch again"
            )

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
