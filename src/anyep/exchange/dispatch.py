"""Dispatch: announce all counts to all, write rows straight to their final places, done.

::

    prepare      check, route                     alone: exchange/outgoing.py
    post         announce counts, and where a batch may be put; small pairs' rows come along      lane "announcement"
    finish       everybody works out every place                                                exchange/settle.py
                 where the memory that was offered is too small, offer again                      lane "offer"
                 rows to their final places; rows that came along are unpacked
                 done, from those whose rows did not come along                                    lane "rows"

A cached dispatch knows the counts: it announces where its batch may be put, and nothing else.
"""

from __future__ import annotations

from dataclasses import replace

from anyep.errors import CapacityError
from anyep.exchange import ledger
from anyep.exchange.dispatch_across import DispatchAcross
from anyep.exchange.endpoint import Desk, Endpoint
from anyep.exchange.event import Targets
from anyep.exchange.handle import Handle, Received, SendPlan
from anyep.exchange.opening import BODY, Kind, RefusedError, check_agreement, check_memory
from anyep.exchange.outgoing import Outgoing
from anyep.exchange.recall import announced_counts
from anyep.exchange.receive import (
    NO_PLACES,
    Ahead,
    Batch,
    Landing,
    cut_landing,
    fill_gaps,
    look_ahead,
    prepare_landing,
    settle_down,
    wrap,
)
from anyep.exchange.rows_near import RowsNear
from anyep.exchange.scatter import Route, place, send_rows
from anyep.layout.regions import row_region
from anyep.layout.trace_file import TraceRecorder
from anyep.transport.base import Words


