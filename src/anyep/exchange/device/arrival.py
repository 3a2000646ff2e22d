"""What a device's batch becomes for the caller."""

from __future__ import annotations

import torch

from anyep.exchange.device.landing import Landing
from anyep.exchange.device.plan import DeviceCounts, DevicePlan
from anyep.exchange.handle import Handle, Received


def wrap(batch: Landing, handle: Handle, plan: DevicePlan, turned: torch.Tensor | None) -> Received:
    """Return the batch for the caller; ``turned``: its scales in column-major order, in the padded layout."""
    x, scales, idx, weights, token = batch.parts
    assert x is not None
    source_begin, source_count = plan.sources() if plan.geometry.padded else (None, None)
    if turned is not None:
        scales = turned.transpose(1, 2)
    return Received(
        x=x,
        scales=scales,
        topk_idx=idx,
        topk_weights=weights,
        counts=_own(handle),
        handle=handle,
        source_begin=source_begin,
        source_count=source_count,
        source_token=token,
    )


def _own(handle: Handle) -> DeviceCounts | list[int]:
    """Return the counts; a list of the batch's own."""
    return handle.counts if isinstance(handle.counts, DeviceCounts) else list(handle.counts)
