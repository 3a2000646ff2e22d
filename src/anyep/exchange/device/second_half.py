"""The second half of a dispatch, launched when all ranks have announced: places, peer tables, rows, padding.

Rows go to their final places; or they have come to slots with the announcement, and blocks are made of them here.
"""

from __future__ import annotations

from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.landing import Landing
from anyep.exchange.device.plan import DevicePlan, address_of
from anyep.exchange.device.sending import send
from anyep.exchange.ledger import D_ALIGNMENT
from anyep.exchange.outgoing import Outgoing
from anyep.exchange.scatter import Route


class SecondHalf:
    """One rank's launches, in order. Everything goes to the current stream."""

    def __init__(self, end: DeviceEndpoint, out: Outgoing, plan: DevicePlan, landing: Landing, epoch: int) -> None:
        self._end = end
        self._out = out
        self._plan = plan
        self._landing = landing
        self._board = (end.boards.board_addr(epoch), end.boards.message_bytes)
        self._base_addr = end.base_addr
        """what announced places are counted from: ranks' memory, or their slots here"""
        slots = end.slots_of(out.geometry, plan.max_tokens)
        if slots is not None:
            self._base_addr = slots.receiving_addr(epoch)
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
            *(self._base_addr, plan.tables_addr, plan.summary_addr, end.faults.addr),
            *(field("send_start"), field("dense_start"), field("recv_rows"), field("recv_start"), field("counts")),
            *(field("block_start"), field("filled_rows"), *self._gaps),
            *((*plan.source_addr, field("source_rows")) if self._out.geometry.padded else (0, 0, 0)),
            *(plan.num_tokens, plan.width, plan.idx_addr, plan.idx_bytes),
            *(plan.entry_rank_addr, plan.entry_slot_addr, plan.entry_row_addr),
        )

    def connect_cached(self, num_rows: int) -> None:
        """Only look up where peers' memory lies: places are those of the handle."""
        end, plan = self._end, self._plan
        end.device.kernels.connect(
            *(*self._board, end.num_ranks, self._base_addr, num_rows, plan.tables_addr, plan.summary_addr),
            *(end.faults.addr, 0, 0),
        )

    def send(self) -> None:
        """Write this rank's rows to their final places."""
        plan = self._plan
        route = Route(plan.width, plan.entry_rank_addr, plan.entry_row_addr, by_expert=int(self._shape.by_expert))
        send(self._end, self._out, route, plan.table_addr, self._out.geometry.row)

    def expand(self) -> None:
        """Make the rows of this rank's blocks from those that have come to its slots."""
        end, plan, rows = self._end, self._plan, self._out.geometry.eager_row
        x_table, scales_table, idx_table, _, token_table = plan.table_addr
        x, scales, _, _, token = self._landing.parts
        end.device.kernels.expand(
            *(rows.x, rows.scales, end.num_topk, plan.idx_bytes, end.num_ranks, self._shape.num_local),
            *(plan.field("source_rows"), plan.field("recv_start"), plan.field("scratch")),
            *(x_table, scales_table if rows.scales else 0, idx_table, 0, token_table),
            *(address_of(x), address_of(scales), 0, 0, address_of(token)),
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
