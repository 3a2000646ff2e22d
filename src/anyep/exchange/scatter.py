"""Rows to where a peer table says: final places, or eager slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyep.exchange.endpoint import Endpoint
from anyep.exchange.outgoing import Outgoing
from anyep.layout.regions import RowBytes


@dataclass(frozen=True)
class Route:
    """Entries that rows follow (kernels/spec.py): W a token, a row for each (token, column) or for each rank."""

    width: int
    entry_rank_addr: int
    entry_row_addr: int
    by_expert: bool


def send_rows(end: Endpoint, out: Outgoing, route: Route, table_addr: Sequence[int], row: RowBytes) -> None:
    """Write x, scales and routing of all tokens; ``table_addr``: a peer table for each of a row's five parts.

    Splits tokens between threads where that pays.
    """
    x_table, scales_table, idx_table, weights_table, token_table = table_addr
    kernels, rows, plan = end.kernels, out.rows, out.plan
    entries = (route.width, route.entry_rank_addr, route.entry_row_addr)
    x_addr = rows.x.data_ptr()
    weights_addr = 0
    if out.topk_weights is not None and row.topk_weights:
        weights_addr = out.topk_weights.data_ptr()

    def tokens(first: int, last: int) -> None:
        if rows.quantise_from is not None:
            assert end.wire.scale_format is not None
            kernels.quantise_scatter(
                x_addr,
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
            kernels.scatter(x_addr, row.x, first, last, *entries, x_table)
        if rows.scales is not None:
            kernels.scatter(rows.scales.data_ptr(), row.scales, first, last, *entries, scales_table)
        kernels.scatter_routing(
            plan.topk_idx.data_ptr(),
            plan.topk_idx.itemsize,
            weights_addr,
            first,
            last,
            end.num_topk,
            route.width,
            int(route.by_expert),
            end.tables.rank_E.data_ptr(),
            end.tables.local_E.data_ptr(),
            route.entry_rank_addr,
            route.entry_row_addr,
            idx_table if row.topk_idx else 0,
            weights_table,
            token_table if row.token else 0,
        )
        kernels.fence()

    end.workers.over(plan.num_tokens, row.x * route.width, tokens)
