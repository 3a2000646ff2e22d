"""V1's combine: plain sums of a token's rows over its ranks, rounded once, and once a host where several take part."""

from __future__ import annotations

from typing import Any

import torch

from anyep.compat.deep_ep.checks import check_dense, host_assert, refuse
from anyep.compat.deep_ep.events import EventOverlap
from anyep.compat.deep_ep.handles import find_handle
from anyep.compat.deep_ep.native import Kept, Natives
from anyep.compat.deep_ep.normal_batch import NormalContext
from anyep.compat.deep_ep.underway import event_of
from anyep.exchange.calls import Calls
from anyep.exchange.wire import carrying_wire

Summed = tuple[torch.Tensor, torch.Tensor | None, EventOverlap]
"""What combine returns: sums [T, H], weights [T, K], event."""


def check_bias(bias: object, num_tokens: int, hidden: int) -> list[torch.Tensor]:
    """Return none, one or two biases [T, H]. RuntimeError for others."""
    if bias is None:
        return []
    given: tuple[Any, ...] = tuple(bias) if isinstance(bias, (tuple, list)) else (bias,)
    host_assert(
        not isinstance(bias, (tuple, list)) or len(given) == 2, f"bias must be a tensor or two, got {len(given)}"
    )
    return [check_dense("bias", one, torch.bfloat16, [num_tokens, hidden], "[T, H]") for one in given]


def combine(context: NormalContext, x: Any, handle: object, topk_weights: Any, bias: object, *, go_on: bool) -> Summed:
    """Sum rows at their origins; ``go_on``: return before that is over, on a GPU when all is launched."""
    natives = context.natives
    kept = find_handle(natives, handle)
    ep = natives.checked.get(_key_of_sum(kept, x, topk_weights)) or _checked_sum(natives, x, kept, topk_weights)
    biases = () if bias is None else check_bias(bias, kept.handle.num_tokens, x.shape[-1])
    try:
        if not go_on or natives.device is not None:
            summed = ep.combine(x, kept.handle, topk_weights=topk_weights, bias=biases, group=context.group)
            if topk_weights is None:
                return summed, None, event_of(None, asked=go_on)
            return summed.x, summed.topk_weights, event_of(None, asked=go_on)
        natives.make_room()
        pending = ep.combine(x, kept.handle, topk_weights=topk_weights, bias=biases, group=context.group, wait=False)
    except (TypeError, ValueError):
        _checked_sum(natives, x, kept, topk_weights)
        raise
    targets = pending.targets
    assert targets is not None, "a sum's place is always known"
    return targets.x, targets.topk_weights, event_of(natives.start(pending))


def _key_of_sum(kept: Kept, x: Any, topk_weights: Any) -> tuple[Any, ...] | None:
    """Return what a combine's buffer depends on; the native combine checks the rest."""
    try:
        columns = None if topk_weights is None else topk_weights.shape[-1]
        return kept.served, x.shape[-1], x.dtype, columns
    except (AttributeError, IndexError):
        return None


def _checked_sum(natives: Natives, x: object, kept: Kept, topk_weights: object) -> Calls:
    """Check a combine's tensors and return the buffer that sums them. RuntimeError."""
    y = check_dense("x", x, None, [kept.handle.num_rows, None], "[N, H]")
    if y.dtype != torch.bfloat16:
        refuse(f"Unsupported type: combine takes bfloat16 rows, got {y.dtype}")
    _, experts, topk, static = kept.served
    if topk_weights is not None:
        topk = check_dense("topk_weights", topk_weights, torch.float32, [y.size(0), None], "[N, K]").size(1)
    wire = carrying_wire(y.dtype, y.size(1), 0, torch.float32)
    ep = natives.variant(experts, wire, topk, static_rows=static)
    return natives.remember(_key_of_sum(kept, x, topk_weights), ep)
