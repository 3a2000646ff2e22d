"""Dispatch: announce all counts to all, write rows straight to their final places, done.

::

    prepare      check, route                     alone: exchange/outgoing.py
    post         announce counts, and where a batch may be put; small pairs' rows come along      lane "announcement"
    finish       everybody works out every place                                                exchange/settle.py
                 where the memory that was offered is too small, offer again      lane "offer", exchange/offering.py
                 rows to their final places; rows that came along are unpacked
                 done, from those whose rows did not come along                                    lane "rows"

A cached dispatch knows the counts: it announces where its batch may be put, and nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from anyep.exchange.desk import Desk
from anyep.exchange.dispatch_across import DispatchAcross
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.event import Targets
from anyep.exchange.expelled import forget_rows_to
from anyep.exchange.frame import frame_of_dispatch
from anyep.exchange.handle import Handle, Received
from anyep.exchange.offering import offer_again
from anyep.exchange.opening import BODY, RefusedError
from anyep.exchange.outgoing import Outgoing
from anyep.exchange.places import connect, size_up
from anyep.exchange.recall import announced_counts, number_of
from anyep.exchange.receive import (
    NO_PLACES,
    Ahead,
    Batch,
    Landing,
    fill_gaps,
    look_ahead,
    prepare_landing,
    settle_down,
    unpack,
    wrap,
)
from anyep.exchange.remembered import handle_again, header_of, weights_for_combine
from anyep.exchange.rows_near import RowsNear
from anyep.exchange.scatter import Route, place, send_rows
from anyep.layout.trace_file import TraceRecorder
from anyep.transport.base import Words


class _Sized(NamedTuple):
    """What is known when every rank has announced."""

    batch: Batch
    turned: torch.Tensor | None
    """room for a padded batch's scales, where it was made early"""
    handle: Handle
    tally: list[int]
    """the desk's, NUM_TALLY numbers (exchange/ledger.py)"""
    opened_RW: Words
    """the announcements"""


