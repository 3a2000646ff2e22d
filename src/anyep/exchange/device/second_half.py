"""The second half of a dispatch, launched when all ranks have announced: places, peer tables, rows, padding."""

from __future__ import annotations

from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.landing import Landing
from anyep.exchange.device.plan import DevicePlan
from anyep.exchange.ledger import D_ALIGNMENT
from anyep.exchange.outgoing import Outgoing
from anyep.exchange.scatter import Route, place_at, send_rows

_FILLING = (0, 0, 0xFF, 0, 0)
"""What rows that nobody sends are made of: index -1, everything else 0."""


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
        num_blocks = self._shape.num_local if self._shape.by_expert and not self._shape.block_rows else 0
        first = begins + 4 * (self._shape.num_local - num_blocks)
        self._gaps = (num_blocks, first, first + 4 * (self._shape.num_local + 1))
        """one behind each expert's rows, and after those the one behind the batch: how many, begins, ends"""

    def settle(self) -> None:
        """Work out every place, and from it this rank's peer tables."""
        end, plan, shape, kernels = self._end, self._plan, self._shape, self._end.device.kernels
        experts, field = end.placement.num_experts, plan.field
        kernels.settle(
            *(*self._board, *self._ranks, experts, shape.num_local, end.tables.rank_addr, end.tables.local_addr),
            *(int(shape.by_expert), self._alignment, shape.block_rows, field("send_start"), field("dense_start")),
            *(field("recv_rows"), field("recv_start"), field("counts"), field("block_start"), field("filled_rows")),
            *(field("scratch"), field("gaps") + 4, field("gaps") + 4 * (shape.num_local + 2)),
        )
        kernels.connect(
            *(*self._board, *self._ranks, end.base_addr, plan.field("filled_rows"), shape.static_rows),
            *(plan.field("scratch"), experts, shape.block_rows, plan.tables_addr, plan.summary_addr),
            *(end.faults.addr, *self._gaps),
        )
        place_at(end, plan, plan.field("send_start"), plan.entry_row_addr)

    def connect_cached(self, num_rows: int) -> None:
        """Only look up where peers' memory lies: places are those of the handle."""
        end, plan = self._end, self._plan
        end.device.kernels.connect(
            *(*self._board, *self._ranks, end.base_addr, 0, num_rows, 0, 0, 0, plan.tables_addr, plan.summary_addr),
            *(end.faults.addr, 0, 0, 0),
        )

    def withdraw(self) -> None:
        """Leave nothing that others could stumble over if this batch is refused: nobody will look before."""
        plan, num_entries = self._plan, self._plan.num_tokens * self._plan.width
        counts = (plan.field("counts"), self._shape.num_local)
        self._end.device.kernels.withdraw(plan.summary_addr, plan.entry_rank_addr, num_entries, *counts)

    def send(self) -> None:
        """Write this rank's rows to their places."""
        plan = self._plan
        final = Route(plan.width, plan.entry_rank_addr, plan.entry_row_addr, by_expert=int(self._shape.by_expert))
        send_rows(self._end, self._out, final, plan.table_addr, self._out.geometry.row)

    def fill_gaps(self) -> None:
        """Define the rows of this rank's batch that nobody sends."""
        num_blocks, begins, ends = self._gaps
        num_gaps = num_blocks + (self._shape.static_rows >= 0)
        if not num_gaps or (self._alignment == 1 and self._shape.static_rows < 0):
            return
        parts = zip(self._landing.parts, self._out.geometry.row.parts(), _FILLING, strict=True)
        for tensor, row_bytes, byte in parts:
            if tensor is not None and row_bytes:
                self._end.device.kernels.fill_rows(tensor.data_ptr(), row_bytes, num_gaps, begins, ends, byte)
