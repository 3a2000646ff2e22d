"""The receiving half of a dispatch: the final tensors, cut from the arena before a row arrives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anyep.exchange.endpoint import Endpoint
from anyep.exchange.handle import Handle, Received
from anyep.layout.arrival import Arrival
from anyep.layout.regions import RowBytes, RowRegion, row_region
from anyep.transport.base import Block

_MINUS_ONE = 0xFF
"""Every byte of an integer -1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Landing:
    """Memory of a batch that is about to arrive."""

    region: RowRegion
    data: Block
    routing: Block
    num_rows: int
    num_topk: int
    idx_dtype: torch.dtype
    has_weights: bool

    def row_bytes(self, row: RowBytes) -> int:
        """Return what one row of this batch weighs, routing included."""
        weights = row.topk_weights if self.has_weights else 0
        return row.x + row.scales + self.num_topk * self.idx_dtype.itemsize + weights

    def places(self) -> list[int]:
        """Segment, offset of x, offset of scales; segment, offset of topk_idx, offset of weights."""
        data, routing = self.data.place, self.routing.place
        return [
            data.segment,
            data.offset,
            data.offset + self.region.scales_offset,
            routing.segment,
            routing.offset,
            routing.offset + self.region.weights_offset,
        ]

    def fill_gaps(self, end: Endpoint, arrival: Arrival) -> None:
        """Define the rows nobody sends: index -1, everything else 0."""
        if not arrival.gap_begin.size:
            return
        gaps = (
            arrival.gap_begin.size,
            torch.from_numpy(arrival.gap_begin).data_ptr(),
            torch.from_numpy(arrival.gap_end).data_ptr(),
        )
        x_addr, routing_addr = self.data.address, self.routing.address
        end.kernels.fill_rows(x_addr, end.row.x, *gaps, 0)
        if end.row.scales:
            end.kernels.fill_rows(x_addr + self.region.scales_offset, end.row.scales, *gaps, 0)
        end.kernels.fill_rows(routing_addr, end.num_topk * self.idx_dtype.itemsize, *gaps, _MINUS_ONE)
        if self.has_weights:
            end.kernels.fill_rows(routing_addr + self.region.weights_offset, end.row.topk_weights, *gaps, 0)


def cut_landing(end: Endpoint, arrival: Arrival, idx_dtype: torch.dtype, *, has_weights: bool) -> Landing:
    """Allocate the batch's memory; CapacityError where the machine has none."""
    region = row_region(end.row.with_index(end.num_topk * idx_dtype.itemsize), arrival.num_rows)
    return Landing(
        region=region,
        data=end.transport.allocate(region.data_bytes),
        routing=end.transport.allocate(region.routing_bytes),
        num_rows=arrival.num_rows,
        num_topk=end.num_topk,
        idx_dtype=idx_dtype,
        has_weights=has_weights,
    )


def finish(end: Endpoint, landing: Landing, handle: Handle) -> Received:
    """Wrap the memory as tensors, now that every row has arrived."""
    wire, rows, region = end.wire, landing.num_rows, landing.region
    scales = None
    if wire.scale_columns:
        scales = tensor_on(landing.data, region.scales_offset, (rows, wire.scale_columns), wire.scale_dtype)
    weights = None
    if landing.has_weights:
        weights = tensor_on(landing.routing, region.weights_offset, (rows, end.num_topk), torch.float32)
    return Received(
        x=tensor_on(landing.data, 0, (rows, wire.hidden), wire.dtype),
        scales=scales,
        topk_idx=tensor_on(landing.routing, 0, (rows, end.num_topk), landing.idx_dtype),
        topk_weights=weights,
        counts=list(handle.arrival.expert_counts),
        handle=handle,
    )


def tensor_on(block: Block, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor on a block's bytes; the tensor keeps the block."""
    count = shape[0] * shape[1]
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(block.memory, dtype=dtype, count=count, offset=offset).view(shape)
