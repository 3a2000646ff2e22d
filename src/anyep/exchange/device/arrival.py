"""What a device's batch becomes for the caller."""

from __future__ import annotations

import torch

from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.landing import Landing
from anyep.exchange.device.plan import DeviceCounts, DevicePlan
from anyep.exchange.geometry import Geometry
from anyep.exchange.handle import Handle, Received


def arrive(end: DeviceEndpoint, plan: DevicePlan, geometry: Geometry, batch: Landing, turned: torch.Tensor) -> None:
    """Launch what needs all ranks' rows: scales turned to column-major, as grouped matrix products want them."""
    scales = batch.parts[1]
    assert scales is not None
    end.device.kernels.transpose_scales(
        geometry.shape.num_local,
        geometry.shape.block_rows,
        end.wire.scale_columns,
        plan.field("counts"),
        scales.data_ptr(),
        turned.data_ptr(),
    )


def wrap(
    end: DeviceEndpoint, batch: Landing, handle: Handle, plan: DevicePlan, turned: torch.Tensor | None
) -> Received:
    """Return the batch for the caller; ``turned``: its scales in column-major order, in the padded layout."""
    x, scales, idx, weights, token = batch.parts
    assert x is not None
    if plan.geometry.padded:
        return _wrap_padded(end, batch, handle, plan, turned)
    return Received(
        x=x,
        scales=scales,
        topk_idx=idx,
        topk_weights=weights,
        counts=_own(handle),
        handle=handle,
        source_token=token,
    )


def _wrap_padded(
    end: DeviceEndpoint, batch: Landing, handle: Handle, plan: DevicePlan, turned: torch.Tensor | None
) -> Received:
    """Blocks of experts."""
    experts, rows = handle.shape
    source_begin, source_count = plan.sources()
    x, _, _, _, token = batch.parts
    assert x is not None
    assert token is not None
    return Received(
        x=x.view(experts, rows, end.hidden),
        scales=None if turned is None else turned.transpose(1, 2),
        topk_idx=None,
        topk_weights=None,
        counts=_own(handle),
        handle=handle,
        source_begin=source_begin,
        source_count=source_count,
        source_token=token.view(experts, rows),
    )


def _own(handle: Handle) -> DeviceCounts | list[int]:
    """Return the counts; a list of the batch's own."""
    return handle.counts if isinstance(handle.counts, DeviceCounts) else list(handle.counts)
