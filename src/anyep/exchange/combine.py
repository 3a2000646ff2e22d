"""Combine: say where the experts' outputs lie, pull every token's rows, sum them once in fp32, done.

::

    prepare      check                                                        alone: exchange/returning.py
    post         say where this rank's rows lie; small pairs' rows come along            lane "announcement"
    finish       read every token's rows where they lie, or in the eager slot, and sum
                 done, to the owners whose rows were read where they lie                 lane "rows"

The owner's call returns when all ranks have read its rows, so that it may write over them.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.errors import CapacityError
from anyep.exchange import ledger
from anyep.exchange.adding import add_tokens
from anyep.exchange.combine_across import CombineAcross, Entries, NearRows
from anyep.exchange.desk import Desk
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.event import Targets
from anyep.exchange.expelled import forget_rows_from
from anyep.exchange.frame import frame_of_combine
from anyep.exchange.handle import Combined
from anyep.exchange.opening import (
    BODY,
    STATUS,
    RefusedError,
    check_agreement,
    naming_handle,
)
from anyep.exchange.returning import NOWHERE, Loan, Returning, lend, lend_rows
from anyep.exchange.scatter import place, place_at
from anyep.exchange.straight_back import StraightBack
from anyep.machine.addresses import address_of
from anyep.transport.base import Place, Words

_NOTHING_LENT: Words = np.array([0, -1, 0, -1, 0], np.int64)
"""Dense or not; segment and offset of the rows; segment and offset of the weights; segment -1 for what is not lent."""


class Combine:
    """One combine of one rank: :meth:`post` lends or sends the outputs, :meth:`finish` sums and waits for readers."""

    label = "combine"
    _loans: tuple[Loan, ...] = ()
    _no_memory: CapacityError | None = None
    _moved_rows: NDArray[np.int32] | None = None
    _desk: Desk | None = None
    _straight: StraightBack | None = None
    _absent: list[int] | None = None
    _epoch = _frame = _limit_rows = 0
    _sent = 0, 0, 0

    def __init__(self, end: Endpoint, back: Returning) -> None:
        self._end = end
        self._back = back
        self._step = self.label
        self._expels = end.crowd.expels and back.handle.send.geometry.padded
        self._header = naming_handle(back.way.header, back.handle.epoch)

    def wants_background(self) -> bool:
        """Whether there are likely rows to be read where they lie; the padded layout never uses the background."""
        plan = self._back.handle.send
        if self._end.across is not None and not plan.geometry.padded:
            return True
        return not plan.geometry.padded and int(plan.numbers("rank_entries").max()) > self._limit_rows

    def may_answer(self) -> bool:
        """Whether an owner may wait until this rank has read."""
        return not self._back.handle.send.geometry.padded or self._end.across is not None

    def ready(self) -> bool:
        """Whether every rank's announcement is here."""
        return self._end.transport.arrived(self._end.lanes.open, self._epoch)

    def size_up(self) -> None:
        """Nothing is left to learn."""

    def targets(self) -> Targets:
        """Return where the sums go."""
        return Targets(x=self._back.out, topk_weights=self._back.weights_out)

    def post(self, epoch: int) -> None:
        """Say where the rows lie, and let those of small pairs come along."""
        end, back, way = self._end, self._back, self._back.way
        plan = back.handle.send
        desk = self._desk = end.desk(epoch)
        self._epoch, self._step, self._absent = epoch, f"{self.label} {epoch}", end.crowd.absent
        slots = end.return_slots(way.row_bytes, 0 if back.topk_weights is None else 4 * end.num_topk)
        frame = self._frame = frame_of_combine(end, plan.geometry, desk, slots)
        limit_rows = slots.limit_rows if way.wire == "none" else 0
        there = self._place()
        places = _NOTHING_LENT if there is None else np.array([0, there.segment, there.offset, -1, 0], np.int64)
        end.books.begin(frame, self._header, places, plan.first_addr, limit_rows, end.far_R)
        eager_rows, direct_rows, _, _, _, far_rows, self._limit_rows, _ = desk.tally.tolist()
        self._straight = None if end.across is None else StraightBack(end, end.across, back, epoch)
        straight_rows = 0 if self._straight is None else self._straight.open(desk.back)
        if eager_rows + straight_rows:
            self._send_back(desk)
        if there is None and direct_rows + far_rows - straight_rows:
            self._lend(desk)
        self._sent = eager_rows, direct_rows, far_rows
        end.announce(epoch, desk.places_RW, claim=self._expels)
        if self._straight is not None:
            self._straight.send()

    def _place(self) -> Place | None:
        """Return where all that is lent lies already, if it does."""
        back = self._back
        if back.way.wire != "none" or back.topk_weights is not None:
            return None
        return self._end.transport.locate(back.y.data_ptr(), back.y.nbytes)

    def finish(self) -> torch.Tensor | Combined:
        """Wait for all announcements, sum, and wait for the readers. Raises RefusedError, PeerLost and PeerTimeout."""
        end, back, desk = self._end, self._back, self._desk
        assert desk is not None, "it was posted"
        opened_RW = self._hear()
        self._find_rows(desk, opened_RW)
        moved, _, num_to, num_from, num_rows, *_ = desk.tally.tolist()
        if end.across is None:
            if back.handle.num_tokens:
                entries = _own_entries(back, self._rows(desk, moved))
                add_tokens(end, back, entries, desk.lent.addr, 0, back.handle.num_tokens)
        else:
            assert self._straight is not None
            self._rows(desk, moved)
            near = NearRows(tables=desk.lent, rows_TW=self._moved_or_placed(), straight=self._straight)
            crossing = CombineAcross(end, end.across, back, self._epoch, self._step)
            crossing.run(opened_RW, near, partial(add_tokens, end, back))
        if num_to:
            end.transport.post(end.lanes.done, self._epoch, desk.done_RW, desk.to_R[:num_to])
        if num_from:
            end.wait(end.lanes.done, self._epoch, self._step, desk.from_R[:num_from])
        if num_to:  # a lender that gave up on somebody may have written over what was just read
            end.transport.check(self._epoch, self._step)
        self._loans = ()  # kept until here: peers were reading them
        end.counters.combined(num_rows * back.way.row_bytes, self._sent, 2 if num_from else 1)
        return back.out if back.weights_out is None else Combined(x=back.out, topk_weights=back.weights_out)

    def _hear(self) -> Words:
        end = self._end
        opened_RW = (end.hear_or_expel if self._expels else end.hear)(self._epoch, self._step, self._header)
        if end.crowd.absent:
            end.crowd.expelled_since(self._absent or (), self._step, goes_on=self._expels)
            forget_rows_from(self._back.handle.send, end.crowd.absent)
        return opened_RW

    def _refuse(self, opened_RW: Words) -> None:
        try:
            check_agreement(self._header, opened_RW, self._step, self._no_memory)
        except RefusedError:
            if self._straight is not None:
                self._straight.retract()
            raise

    def _send_back(self, desk: Desk) -> None:
        """Copy rows, and weights, to the slots of their origins."""
        end, back, plan = self._end, self._back, self._back.handle.send
        bins = (end.num_ranks, plan.geometry.shape.num_recv_bins, plan.field("recv_rows"), plan.field("recv_start"))
        rows_slot, weights_slot = desk.back.addr
        if back.way.wire != "none":  # nothing is eager then
            assert self._straight is not None
            self._straight.encode()
            return
        end.kernels.pack(back.way.row_bytes, *bins, back.y.data_ptr(), rows_slot)
        if back.topk_weights is not None:
            end.kernels.pack(4 * end.num_topk, *bins, back.topk_weights.data_ptr(), weights_slot)

    def _lend(self, desk: Desk) -> None:
        """Put y and weights where peers can read them; without memory say so, and let all ranks refuse together."""
        end, back = self._end, self._back
        try:
            rows = lend_rows(end, back)
            weights = NOWHERE if back.topk_weights is None else lend(end, back.topk_weights)
        except CapacityError as error:
            self._no_memory = error
            desk.places_RW[:, STATUS] = back.y.nbytes
            return
        self._loans = rows, weights
        first = BODY + ledger.CAPACITY
        desk.places_RW[:, first : first + len(_NOTHING_LENT)] = [
            int(rows.dense),
            rows.place.segment,
            rows.place.offset,
            weights.place.segment,
            weights.place.offset,
        ]

    def _find_rows(self, desk: Desk, opened_RW: Words) -> None:
        """Learn where this rank's rows lie at their owners. Raises RefusedError."""
        end, ledger_addr, straight = self._end, self._back.handle.send.first_addr, self._straight
        far_R = end.far_R if straight is None else straight.far_R
        while True:
            bases_RS = end.bases.base_RS
            found = end.books.find_rows(
                self._frame, opened_RW, self._header, bases_RS, ledger_addr, self._limit_rows, far_R
            )
            if found == ledger.ALL_FOUND:
                break
            if found == ledger.DISAGREE:
                self._refuse(opened_RW)
            end.bases.look_up(end.transport, found >> 32, found & 0xFFFFFFFF)
        if straight is not None:
            straight.ask()
            straight.find(desk.lent)

    def _rows(self, desk: Desk, moved: int) -> int:
        """Return where it says where this rank's rows lie, int32 [T, W]: as the dispatch placed them, or moved."""
        end, plan = self._end, self._back.handle.send
        if not moved:
            place(end, plan)
            return plan.entry_row_addr
        self._moved_rows = np.empty(plan.num_tokens * plan.width, np.int32)
        rows_addr = address_of(self._moved_rows)
        place_at(end, plan, desk.starts_addr, rows_addr)
        return rows_addr

    def _moved_or_placed(self) -> NDArray[np.int32]:
        """Return what :meth:`_rows` has found, [T, W]."""
        plan = self._back.handle.send
        rows = self._moved_rows
        if rows is None:
            rows = plan.words(plan.entry_row_addr, plan.num_tokens * plan.width)
        return rows.reshape(plan.num_tokens, plan.width)


def _own_entries(back: Returning, rows_addr: int) -> Entries:
    return Entries(
        by_rank=int(back.way.reduce == "rank"), rank_addr=back.handle.send.entry_rank_addr, row_addr=rows_addr
    )