class Dispatch:
    """One dispatch of one rank: :meth:`post` sends what needs no answer, :meth:`finish` does the rest."""

    def __init__(
        self,
        end: Endpoint,
        out: Outgoing,
        *,
        buffer: object,
        recorder: TraceRecorder | None = None,
        early: bool = False,
    ) -> None:
        """``early``: the caller hands the batch's tensors on before it is finished (padded layout)."""
        self._end = end
        self._recorder = recorder
        self._out = out
        self._buffer = buffer
        self.label = "dispatch" if out.cached is None else "cached dispatch"
        self._step = self.label
        self._epoch = 0
        self._geometry = out.geometry
        self._landing: Landing | None = None
        self._eager_rows = self._direct_rows = self._far_rows = 0
        self._far: DispatchAcross | None = None
        self._early = early and out.geometry.padded
        self._ahead: Ahead | None = None
        self._header = self._geometry.header if out.cached is None else self._cached_header(out.cached)

    def _cached_header(self, handle: Handle) -> Words:
        return self._end.handle_header(
            handle.epoch,
            kind=Kind.CACHED_DISPATCH,
            **self._geometry.agreed,
        )

    def wants_background(self) -> bool:
        """Whether rows are left to be sent when peers have answered; low latency never computes behind one's back."""
        return self._direct_rows + self._far_rows > 0 and not self._geometry.padded

    def may_answer(self) -> bool:
        """Whether a peer may wait for this rank's second offer, or its rows."""
        return not self._geometry.padded or self._end.across is not None

    def ready(self) -> bool:
        """Whether every rank's announcement is here."""
        return self._end.transport.arrived(self._end.lanes.open, self._epoch)

    def targets(self) -> Targets | None:
        """Return the tensors of the batch, where they were made early."""
        if self._ahead is None:
            return None
        batch, turned = self._ahead
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
        self._epoch, self._step = epoch, f"{self.label} {epoch}"
        rows = geometry.expected_rows(plan.num_tokens) if cached is None else cached.num_rows
        landing = self._landing = prepare_landing(end, geometry, rows)
        if self._early and landing is not None:
            self._ahead = look_ahead(end, geometry, landing)
        words_RW = desk.words_RW if cached is None else desk.places_RW
        end.books.announce(
            words_RW,
            self._header,
            NO_PLACES if landing is None else landing.places,
            plan.field("rank_rows"),
            end.num_ranks + end.placement.num_experts + 1 if cached is None else 0,
            plan.field("rank_rows"),
            geometry.limit_rows,
            desk.send_slots_R,
            geometry.slot_offsets,
            desk.eager.values,
            end.far_R if plan.crossing is None else plan.crossing.far_tokens_R,
            desk.tally,
        )
        self._eager_rows, self._direct_rows, *_, self._far_rows = desk.tally.tolist()
        if end.across is not None:
            self._far = DispatchAcross(end, end.across, self._out, epoch)
        straight = self._far is not None and self._far.open(desk.eager)
        if self._eager_rows or straight:
            slots = Route(plan.compact_width, plan.compact_rank_addr, plan.compact_slot_addr, by_expert=0)
            send_rows(end, self._out, slots, desk.eager.addr, geometry.eager_row)
        end.announce(epoch, words_RW)
        if self._far is not None:
            self._far.begin()

    def finish(self) -> Received:
        """Wait for all announcements, send and receive the rows. Raises RefusedError, PeerLost and PeerTimeout."""
        try:
            return self._finish()
        except RefusedError:
            if self._far is not None:
                self._far.retract()
            raise

    def _finish(self) -> Received:
        end, out = self._end, self._out
        plan, desk = out.plan, end.desk(self._epoch)
        opened_RW = end.hear(self._epoch, self._step, self._header)
        if not end.books.agree(opened_RW, self._header):
            check_agreement(self._header, opened_RW, self._step)
        offered_RW, offer = (opened_RW, BODY) if self._settle(opened_RW) else (self._offer_again(desk), 0)
        landing = self._landing
        assert landing is not None, "a rank without memory reports it in its offer"
        self._connect(desk, opened_RW, offered_RW, offer)
        came_rows, _, _, num_from, num_rows, _ = desk.tally.tolist()
        self._landing = None
        self._geometry.note_rows(num_rows)
        written = bool(self._direct_rows or num_from)
        if self._ahead is None:
            batch, turned = settle_down(end, self._geometry, landing, num_rows, written=written), None
        else:
            batch, turned = self._ahead
        if self._far is not None:
            self._cross(desk, opened_RW, offered_RW, offer)
        elif self._direct_rows:
            send_rows(end, out, self._final_route(), desk.direct.addr, self._geometry.row)
            self._say_done(desk)
        if came_rows:
            self._unpack(desk, batch)
        fill_gaps(end, self._geometry, plan, batch)
        if num_from:
            end.wait(end.lanes.done, self._epoch, self._step, desk.from_R[:num_from])
        if self._recorder is not None and out.cached is None:
            self._recorder.add(plan.topk_idx(), out.topk_weights)
        end.counters.dispatched(self._eager_rows, self._direct_rows, self._far_rows, num_rows, out)
        handle = self._handle(num_rows, opened_RW) if out.cached is None else self._known(out.cached)
        return wrap(end, batch, handle, self._geometry, turned)

    def _final_route(self) -> Route:
        plan = self._out.plan
        place(self._end, plan)
        return Route(plan.width, plan.entry_rank_addr, plan.entry_row_addr, by_expert=int(self._geometry.by_expert))

    def _say_done(self, desk: Desk) -> None:
        """Tell those to whom this rank wrote, if there are any."""
        if num_to := int(desk.tally[ledger.NUM_TO]):
            self._end.transport.post(self._end.lanes.done, self._epoch, desk.done_RW, desk.to_R[:num_to])

    def _known(self, handle: Handle) -> Handle:
        """Return the handle of a cached dispatch, with its own weights where combine will want them."""
        if self._out.topk_weights is None or not self._geometry.padded:
            return handle
        return replace(handle, topk_weights=self._out.topk_weights.clone())

    def _handle(self, num_rows: int, opened_RW: Words) -> Handle:
        end, plan, out = self._end, self._out.plan, self._out
        shape = self._geometry.shape
        padded = self._geometry.padded
        return Handle(
            buffer=self._buffer,
            epoch=self._epoch,
            layout=out.layout,
            send=plan,
            num_rows=num_rows,
            shape=(shape.num_local, shape.block_rows) if padded else (num_rows,),
            counts=plan.numbers("counts").tolist(),
            topk_weights=out.topk_weights.clone() if padded and out.topk_weights is not None else None,
            proxies=() if self._far is None else self._far.proxies,
            straight_from=() if self._far is None else self._far.straight_from,
            announced=announced_counts(opened_RW, end.num_ranks + end.placement.num_experts) if end.wire.raw else None,
        )

    def _cross(self, desk: Desk, opened_RW: Words, offered_RW: Words, offer: int) -> None:
        """Let rows cross to and from other hosts, and write to this host's ranks meanwhile."""
        assert self._far is not None
        self._connect(desk, opened_RW, offered_RW, offer, forward=True)
        near = None
        if self._direct_rows:
            route = self._final_route()
            near = RowsNear(self._end, self._out, route, desk.direct.addr, then=lambda: self._say_done(desk))
        self._far.cross(opened_RW, desk, near, self._step)

    def _settle(self, opened_RW: Words) -> bool:
        """Work out every place; False where a rank has to offer more memory. Raises RefusedError, on all ranks."""
        end, plan = self._end, self._out.plan
        if self._out.cached is not None:
            return bool((opened_RW[:, BODY + ledger.CAPACITY] >= plan.numbers("batch_rows")).all())
        shape = self._geometry.shape
        found = end.books.settle(
            opened_RW,
            BODY,
            shape.dims,
            shape.offsets,
            end.tables.rank_addr,
            end.tables.local_addr,
            plan.first_addr,
            end.counters.rows_by_source,
            end.counters.rows_by_expert,
        )
        if found == ledger.STATIC_TOO_SMALL:
            raise RefusedError(CapacityError(self._too_many_rows(plan)))
        if found == ledger.BLOCK_TOO_SMALL:
            raise RefusedError(CapacityError(self._too_many_for_an_expert()))
        return bool(found == ledger.SETTLED)

    def _too_many_rows(self, plan: SendPlan) -> str:
        limit = self._geometry.shape.static_rows
        rows = plan.numbers("filled_rows").tolist()
        over = ", ".join(f"rank {rank} would receive {n}" for rank, n in enumerate(rows) if n > limit)
        return f"{self._step}: static_rows={limit} is too small: {over}; raise static_rows or send fewer tokens"

    def _too_many_for_an_expert(self) -> str:
        rows = self._geometry.shape.block_rows
        return (
            f"{self._step}: an expert would receive more than R * max_tokens_per_rank = {rows} rows, which a block of "
            "the padded layout holds: topk_idx names one expert twice for a token; name each once, or use "
            "layout='expert'"
        )

    def _offer_again(self, desk: Desk) -> Words:
        """Where somebody's memory was too small all ranks offer again, and refuse together if there is none."""
        end, plan = self._end, self._out.plan
        needed = int(plan.numbers("batch_rows")[end.rank])
        desk.offers_RW[:, 0] = 0
        no_memory: CapacityError | None = None
        if self._landing is None or self._landing.capacity < needed:
            self._landing = None
            try:
                self._landing = cut_landing(end, self._geometry, needed)
            except CapacityError as error:
                no_memory = error
                desk.offers_RW[:, 0] = max(1, row_region(self._geometry.row, needed).data_bytes)
        if self._landing is not None:
            desk.offers_RW[:, 1:] = self._landing.places
        end.transport.post(end.lanes.offer, self._epoch, desk.offers_RW, end.crowd.present)
        offers_RW: Words = end.wait(end.lanes.offer, self._epoch, self._step, end.crowd.present).copy()
        offers_RW[end.crowd.absent] = 0
        check_memory(offers_RW[:, 0], self._step, no_memory)
        end.counters.add(second_offers=1)
        return offers_RW

    def _connect(self, desk: Desk, opened_RW: Words, offered_RW: Words, offer: int, *, forward: bool = False) -> None:
        """Fill the peer tables: of rows that this rank sends, or (``forward``) of every place on this host."""
        end, plan = self._end, self._out.plan
        while True:
            unknown = end.books.connect(
                opened_RW,
                BODY,
                offered_RW,
                offer,
                end.bases.base_RS,
                self._geometry.part_bytes,
                end.rank,
                -1 if forward else self._geometry.limit_rows,
                plan.field("rank_rows"),
                plan.field("batch_rows"),
                desk.recv_slots_R,
                plan.field("source_rows"),
                self._geometry.slot_offsets,
                desk.forwarded.values if forward else desk.direct.values,
                desk.spare.values if forward else desk.arrived.values,
                desk.spare_R if forward else desk.to_R,
                desk.spare_R if forward else desk.from_R,
                end.far_R,
                desk.spare_tally if forward else desk.tally,
            )
            if unknown < 0:
                return
            end.bases.look_up(end.transport, unknown >> 32, unknown & 0xFFFFFFFF)

    def _unpack(self, desk: Desk, batch: Batch) -> None:
        """Bring rows that came along to their final places."""
        end, plan, arrived = self._end, self._out.plan, desk.arrived.addr
        rows, starts = plan.field("source_rows"), plan.field("recv_start")
        if not self._geometry.by_expert:
            for part_bytes, packed, base in zip(self._geometry.part_sizes, arrived, batch.part_addr, strict=True):
                if base:
                    end.kernels.unpack(part_bytes, end.num_ranks, rows, starts, packed, base)
            return
        eager = self._geometry.eager_row
        end.kernels.expand(
            eager.x,
            eager.scales,
            end.num_topk,
            plan.idx_bytes,
            end.num_ranks,
            self._geometry.shape.num_local,
            rows,
            starts,
            desk.starts_addr,
            arrived[0],
            arrived[1] if eager.scales else 0,
            arrived[2],
            arrived[3] if eager.topk_weights else 0,
            arrived[4] if eager.token else 0,
            *batch.part_addr,
        )
