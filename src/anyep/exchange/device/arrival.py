"""What a device's batch becomes for the caller."""

from __future__ import annotations

from typing import Any

import torch

from anyep.exchange.device.landing import Landing
from anyep.exchange.device.plan import DeviceCounts, DevicePlan
from anyep.exchange.handle import Handle, Received


def _made_when_looked_at(name: str) -> Any:
    """Return a property in place of a field that may hold what makes its tensor: a view takes a microsecond."""
    held: Any = getattr(Received, name)

    def look(received: Received) -> object:
        value = held.__get__(received)
        if callable(value):  # tensors are not
            value = value()
            held.__set__(received, value)
        return value

    return property(look, held.__set__, doc=held.__doc__)


class PaddedOnDevice(Received):
    """A padded batch, of which few look at where sources begin."""

    __slots__ = ()
    source_begin = _made_when_looked_at("source_begin")
    source_count = _made_when_looked_at("source_count")


def wrap(batch: Landing, handle: Handle, plan: DevicePlan, turned: torch.Tensor | None) -> Received:
    """Return the batch for the caller; ``turned``: its scales in column-major order, in the padded layout."""
    x, scales, idx, weights, token = batch.parts
    assert x is not None
    kind: type[Received] = Received
    begin: Any = None
    count: Any = None
    if plan.geometry.padded:
        kind, begin, count = PaddedOnDevice, plan.source_begin, plan.source_count
    if turned is not None:
        scales = turned.transpose(1, 2)
    return kind(
        x=x,
        scales=scales,
        topk_idx=idx,
        topk_weights=weights,
        counts=_own(handle),
        handle=handle,
        source_begin=begin,
        source_count=count,
        source_token=token,
    )


def _own(handle: Handle) -> DeviceCounts | list[int]:
    """Return the counts; a list of the batch's own."""
    return handle.counts if isinstance(handle.counts, DeviceCounts) else list(handle.counts)
