"""Dispatch: announce, offer, write every row straight to its final place, done.

::

    prepare      check, route                     alone: exchange/outgoing.py
    announce     counts to every rank             lane "announcement"
    offer        receivers cut the final tensors  lane "offer"
    scatter      rows to their final places
    done                                          lane "rows"

A cached dispatch knows the counts: its announcement is already the offer.
"""

from __future__ import annotations

import numpy as np
import torch

from anyep.errors import CapacityError
from anyep.exchange.endpoint import OFFER_WORDS, Endpoint
from anyep.exchange.handle import Handle, Received, SendPlan
from anyep.exchange.opening import (
    BODY,
    LAYOUT_CODES,
    Kind,
    Opening,
    RefusedError,
    check_agreement,
    check_memory,
    message,
)
from anyep.exchange.outgoing import Outgoing
from anyep.exchange.receive import Landing, cut_landing, finish
from anyep.layout.arrival import Arrival, compact_arrival, expert_arrival
from anyep.transport.base import Words


def dispatch(end: Endpoint, epoch: int, out: Outgoing, *, buffer: object) -> Received:
    """Run the protocol. Collective; raises RefusedError where all ranks refuse, PeerLost and PeerTimeout."""
    if out.cached is not None:
        return _dispatch_cached(end, epoch, out, out.cached)
    step = f"dispatch {epoch}"
    opening = _opening(out, Kind.DISPATCH)
    announced_RW = end.exchange(end.lanes.open, epoch, _announcement(end, opening, out.plan), step)
    check_agreement(opening, announced_RW, step)
    arrival = _plan_arrival(end, announced_RW, out)
    landing, offer_RW = _make_offer(end, arrival, out)
    offers_RW = end.exchange(end.lanes.offer, epoch, offer_RW, step)
    _check_offers(offers_RW, out.static_rows, step)
    assert landing is not None, "a rank without memory reports it in its offer"
    _place(end, offers_RW, out.plan)
    handle = Handle(
        buffer=buffer,
        epoch=epoch,
        layout=out.layout,
        send=out.plan,
        arrival=arrival,
        has_weights=out.topk_weights is not None,
        static_rows=out.static_rows,
    )
    end.counters.dispatches += 1
    return _deliver(end, epoch, out, offers_RW[:, :OFFER_WORDS], landing, handle, step)


def _dispatch_cached(end: Endpoint, epoch: int, out: Outgoing, handle: Handle) -> Received:
    step = f"cached dispatch {epoch}"
    opening = _opening(out, Kind.CACHED_DISPATCH)
    landing, offer_RW = _make_offer(end, handle.arrival, out)
    words_RW = message(opening, end.num_ranks, OFFER_WORDS, status=int(offer_RW[0, 0]))
    words_RW[:, BODY:] = offer_RW[:, :OFFER_WORDS]
    opened_RW = end.exchange(end.lanes.open, epoch, words_RW, step)
    check_agreement(opening, opened_RW, step)
    assert landing is not None, "a rank without memory reports it in its status"
    end.counters.cached_dispatches += 1
    return _deliver(end, epoch, out, opened_RW[:, BODY : BODY + OFFER_WORDS], landing, handle, step)


def _opening(out: Outgoing, kind: Kind) -> Opening:
    return Opening(
        kind=kind,
        layout=LAYOUT_CODES[out.layout],
        idx_bytes=out.plan.topk_idx.itemsize,
        has_weights=int(out.topk_weights is not None),
        static_rows=-1 if out.static_rows is None else out.static_rows,
        handle_epoch=-1 if out.cached is None else out.cached.epoch,
    )


def _announcement(end: Endpoint, opening: Opening, plan: SendPlan) -> Words:
    words_RW = message(opening, end.num_ranks, 1 + end.placement.max_local_experts)
    words_RW[:, BODY] = plan.rank_rows.numpy()
    placement = end.placement
    words_RW[placement.expert_rank_E, BODY + 1 + placement.expert_local_E] = plan.expert_rows.numpy()
    return words_RW


def _plan_arrival(end: Endpoint, announced_RW: Words, out: Outgoing) -> Arrival:
    local = int(end.placement.experts_per_rank_R[end.rank])
    expert_rows_RL = announced_RW[:, BODY + 1 : BODY + 1 + local]
    if out.plan.by_expert:
        return expert_arrival(expert_rows_RL, alignment=end.expert_alignment, static_rows=out.static_rows)
    return compact_arrival(announced_RW[:, BODY], expert_rows_RL, static_rows=out.static_rows)