class Dispatch:
    """One dispatch of one rank: :meth:`post` sends what needs no answer, :meth:`finish` does the rest."""

    _landing: Landing | None = None
    _ahead: Ahead | None = None
    _far: DispatchAcross | None = None
    _desk: Desk | None = None
    _sized: _Sized | None = None
    _absent: list[int] | None = None
    _epoch = _frame = _eager_rows = _direct_rows = _far_rows = _limit_rows = 0

    def __init__(
        self,
        end: Endpoint,
        out: Outgoing,
        *,
        buffer: object,
        recorder: TraceRecorder | None = None,
        early: bool = False,
    ) -> None:
        """``early``: the caller hands the batch's tensors on before it is finished, where its size is known."""
        self._end = end
        self._recorder = recorder
        self._out = out
        self._buffer = buffer
        self.label = "dispatch" if out.cached is None else "cached dispatch"
        self._step = self.label
        self._geometry = out.geometry
        self._early = early and (out.geometry.padded or out.cached is not None)
        self._expels = end.crowd.expels and out.geometry.padded and out.cached is None
        self._header = header_of(out)

    def wants_background(self) -> bool:
        """Whether rows are left to be sent when peers have answered; the padded layout never uses the background."""
        return self._direct_rows + self._far_rows > 0 and not self._geometry.padded

    def may_answer(self) -> bool:
        """Whether a peer may wait for this rank's second offer, or its rows."""
        return not self._geometry.padded or self._end.across is not None

    def ready(self) -> bool:
        """Whether every rank's announcement is here."""
        return self._end.transport.arrived(self._end.lanes.open, self._epoch)

    def targets(self) -> Targets | None:
        """Return the tensors of the batch, where they were made early."""
        handle = self._out.cached
        if self._sized is not None:
            batch, turned = self._sized.batch, self._sized.turned
            if self._end.across is None:  # between hosts it lacks, until this is finished, for whom this rank forwards
                handle = self._sized.handle
        elif self._ahead is not None:
            batch, turned = self._ahead
        else:
            return None
        if not self._geometry.padded:
            return Targets(
                x=batch.x,
                scales=batch.scales,
                source_token=batch.source_token,
                topk_idx=batch.topk_idx,
                topk_weights=batch.topk_weights,
                handle=handle,
            )
        shape = (self._geometry.shape.num_local, self._geometry.shape.block_rows)
        assert batch.source_token is not None
        return Targets(
            x=batch.x.view(*shape, self._end.hidden),
            scales=None if turned is None else turned.transpose(1, 2),
            source_token=batch.source_token.view(shape),
        )

    def post(self, epoch: int) -> None:
        """Announce, and let the rows of small pairs come along."""
        end, plan, cached = self._end, self._out.plan, self._out.cached
        geometry, desk = self._geometry, end.desk(epoch)
        self._desk = desk
        self._epoch, self._step, self._absent = epoch, f"{self.label} {epoch}", end.crowd.absent
        rows = geometry.expected_rows(plan.num_tokens) if cached is None else cached.num_rows
        landing = self._landing = prepare_landing(end, geometry, rows)
        if self._early and landing is not None:
            self._ahead = look_ahead(end, geometry, landing, rows)
        self._frame = frame_of_dispatch(end, geometry, desk, cached=cached is not None)
        end.books.begin(
            self._frame,
            self._header,
            NO_PLACES if landing is None else landing.places,
            plan.first_addr,
            geometry.limit_rows,
            end.far_R if plan.crossing is None else plan.crossing.far_tokens_R,
        )
        self._eager_rows, self._direct_rows, _, _, _, self._far_rows, self._limit_rows, _ = desk.tally.tolist()
        if end.across is not None:
            self._far = DispatchAcross(end, end.across, self._out, epoch)
        if (self._far is not None and self._far.open(desk.eager)) or self._eager_rows:
            slots = Route(plan.compact_width, plan.compact_rank_addr, plan.compact_slot_addr, by_expert=0)
            send_rows(end, self._out, slots, desk.eager.addr, geometry.eager_row)
        end.announce(epoch, desk.words_RW if cached is None else desk.places_RW, claim=self._expels)
        if self._far is not None:
            self._far.begin()

    def size_up(self) -> None:
        """Wait for all announcements, and work out every place. Raises RefusedError, PeerLost and PeerTimeout."""
        try:
            self._size_up()
        except RefusedError:
            if self._far is not None:
                self._far.retract()
            raise

    def _size_up(self) -> None:
        end, out, desk = self._end, self._out, self._desk
        assert desk is not None, "it was posted"
        opened_RW = self._hear()
        offered_RW, offer = opened_RW, BODY
        if not size_up(end, out, desk, self._frame, opened_RW, self._header, self._limit_rows, self._step):
            needed = int(out.plan.numbers("batch_rows")[end.rank])
            if self._landing is not None and self._landing.capacity < needed:
                self._landing = None  # its memory goes back before more is taken
            self._landing, offered_RW = offer_again(
                end, self._geometry, desk, self._landing, needed, self._epoch, self._step
            )
            offer = 0
            connect(end, out, desk, opened_RW, offered_RW, offer, limit_rows=self._limit_rows)
        if self._far is not None:
            connect(end, out, desk, opened_RW, offered_RW, offer, limit_rows=-1)  # for rows that are forwarded
        landing, self._landing = self._landing, None
        assert landing is not None, "a rank without memory reports it in its offer"
        tally = desk.tally.tolist()
        _, _, _, num_from, num_rows, *_ = tally
        self._geometry.note_rows(num_rows)
        written = bool(self._direct_rows or num_from)
        if self._ahead is None:
            batch, turned = settle_down(end, self._geometry, landing, num_rows, written=written), None
        else:
            batch, turned = self._ahead
        handle = handle_again(out) or self._handle(num_rows, opened_RW)
        self._sized = _Sized(batch, turned, handle, tally, opened_RW)

    def _hear(self) -> Words:
        end = self._end
        opened_RW = (end.hear_or_expel if self._expels else end.hear)(self._epoch, self._step, self._header)
        late = end.crowd.absent and end.crowd.expelled_since(self._absent or (), self._step, goes_on=self._expels)
        if late:
            forget_rows_to(end, self._out.plan, late, opened_RW)
        return opened_RW

    def finish(self) -> Received:
        """Size up if nobody has, send and receive the rows. Raises RefusedError, PeerLost and PeerTimeout."""
        if self._sized is None:
            self.size_up()
        sized, desk = self._sized, self._desk
        self._sized = None
        assert sized is not None
        assert desk is not None
        end, out, plan = self._end, self._out, self._out.plan
        handle = sized.handle
        came_rows, _, num_to, num_from, num_rows, _, _, num_gaps = sized.tally
        if self._far is not None:
            self._cross(self._far, desk, sized.opened_RW, num_to)
            if out.cached is None:
                crossed = self._far
                handle = replace(handle, proxies=crossed.proxies, straight_from=crossed.straight_from)
        elif self._direct_rows:
            send_rows(end, out, self._final_route(), desk.direct.addr, self._geometry.row)
            self._say_done(desk, num_to)
        if came_rows:
            unpack(end, self._geometry, plan, desk, sized.batch)
        if num_gaps:
            fill_gaps(end, self._geometry, plan, sized.batch, num_gaps)
        if num_from:
            end.wait(end.lanes.done, self._epoch, self._step, desk.from_R[:num_from])
        if self._recorder is not None and out.cached is None:
            self._recorder.add(plan.topk_idx(), out.topk_weights)
        rounds = 2 if num_from else 1
        sent_rows = self._eager_rows, self._direct_rows, self._far_rows
        end.counters.dispatched(out, sent_rows, num_rows, rounds)
        return wrap(end, sized.batch, handle, self._geometry, sized.turned)

    def _final_route(self) -> Route:
        plan = self._out.plan
        place(self._end, plan)
        return Route(plan.width, plan.entry_rank_addr, plan.entry_row_addr, by_expert=int(self._geometry.by_expert))

    def _say_done(self, desk: Desk, num_to: int) -> None:
        """Tell those to whom this rank wrote, if there are any."""
        if num_to:
            self._end.transport.post(self._end.lanes.done, self._epoch, desk.done_RW, desk.to_R[:num_to])

    def _handle(self, num_rows: int, opened_RW: Words) -> Handle:
        end, plan, out = self._end, self._out.plan, self._out
        shape, padded = self._geometry.shape, self._geometry.padded
        announced = announced_counts(opened_RW, end.num_counts) if end.wire.by_column else None
        return Handle(
            buffer=self._buffer,
            epoch=self._epoch if announced is None else number_of(announced),
            layout=out.layout,
            send=plan,
            num_rows=num_rows,
            shape=(shape.num_local, shape.block_rows) if padded else (num_rows,),
            counts=plan.numbers("counts").tolist(),
            topk_weights=weights_for_combine(out),
            announced=announced,
        )

    def _cross(self, crossing: DispatchAcross, desk: Desk, opened_RW: Words, num_to: int) -> None:
        """Exchange with other hosts, and write to this host's ranks meanwhile."""
        near = None
        if self._direct_rows:
            route = self._final_route()
            near = RowsNear(self._end, self._out, route, desk.direct.addr, then=lambda: self._say_done(desk, num_to))
        crossing.cross(opened_RW, desk, near, self._step)
