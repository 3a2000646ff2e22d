"""The second half of a dispatch, launched when all ranks have announced: places, peer tables, rows, padding."""

from __future__ import annotations

from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.landing import Landing
from anyep.exchange.device.plan import DevicePlan, address_of
from anyep.exchange.ledger import D_ALIGNMENT
from anyep.exchange.outgoing import Outgoing
from anyep.exchange.scatter import Route, send_rows


class SecondHalf:
    """One rank's launches, in order. Everything goes to the current stream."""

    def __init__(self, end: DeviceEndpoint, out: Outgoing, plan: DevicePlan, landing: Landing, epoch: int) -> None:
        self._end = end
        self._out = out
        self._plan = plan
        self._landing = landing
        self._board = (end.boards.board_addr(epoch), end.boards.message_bytes)
        self._ranks = (end.rank, end.num_ranks)
        self._shape = out.geometry.shape
        self._alignment = int(self._shape.dims[D_ALIGNMENT])
        begins = plan.field("gaps") + 4
        self._gaps = begins, begins + 4 * (self._shape.num_local + 1)
        """one behind each expert's rows, and after those the one behind the batch: begins, ends"""

    def settle(self, *, withdraws: bool) -> None:
        """Work out every place, and from it this rank's peer tables.

        ``withdraws``: leave nothing that others could stumble over if the batch is refused, as nobody will look before.
        """
        end, plan, shape, kernels = self._end, self._plan, self._shape, self._end.device.kernels
        experts, field = end.placement.num_experts, plan.field
        kernels.settle(
            *(*self._board, *self._ranks, experts, shape.num_local, end.tables.rank_addr, end.tables.local_addr),
            *(int(shape.by_expert), self._alignment, shape.block_rows, shape.static_rows, int(withdraws)),
            *(end.base_addr, plan.tables_addr, plan.summary_addr, end.faults.addr),
            *(field("send_start"), field("dense_start"), field("recv_rows"), field("recv_start"), field("counts")),
            *(field("block_start"), field("filled_rows"), *self._gaps),
            *(plan.source_addr if self._out.geometry.padded else (0, 0)),
            *(plan.num_tokens, plan.width, plan.idx_addr, plan.idx_bytes),
            *(plan.entry_rank_addr, plan.entry_slot_addr, plan.entry_row_addr),
        )

    def connect_cached(self, num_rows: int) -> None:
        """Only look up where peers' memory lies: places are those of the handle."""
        end, plan = self._end, self._plan
        end.device.kernels.connect(
            *(*self._board, end.num_ranks, end.base_addr, num_rows, plan.tables_addr, plan.summary_addr),
            *(end.faults.addr, 0, 0),
        )

    def send(self) -> None:
        """Write this rank's rows to their places."""
        end, out, plan, row = self._end, self._out, self._plan, self._out.geometry.row
        by_expert = int(self._shape.by_expert)
        if out.rows.scales is not None:
            final = Route(plan.width, plan.entry_rank_addr, plan.entry_row_addr, by_expert=by_expert)
            send_rows(end, out, final, plan.table_addr, row)
            return
        x_table, scales_table, idx_table, weights_table, token_table = plan.table_addr
        element = out.rows.quantise_from
        end.device.kernels.send(
            out.rows.x.data_ptr(),
            *((0, row.x, -1) if element is None else (int(element), end.hidden, end.scale_code)),
            *(plan.num_tokens, plan.width, plan.entry_rank_addr, plan.entry_row_addr, x_table, scales_table),
            *(plan.idx_addr, plan.idx_bytes, address_of(out.topk_weights) if row.topk_weights else 0, end.num_topk),
            *(by_expert, end.tables.rank_addr, end.tables.local_addr),
            *(idx_table if row.topk_idx else 0, weights_table, token_table if row.token else 0),
        )

    def fill_gaps(self) -> None:
        """Define the rows of this rank's batch that nobody sends."""
        shape, (begins, ends) = self._shape, self._gaps
        behind_blocks = shape.num_local if shape.by_expert and not shape.block_rows and self._alignment > 1 else 0
        first = 4 * (0 if behind_blocks else shape.num_local)
        num_gaps = behind_blocks + (shape.static_rows >= 0)
        if num_gaps:
            parts = zip(self._landing.parts, self._out.geometry.row.parts(), strict=True)
            where = [number for tensor, row_bytes in parts for number in (address_of(tensor), row_bytes)]
            self._end.device.kernels.fill_gaps(num_gaps, begins + first, ends + first, *where)
