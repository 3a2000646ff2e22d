"""A rank's rows on their way, in one launch: to their final places, or to slots at every receiver."""

from __future__ import annotations

from collections.abc import Sequence

from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.plan import address_of
from anyep.exchange.outgoing import Outgoing
from anyep.exchange.scatter import Route, send_rows
from anyep.layout.regions import RowBytes


def send(end: DeviceEndpoint, out: Outgoing, route: Route, table_addr: Sequence[int], row: RowBytes) -> None:
    """Write rows of ``row``'s parts along ``route``; ``table_addr``: a peer table for each part."""
    if out.rows.scales is not None:
        send_rows(end, out, route, table_addr, row)
        return
    plan, element = out.plan, out.rows.quantise_from
    x_table, scales_table, idx_table, weights_table, token_table = table_addr
    end.device.kernels.send(
        out.rows.x.data_ptr(),
        *((0, row.x, -1) if element is None else (int(element), end.hidden, end.scale_code)),
        *(plan.num_tokens, route.width, route.entry_rank_addr, route.entry_row_addr, x_table, scales_table),
        *(plan.idx_addr, plan.idx_bytes, address_of(out.topk_weights) if row.topk_weights else 0, end.num_topk),
        *(route.by_expert, end.tables.rank_addr, end.tables.local_addr),
        *(idx_table if row.topk_idx else 0, weights_table, token_table if row.token else 0),
    )