def _make_offer(end: Endpoint, arrival: Arrival, out: Outgoing) -> tuple[Landing | None, Words]:
    """Cut the final tensors and say where they lie; without memory say so, and let all ranks refuse together."""
    offer_RW = np.zeros((end.num_ranks, OFFER_WORDS + arrival.start_RB.shape[1]), np.int64)
    offer_RW[:, 1] = arrival.num_filled
    offer_RW[:, OFFER_WORDS:] = arrival.start_RB
    if out.static_rows is not None and arrival.num_filled > out.static_rows:
        return None, offer_RW
    try:
        landing = cut_landing(end, arrival, out.plan.topk_idx.dtype, has_weights=out.topk_weights is not None)
    except CapacityError:
        offer_RW[:, 0] = end.row.x * arrival.num_rows
        return None, offer_RW
    offer_RW[:, 2:OFFER_WORDS] = landing.places()
    return landing, offer_RW


def _check_offers(offers_RW: Words, static_rows: int | None, step: str) -> None:
    check_memory(offers_RW[:, 0], step)
    if static_rows is None or int(offers_RW[:, 1].max()) <= static_rows:
        return
    over = ", ".join(
        f"rank {rank} would receive {int(offers_RW[rank, 1])}" for rank in np.flatnonzero(offers_RW[:, 1] > static_rows)
    )
    raise RefusedError(
        CapacityError(f"{step}: static_rows={static_rows} is too small: {over}; raise static_rows or send fewer tokens")
    )


def _place(end: Endpoint, offers_RW: Words, plan: SendPlan) -> None:
    """Turn slots into rows, now that every receiver has said where this rank's rows begin."""
    if plan.by_expert:
        placement = end.placement
        starts = offers_RW[placement.expert_rank_E, OFFER_WORDS + placement.expert_local_E]
    else:
        starts = offers_RW[:, OFFER_WORDS]
    start = torch.from_numpy(starts.astype(np.int32))
    end.kernels.place(
        plan.entry_rank.data_ptr(),
        plan.entry_row.data_ptr(),
        plan.num_tokens,
        plan.width,
        plan.topk_idx.data_ptr(),
        plan.topk_idx.itemsize,
        int(plan.by_expert),
        start.data_ptr(),
        plan.entry_row.data_ptr(),
    )


def _deliver(
    end: Endpoint, epoch: int, out: Outgoing, places_RW: Words, landing: Landing, handle: Handle, step: str
) -> Received:
    _scatter(end, out, places_RW)
    landing.fill_gaps(end, handle.arrival)
    rows_sent = out.plan.rank_rows.numpy()
    end.exchange(end.lanes.done, epoch, rows_sent.astype(np.int64)[:, None], step)
    end.counters.sent(landing.row_bytes(end.row), int(rows_sent.sum()), handle.num_rows)
    return finish(end, landing, handle)


def _scatter(end: Endpoint, out: Outgoing, places_RW: Words) -> None:
    places_WR = places_RW[:, 2:OFFER_WORDS].T  # segment, x, scales, segment, topk_idx, weights: see Landing.places
    table = end.peer_tables(places_WR[[0, 0, 3, 3]], places_WR[[1, 2, 4, 5]])
    x_table, scales_table, idx_table, weights_table = (table[column] for column in range(4))
    plan, rows, tables = out.plan, out.rows, end.tables
    entries = (plan.width, plan.entry_rank.data_ptr(), plan.entry_row.data_ptr())

    def rows_of(first: int, last: int) -> None:
        if rows.quantise_from is not None:
            assert end.wire.scale_format is not None
            end.kernels.quantise_scatter(
                rows.x.data_ptr(),
                int(rows.quantise_from),
                end.hidden,
                int(end.wire.scale_format),
                first,
                last,
                *entries,
                x_table,
                scales_table,
            )
        else:
            end.kernels.scatter(rows.x.data_ptr(), end.row.x, first, last, *entries, x_table)
        if rows.scales is not None:
            end.kernels.scatter(rows.scales.data_ptr(), end.row.scales, first, last, *entries, scales_table)
        end.kernels.scatter_routing(
            plan.topk_idx.data_ptr(),
            plan.topk_idx.itemsize,
            0 if out.topk_weights is None else out.topk_weights.data_ptr(),
            first,
            last,
            end.num_topk,
            plan.width,
            int(plan.by_expert),
            tables.rank_E.data_ptr(),
            tables.local_E.data_ptr(),
            plan.entry_rank.data_ptr(),
            plan.entry_row.data_ptr(),
            idx_table,
            weights_table,
            0,
        )
        end.kernels.fence()

    end.workers.over(plan.num_tokens, end.row.x * plan.width, rows_of)
