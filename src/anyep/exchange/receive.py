"""The receiving half of a dispatch: memory for the batch, cut before a row arrives, and its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from anyep.errors import CapacityError
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.geometry import Geometry
from anyep.exchange.handle import Handle, Received, SendPlan
from anyep.layout.regions import RowRegion, row_region
from anyep.transport.base import Block, Words

_WORTH_TRIMMING_BYTES = 1 << 16
_MINUS_ONE = 0xFF
"""Every byte of an integer -1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Landing:
    """Memory of a batch that is about to arrive: room for ``capacity`` rows, in two blocks (layout/regions.py)."""

    data: Block
    routing: Block
    capacity: int

    def places(self) -> Words:
        """What peers are told: capacity, segment and offset of the rows, segment and offset of their routing."""
        data, routing = self.data.place, self.routing.place
        return np.array([self.capacity, data.segment, data.offset, routing.segment, routing.offset], np.int64)


NO_LANDING: Words = np.array([-1, 0, 0, 0, 0], np.int64)
"""What a rank without memory tells: no number of rows fits, not even none."""


def cut_landing(end: Endpoint, geometry: Geometry, capacity: int) -> Landing:
    """Allocate memory for up to ``capacity`` rows; CapacityError where the machine has none."""
    region = row_region(geometry.row, capacity)
    return Landing(
        data=end.transport.allocate(region.data_bytes),
        routing=end.transport.allocate(region.routing_bytes),
        capacity=capacity,
    )


def try_landing(end: Endpoint, geometry: Geometry, capacity: int) -> Landing | None:
    """The same, or None: whether that matters is known when the counts are."""
    try:
        return cut_landing(end, geometry, capacity)
    except CapacityError:
        return None


def trim(end: Endpoint, landing: Landing, region: RowRegion) -> None:
    """Give back what the batch does not need, where that is worth the trouble."""
    if landing.data.num_bytes - region.data_bytes >= _WORTH_TRIMMING_BYTES:
        end.transport.trim(landing.data, region.data_bytes)
    if landing.routing.num_bytes - region.routing_bytes >= _WORTH_TRIMMING_BYTES:
        end.transport.trim(landing.routing, region.routing_bytes)


def fill_gaps(end: Endpoint, plan: SendPlan, landing: Landing, region: RowRegion) -> None:
    """Define the rows nobody sends: index -1, everything else 0."""
    geometry = plan.geometry
    num_gaps = int(plan.numbers("gaps")[0])
    if not num_gaps:
        return
    begins = plan.field("gaps") + 4
    gaps = (num_gaps, begins, begins + 4 * (geometry.shape.num_local + 1))
    row = geometry.row
    data, routing = landing.data.address, landing.routing.address
    end.kernels.fill_rows(data, row.x, *gaps, 0)
    if row.scales:
        end.kernels.fill_rows(data + region.scales_offset, row.scales, *gaps, 0)
    end.kernels.fill_rows(routing, row.topk_idx, *gaps, _MINUS_ONE)
    if row.topk_weights:
        end.kernels.fill_rows(routing + region.weights_offset, row.topk_weights, *gaps, 0)


def wrap(end: Endpoint, landing: Landing, region: RowRegion, handle: Handle, idx_dtype: torch.dtype) -> Received:
    """Return the memory as tensors, now that every row has arrived."""
    if handle.send.geometry.padded:
        return _wrap_padded(end, landing, region, handle)
    wire, rows, row = end.wire, handle.num_rows, handle.send.geometry.row
    scales = weights = None
    if row.scales:
        scales = tensor_on(landing.data, region.scales_offset, (rows, wire.scale_columns), wire.scale_dtype)
    if row.topk_weights:
        weights = tensor_on(landing.routing, region.weights_offset, (rows, end.num_topk), torch.float32)
    return Received(
        x=tensor_on(landing.data, 0, (rows, wire.hidden), wire.dtype),
        scales=scales,
        topk_idx=tensor_on(landing.routing, 0, (rows, end.num_topk), idx_dtype),
        topk_weights=weights,
        counts=list(handle.counts),
        handle=handle,
    )


def _wrap_padded(end: Endpoint, landing: Landing, region: RowRegion, handle: Handle) -> Received:
    """Blocks of experts; scales turned to column-major, as grouped matrix products want them."""
    plan, wire = handle.send, end.wire
    shape = plan.geometry.shape
    experts, rows = handle.shape
    scales = None
    if wire.scale_columns:
        turned = torch.empty((experts, wire.scale_columns, rows), dtype=wire.scale_dtype, device="cpu")
        end.kernels.transpose_scales(
            experts,
            rows,
            wire.scale_columns,
            plan.field("counts"),
            landing.data.address + region.scales_offset,
            turned.data_ptr(),
        )
        scales = turned.transpose(1, 2)
    sources = (end.num_ranks, shape.num_local)
    begin = plan.numbers("recv_start").reshape(sources) - plan.numbers("block_start")
    return Received(
        x=tensor_on(landing.data, 0, (experts, rows, wire.hidden), wire.dtype),
        scales=scales,
        topk_idx=None,
        topk_weights=None,
        counts=list(handle.counts),
        handle=handle,
        source_begin=torch.from_numpy(begin.T.copy()),
        source_count=torch.from_numpy(plan.numbers("recv_rows").reshape(sources).T.copy()),
        source_token=tensor_on(landing.routing, region.token_offset, (experts, rows), torch.int32),
    )


def tensor_on(block: Block, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor on a block's bytes; the tensor keeps the block."""
    count = 1
    for size in shape:
        count *= size
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(block.memory, dtype=dtype, count=count, offset=offset).view(shape)
