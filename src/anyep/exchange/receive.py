"""The receiving half of a dispatch: memory that is offered before the counts are known, and the batch's tensors."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np
import torch

from anyep.errors import CapacityError
from anyep.exchange.arguments import CPU
from anyep.exchange.desk import Desk
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.geometry import Geometry
from anyep.exchange.handle import Handle, Received, SendPlan
from anyep.layout.regions import RowRegion, aligned, row_region
from anyep.transport.base import Block, Words

_MINUS_ONE = 0xFF
"""Every byte of an integer -1."""
_ONE_BLOCK_BYTES = 8 << 20
"""Up to here a batch is one block: whoever keeps its weights keeps its rows, and pays one allocation less."""
_WORTH_TRIMMING_BYTES = 1 << 16
_SMALL_BYTES = 1 << 18
"""Up to here rows that all came along are unpacked into private memory; the offered memory is kept for next time."""


class Landing(NamedTuple):
    """Memory that peers may write a batch to: room for ``capacity`` rows, in two blocks, or one if it is small."""

    data: Block
    routing: Block
    routing_offset: int
    """where the routing begins in its block"""
    capacity: int
    places: Words
    """what peers are told: capacity, segment and offset of the rows, segment and offset of their routing"""


NO_PLACES: Words = np.array([-1, 0, 0, 0, 0], np.int64)
"""What a rank without memory tells: no number of rows fits, not even none."""


def cut_landing(end: Endpoint, geometry: Geometry, capacity: int) -> Landing:
    """Allocate memory for up to ``capacity`` rows; CapacityError where the machine has none."""
    region = row_region(geometry.row, capacity)
    if region.data_bytes <= _ONE_BLOCK_BYTES:
        offset = aligned(region.data_bytes)
        data = routing = end.transport.allocate(offset + region.routing_bytes)
    else:
        offset = 0
        data, routing = end.transport.allocate(region.data_bytes), end.transport.allocate(region.routing_bytes)
    segment, begin = data.place
    routing_segment, routing_begin = (segment, begin) if routing is data else routing.place
    places = np.array([capacity, segment, begin, routing_segment, routing_begin + offset], np.int64)
    return Landing(data, routing, offset, capacity, places)


def prepare_landing(end: Endpoint, geometry: Geometry, capacity: int) -> Landing | None:
    """Return room for ``capacity`` rows, or None: whether that matters is known when the counts are."""
    if geometry.spare_landings:
        spare = geometry.spare_landings.pop()
        if spare.capacity >= capacity:
            return spare
    try:
        return cut_landing(end, geometry, capacity)
    except CapacityError:
        return None


class Batch(NamedTuple):
    """A batch's tensors and where each begins; None and 0 for what its rows do not have. Padded: N = L * R * Tmax."""

    x: torch.Tensor
    """[N, H]"""
    scales: torch.Tensor | None
    """[N, columns]"""
    topk_idx: torch.Tensor | None
    """[N, K]"""
    topk_weights: torch.Tensor | None
    """[N, K]"""
    source_token: torch.Tensor | None
    """[N]"""
    part_addr: tuple[int, int, int, int, int]
    """where each of the five begins"""


def settle_down(end: Endpoint, geometry: Geometry, landing: Landing, num_rows: int, *, written: bool) -> Batch:
    """Return the batch of ``num_rows`` rows: where peers write (``written``), else in private memory if it is small."""
    region = row_region(geometry.row, num_rows)
    if not written and region.data_bytes <= _SMALL_BYTES:
        geometry.spare_landings.append(landing)
        return _fresh_batch(geometry, num_rows)
    if landing.routing is not landing.data:
        _trim(end, landing.data, region.data_bytes)
        _trim(end, landing.routing, region.routing_bytes)
    return _batch_on(geometry, landing, region, num_rows)


def _trim(end: Endpoint, block: Block, needed: int) -> None:
    if block.num_bytes - needed >= _WORTH_TRIMMING_BYTES:
        end.transport.trim(block, needed)


def _fresh_batch(geometry: Geometry, num_rows: int) -> Batch:
    row = geometry.row
    x = fresh((num_rows, geometry.hidden), geometry.dtype)
    scales = fresh((num_rows, geometry.scale_columns), geometry.scale_dtype) if row.scales else None
    idx = fresh((num_rows, geometry.num_topk), geometry.idx_dtype) if row.topk_idx else None
    weights = fresh((num_rows, geometry.num_topk), torch.float32) if row.topk_weights else None
    token = fresh((num_rows,), torch.int32) if row.token else None
    parts = (x, scales, idx, weights, token)
    addr = tuple([0 if part is None else part.data_ptr() for part in parts])
    return Batch(x=x, scales=scales, topk_idx=idx, topk_weights=weights, source_token=token, part_addr=addr)  # type: ignore[arg-type]  # five


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> torch.Tensor:
    """Return a private tensor with any content."""
    return torch.empty(shape, dtype=dtype, device=device)


