"""Rows to where a peer table says: final places, or eager slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from anyep.exchange.endpoint import Endpoint
from anyep.exchange.handle import SendPlan
from anyep.exchange.outgoing import Outgoing
from anyep.layout.regions import RowBytes


class Route(NamedTuple):
    """Entries that rows follow (kernels/spec.py): W a token, a row for each (token, column) or for each rank."""

    width: int
    entry_rank_addr: int
    entry_row_addr: int
    by_expert: int


def place(end: Endpoint, plan: SendPlan) -> None:
    """Work out the rows that entries have at their destinations, once."""
    if not plan.placed:
        place_at(end, plan, plan.field("send_start"), plan.entry_row_addr)
        plan.placed = True


def place_at(end: Endpoint, plan: SendPlan, starts_addr: int, row_addr: int) -> None:
    """Write rows int32 [T, W] to ``row_addr``: slots and where their bins start, int32 [B]."""
    end.kernels.place(
        plan.entry_rank_addr,
        plan.entry_slot_addr,
        plan.num_tokens,
        plan.width,
        plan.idx_addr,
        plan.idx_bytes,
        int(plan.geometry.by_expert),
        starts_addr,
        row_addr,
    )


def send_rows(end: Endpoint, out: Outgoing, route: Route, table_addr: Sequence[int], row: RowBytes) -> None:
    """Write x, scales and routing of all tokens; ``table_addr``: a peer table for each of a row's five parts."""
    send_some_rows(end, out, route, table_addr, row, 0, out.plan.num_tokens)


def send_some_rows(
    end: Endpoint, out: Outgoing, route: Route, table_addr: Sequence[int], row: RowBytes, begin: int, last: int
) -> None:
    """The same for tokens [begin, last). Splits them between threads where that pays."""
    if end.workers.num_threads == 1:
        _send_tokens(end, out, route, table_addr, row, begin, last)  # posting fences what this thread has written
        return

    def tokens(first: int, last: int) -> None:
        _send_tokens(end, out, route, table_addr, row, begin + first, begin + last)
        end.kernels.fence()

    end.workers.over(last - begin, row.x * route.width, tokens)


def _send_tokens(
    end: Endpoint, out: Outgoing, route: Route, table_addr: Sequence[int], row: RowBytes, first: int, last: int
) -> None:
    x_table, scales_table, idx_table, weights_table, token_table = table_addr
    width, entry_rank_addr, entry_row_addr, by_expert = route
    kernels, rows, plan = end.kernels, out.rows, out.plan
    if rows.quantise_from is not None:
        kernels.quantise_scatter(
            rows.x.data_ptr(),
            int(rows.quantise_from),
            end.hidden,
            end.scale_code,
            first,
            last,
            width,
            entry_rank_addr,
            entry_row_addr,
            x_table,
            scales_table,
        )
    else:
        kernels.scatter(rows.x.data_ptr(), row.x, first, last, width, entry_rank_addr, entry_row_addr, x_table)
    if rows.scales is not None:
        scales_addr = rows.scales.data_ptr()
        kernels.scatter(scales_addr, row.scales, first, last, width, entry_rank_addr, entry_row_addr, scales_table)
    kernels.scatter_routing(
        plan.idx_addr,
        plan.idx_bytes,
        out.topk_weights.data_ptr() if row.topk_weights and out.topk_weights is not None else 0,
        first,
        last,
        end.num_topk,
        width,
        by_expert,
        end.tables.rank_addr,
        end.tables.local_addr,
        entry_rank_addr,
        entry_row_addr,
        idx_table if row.topk_idx else 0,
        weights_table,
        token_table if row.token else 0,
    )
