"""V2's dispatch and combine of CUDA tensors, laid out by torch's operations on the device.

The host's way (elastic_dispatch.py, elastic_combine.py) works on memory that the CPU reads. Between hosts rows pass
through the host's memory, so that a call is over when it returns; they are laid out on the device there too.

Legend: T tokens, K top-k, N received rows, G packs of scales.
"""

from __future__ import annotations

from typing import Any

import torch

from anyep.compat.deep_ep.elastic_combine import Outputs, Sums, ranks_summed_first
from anyep.compat.deep_ep.elastic_context import ElasticContext
from anyep.compat.deep_ep.elastic_device_fields import OriginOnDevice, Places, places_of_handle
from anyep.compat.deep_ep.elastic_device_rows import gather_weights, spread, spread_weights, sum_rows
from anyep.compat.deep_ep.elastic_dispatch import Dispatched
from anyep.compat.deep_ep.elastic_landing import DispatchPlan, Rows, Tokens
from anyep.compat.deep_ep.elastic_routes import native_handle, route_of, rows_by_expert
from anyep.compat.deep_ep.elastic_rows import empty_scales, rows_without_gaps
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.compat.deep_ep.underway import event_of
from anyep.exchange.calls import Calls
from anyep.exchange.handle import Received


def dispatch_first(context: ElasticContext, plan: DispatchPlan, tokens: Tokens, *, go_on: bool) -> Dispatched:
    """Send tokens to their experts' ranks; all is launched on return, and a CUDA event stands behind it (``go_on``)."""
    idx = tokens.topk_idx
    assert idx is not None
    received = plan.native.dispatch(_wired(tokens), idx)
    origin = OriginOnDevice(context, plan, received)
    handle = EPHandle.made(plan.kind, origin, origin.batch_rows)
    if not plan.terms.keep_copy:
        handle.fields["topk_idx"] = idx
        route_of(handle, received.handle).note("topk_idx", idx)
    return _batch(plan, tokens, received, handle, origin.places, go_on=go_on)


def dispatch_again(
    context: ElasticContext, plan: DispatchPlan, tokens: Tokens, handle: EPHandle, *, go_on: bool
) -> Dispatched:
    """Send other tokens where an earlier dispatch sent its own."""
    native = native_handle(context, handle, plan.native)
    needs = plan.terms.do_expand or plan.native.num_hosts > 1
    places = places_of_handle(context, handle, native) if needs else None
    received = plan.native.dispatch(_wired(tokens), handle=native)
    return _batch(plan, tokens, received, handle, places, go_on=go_on)


def _wired(tokens: Tokens) -> Rows:
    """Return the rows, and what travels beside them: scales or weights as they are, or both as 4-byte words."""
    x, scales, _, weights = tokens
    if scales is None:
        return x if weights is None else (x, weights)
    if weights is None:
        return x, scales
    return x, torch.cat([scales.contiguous().view(torch.int32), weights.contiguous().view(torch.int32)], dim=1)


def _batch(
    plan: DispatchPlan, tokens: Tokens, received: Received, handle: EPHandle, places: Places | None, *, go_on: bool
) -> Dispatched:
    """Take apart what travelled beside the rows, and give each its place: each column one in an expanded batch."""
    x, beside, idx, event = received.x, received.scales, received.topk_idx, event_of(None, asked=go_on)
    scales, weights = None, beside
    if tokens.scales is not None:
        assert beside is not None
        scales = beside[:, : plan.num_packs].contiguous().view(tokens.scales.dtype)
        weights = beside[:, plan.num_packs :].contiguous().view(torch.float32) if plan.has_weights else None
    if plan.terms.do_expand:
        assert places is not None, "only compact batches stand as they arrive"
        rows, num_rows = places.rows, places.num_rows
        x, idx = spread(x, rows, num_rows), None
        scales = None if scales is None else spread(scales, rows, num_rows)
        weights = None if weights is None else spread_weights(weights, rows, num_rows)
    elif places is not None and not places.stays:
        assert idx is not None
        rows, num_rows = places.rows[:, :1], places.num_rows
        x, idx = spread(x, rows, num_rows), spread(idx + 1, rows, num_rows) - 1
        scales = None if scales is None else spread(scales, rows, num_rows)
        weights = None if weights is None else spread(weights, rows, num_rows)
    if scales is None:
        return x, idx, weights, handle, event
    if plan.terms.tma_scales:
        columns = empty_scales(scales.size(0), scales.size(1), scales.dtype, tma=True, device=scales.device)
        scales = columns.copy_(scales)
    return (x, scales), idx, weights, handle, event


def combine(context: ElasticContext, ep: Calls, outputs: Outputs, handle: EPHandle, *, go_on: bool) -> Sums:
    """Bring the experts' outputs back and sum them by their columns, or each row of an expanded batch by itself."""
    y, weights, expanded = outputs.x, outputs.topk_weights, handle.kind.do_expand
    if expanded and not context.several_sums:  # every row travels, and they are added in column order
        known = rows_by_expert(context, handle, ep)
        if ep.num_hosts > 1 and len(y) != known.num_rows:
            y = y[rows_without_gaps(known.counts, handle.expert_alignment).to(y.device)]
        summed = ep.combine(y[: known.num_rows], known, bias=outputs.bias, reduce="expert")
        return summed, None, event_of(None, asked=go_on)
    native = native_handle(context, handle, ep)
    owned = None
    if expanded or weights is not None or ep.num_hosts > 1:
        places = places_of_handle(context, handle, native)
        if expanded:
            y = sum_rows(y, places.rows)
            owned = None if weights is None else gather_weights(weights, places.rows)
        else:
            if not places.stays:
                own = places.rows[:, 0]
                y, weights = y[own], None if weights is None else weights[own]
            owned = None if weights is None else torch.where(places.served, weights, 0)
    how: dict[str, Any] = {"bias": outputs.bias, "reduce": "column", "group": ranks_summed_first(context)}
    if owned is None:
        return ep.combine(y, native, **how), None, event_of(None, asked=go_on)
    combined = ep.combine(y, native, topk_weights=owned, **how)
    return combined.x, combined.topk_weights, event_of(None, asked=go_on)