def _batch_on(geometry: Geometry, landing: Landing, region: RowRegion, num_rows: int) -> Batch:
    """Return the batch where peers write; without rows it has no place."""
    if not num_rows:
        return _fresh_batch(geometry, 0)
    row, data, routing, offset = geometry.row, landing.data, landing.routing.memory, landing.routing_offset
    data_addr, routing_addr, memory = data.address, landing.routing.address + offset, data.memory
    scales = idx = weights = token = None
    scales_addr = idx_addr = weights_addr = token_addr = 0
    x = matrix_on(memory, 0, num_rows, geometry.hidden, geometry.dtype)
    if row.scales:
        scales = matrix_on(memory, region.scales_offset, num_rows, geometry.scale_columns, geometry.scale_dtype)
        scales_addr = data_addr + region.scales_offset
    if row.topk_idx:
        idx = matrix_on(routing, offset, num_rows, geometry.num_topk, geometry.idx_dtype)
        idx_addr = routing_addr
    if row.topk_weights:
        weights = matrix_on(routing, offset + region.weights_offset, num_rows, geometry.num_topk, torch.float32)
        weights_addr = routing_addr + region.weights_offset
    if row.token:
        token = matrix_on(routing, offset + region.token_offset, num_rows, 1, torch.int32).view(num_rows)
        token_addr = routing_addr + region.token_offset
    addr = (data_addr, scales_addr, idx_addr, weights_addr, token_addr)
    return Batch(x, scales, idx, weights, token, addr)


class Ahead(NamedTuple):
    """A batch whose size is known before it is announced: in the padded layout, and with a handle."""

    batch: Batch
    turned: torch.Tensor | None
    """padded: room for the scales in column-major order"""


def look_ahead(end: Endpoint, geometry: Geometry, landing: Landing, num_rows: int) -> Ahead:
    """Make a batch's tensors where peers write."""
    batch = _batch_on(geometry, landing, row_region(geometry.row, num_rows), num_rows)
    return Ahead(batch=batch, turned=room_for_scales(end, geometry) if geometry.padded else None)


def room_for_scales(end: Endpoint, geometry: Geometry) -> torch.Tensor | None:
    """Return memory for a padded batch's scales, [L, G, R * Tmax]; None where rows have none."""
    if not geometry.row.scales:
        return None
    shape = geometry.shape
    return fresh((shape.num_local, end.wire.scale_columns, shape.block_rows), end.wire.scale_dtype, end.where)


def unpack(end: Endpoint, geometry: Geometry, plan: SendPlan, desk: Desk, batch: Batch) -> None:
    """Bring rows that came along to their final places."""
    arrived, eager = desk.arrived.addr, geometry.eager_row
    rows, starts = plan.field("source_rows"), plan.field("recv_start")
    if not geometry.by_expert:
        for part_bytes, packed, base in zip(geometry.part_sizes, arrived, batch.part_addr, strict=True):
            if base:
                end.kernels.unpack(part_bytes, end.num_ranks, rows, starts, packed, base)
        return
    end.kernels.expand(
        eager.x,
        eager.scales,
        end.num_topk,
        plan.idx_bytes,
        end.num_ranks,
        geometry.shape.num_local,
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


def fill_gaps(end: Endpoint, geometry: Geometry, plan: SendPlan, batch: Batch, num_gaps: int) -> None:
    """Define the rows nobody sends: index -1, everything else 0."""
    begins = plan.field("gaps") + 4
    gaps = (num_gaps, begins, begins + 4 * (geometry.shape.num_local + 1))
    for base, row_bytes, byte in zip(batch.part_addr, geometry.part_sizes, (0, 0, _MINUS_ONE, 0, 0), strict=True):
        if base:
            end.kernels.fill_rows(base, row_bytes, *gaps, byte)


def wrap(end: Endpoint, batch: Batch, handle: Handle, geometry: Geometry, turned: torch.Tensor | None) -> Received:
    """Return the batch for the caller, now that every row has arrived; ``turned``: room for its scales, if made."""
    if geometry.padded:
        return _wrap_padded(end, batch, handle, room_for_scales(end, geometry) if turned is None else turned)
    return Received(
        x=batch.x,
        scales=batch.scales,
        topk_idx=batch.topk_idx,
        topk_weights=batch.topk_weights,
        counts=list(handle.counts),
        handle=handle,
        source_token=batch.source_token,
    )


def _wrap_padded(end: Endpoint, batch: Batch, handle: Handle, turned: torch.Tensor | None) -> Received:
    """Blocks of experts; scales turned to column-major, as grouped matrix products want them."""
    plan, wire = handle.send, end.wire
    experts, rows = handle.shape
    scales = None
    if turned is not None:
        end.kernels.transpose_scales(
            experts, rows, wire.scale_columns, plan.field("counts"), batch.part_addr[1], turned.data_ptr()
        )
        scales = turned.transpose(1, 2)
    sources = (end.num_ranks, experts)
    begin = plan.numbers("recv_start").reshape(sources) - plan.numbers("block_start")
    assert batch.source_token is not None
    return Received(
        x=batch.x.view(experts, rows, wire.hidden),
        scales=scales,
        topk_idx=None,
        topk_weights=None,
        counts=list(handle.counts),
        handle=handle,
        source_begin=torch.from_numpy(begin.T.copy()),
        source_count=torch.from_numpy(plan.numbers("recv_rows").reshape(sources).T.copy()),
        source_token=batch.source_token.view(experts, rows),
    )


def matrix_on(memory: memoryview, offset: int, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor [rows, columns] on a block's bytes, at least one; the tensor keeps the block."""
    return torch.frombuffer(memory, dtype=dtype, count=rows * columns, offset=offset).view(rows, columns)


def tensor_on(block: Block, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor on a block's bytes, if it has any."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(block.memory, dtype=dtype, count=prod(shape)).view(shape)
