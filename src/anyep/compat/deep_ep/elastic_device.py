"""V2's dispatch and combine of CUDA tensors on one host, laid out by torch's operations on the device.

The host's way (elastic_dispatch.py, elastic_combine.py) works on memory that the CPU reads. What needs that is refused
here with the reason: several hosts, copies of handles, and what other ranks announced.

Legend: T tokens, K top-k, N received rows, L local experts, G packs of scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from anyep.compat.deep_ep.checks import check_not_on_device
from anyep.compat.deep_ep.elastic_combine import Outputs, Sums
from anyep.compat.deep_ep.elastic_context import ElasticContext
from anyep.compat.deep_ep.elastic_device_rows import (
    aligned_counts,
    describe_rows,
    gather_weights,
    number_slots,
    slab_begins,
    slab_rows,
    spread,
    spread_weights,
    sum_rows,
)
from anyep.compat.deep_ep.elastic_dispatch import Dispatched
from anyep.compat.deep_ep.elastic_fields import SAID, most_expanded_rows
from anyep.compat.deep_ep.elastic_landing import DispatchPlan, Rows, Tokens
from anyep.compat.deep_ep.elastic_routes import ask, native_handle, route_of
from anyep.compat.deep_ep.elastic_rows import empty_scales, rows_without_gaps
from anyep.compat.deep_ep.elastic_sizes import align
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.compat.deep_ep.underway import event_of
from anyep.exchange.calls import Calls
from anyep.exchange.device.plan import DeviceCounts, DevicePlan
from anyep.exchange.handle import Handle, Received


class OriginOnDevice:
    """What a dispatch left on the device, from which a handle's fields are made when they are looked at."""

    def __init__(self, context: ElasticContext, plan: DispatchPlan, received: Received) -> None:
        idx, native = received.topk_idx, received.handle
        assert idx is not None
        self.context = context
        self.native = native
        self.terms = plan.terms
        self.served = idx >= 0
        """bool [N, K]: the columns that this rank serves"""
        self.token = received.source_token
        """int32 [N]: each row's token at its source"""
        self.by_expert: Handle | None = None
        """the same dispatch with a row for each (token, column), once a combine has asked for it"""
        self.num_rows = native.num_rows
        if self.terms.do_expand:
            self.num_rows = self.expanded_rows()
            self.places = slab_rows(idx, self.counts(), self.terms.alignment, self.num_rows)
        else:
            rows = torch.arange(len(idx), device=idx.device, dtype=torch.int64)
            self.places = rows.unsqueeze(1).expand(idx.shape)
        """int64 [N, K]: the row of the batch that serves each column; of an expanded batch ``num_rows`` where none"""

    def make(self, handle: EPHandle, name: str) -> Any:
        """Return a field. Unavailable for those that only the host's memory has."""
        maker = _MAKERS.get(name)
        if maker is None:
            check_not_on_device(f"the field {name} of a handle", self.context.natives.device)
        assert maker is not None
        return maker(self)

    def counts(self) -> torch.Tensor:
        """Return int32 [L], without waiting for them."""
        counts = self.native.counts
        if isinstance(counts, DeviceCounts):
            return counts.tensor.clone()
        return torch.tensor(list(counts), dtype=torch.int32, device=self.served.device)

    def aligned_list(self) -> list[int]:
        """Return the rows of each local expert with its padding, and wait for them; none where sizes are bounds."""
        return [align(count, self.terms.alignment) for count in self.native.counts] if self.terms.exact else []

    def expanded_rows(self) -> int:
        """Return the rows of an expanded batch: what arrived, or the most that can arrive."""
        return (
            sum(self.aligned_list()) if self.terms.exact else most_expanded_rows(self.context, self.terms, self.native)
        )

    def ends(self) -> torch.Tensor:
        """Return int32 [L]: where each expert's rows end, in an expanded batch those before the padding."""
        counts, alignment = self.counts(), self.terms.alignment
        if self.terms.do_expand:
            return slab_begins(counts, alignment).int() + counts
        return aligned_counts(counts, alignment).cumsum(0, dtype=torch.int32)

    def recv_rows(self) -> torch.Tensor:
        """Return int32 [R]: rows of each source, without waiting for them; a view."""
        plan = self.native.send
        assert isinstance(plan, DevicePlan), "a device's handle has a device's plan"
        first = plan.map.first(plan.map.field("recv_rows"))
        return plan.device_memory[first : first + self.context.num_ranks]

    def metadata(self) -> torch.Tensor:
        """Return int32 [N, K + 2]: source token, master column and rows of each received row."""
        assert self.token is not None, "the variants of these calls bring source tokens"
        most = max(1, self.terms.num_max_tokens)
        return describe_rows(self.places, self.served, self.token, self.recv_rows(), most)

    def slots(self) -> torch.Tensor:
        """Return int32 [T, K]: slots of each rank in token order, at master columns; -1 elsewhere."""
        context, terms = self.context, self.terms
        first_id = context.number * terms.num_max_tokens
        return number_slots(self.native.topk_idx(), terms.num_experts // context.num_ranks, context.num_ranks, first_id)


_MAKERS: dict[str, Callable[[OriginOnDevice], Any]] = SAID | {
    "num_expanded_tokens": OriginOnDevice.expanded_rows,
    "num_recv_tokens_per_expert_list": OriginOnDevice.aligned_list,
    "psum_num_recv_tokens_per_scaleup_rank": lambda origin: origin.recv_rows().cumsum(0, dtype=torch.int32),
    "psum_num_recv_tokens_per_expert": OriginOnDevice.ends,
    "num_unaligned_recv_tokens_per_expert": OriginOnDevice.counts,
    "recv_src_metadata": OriginOnDevice.metadata,
    "dst_buffer_slot_idx": OriginOnDevice.slots,
}


def check_on_device(context: ElasticContext) -> None:
    """Raise Unavailable for what is not laid out on a device yet."""
    if context.num_scaleup < context.num_ranks:
        check_not_on_device("a buffer whose ranks are several hosts", context.natives.device)


def dispatch_first(context: ElasticContext, plan: DispatchPlan, tokens: Tokens, *, go_on: bool) -> Dispatched:
    """Send tokens to their experts' ranks; all is launched on return, and a CUDA event stands behind it (``go_on``)."""
    idx = tokens.topk_idx
    assert idx is not None
    received = plan.native.dispatch(_wired(tokens), idx)
    origin = OriginOnDevice(context, plan, received)
    handle = EPHandle.made(plan.kind, origin, received.handle.num_rows)
    if not plan.terms.keep_copy:
        handle.fields["topk_idx"] = idx
        route_of(handle, received.handle).note("topk_idx", idx)
    return _batch(plan, tokens, received, handle, origin, go_on=go_on)


def dispatch_again(
    context: ElasticContext, plan: DispatchPlan, tokens: Tokens, handle: EPHandle, *, go_on: bool
) -> Dispatched:
    """Send other tokens where an earlier dispatch sent its own."""
    received = plan.native.dispatch(_wired(tokens), handle=native_handle(context, handle, plan.native))
    return _batch(plan, tokens, received, handle, _origin_of(context, handle), go_on=go_on)


def _origin_of(context: ElasticContext, handle: EPHandle) -> OriginOnDevice:
    """Return what a handle was made from. Unavailable for copies."""
    origin = handle.source
    if not isinstance(origin, OriginOnDevice):
        check_not_on_device("a handle that is not the one which dispatch returned", context.natives.device)
    assert isinstance(origin, OriginOnDevice)
    return origin


def _wired(tokens: Tokens) -> Rows:
    """Return the rows, and what travels beside them: scales or weights as they are, or both as 4-byte words."""
    x, scales, _, weights = tokens
    if scales is None:
        return x if weights is None else (x, weights)
    if weights is None:
        return x, scales
    return x, torch.cat([scales.contiguous().view(torch.int32), weights.contiguous().view(torch.int32)], dim=1)


def _batch(
    plan: DispatchPlan, tokens: Tokens, received: Received, handle: EPHandle, origin: OriginOnDevice, *, go_on: bool
) -> Dispatched:
    """Take apart what travelled beside the rows, and give each column a row of its own in an expanded batch."""
    x, beside, idx, event = received.x, received.scales, received.topk_idx, event_of(None, asked=go_on)
    scales, weights = None, beside
    if tokens.scales is not None:
        assert beside is not None
        scales = beside[:, : plan.num_packs].contiguous().view(tokens.scales.dtype)
        weights = beside[:, plan.num_packs :].contiguous().view(torch.float32) if plan.has_weights else None
    if plan.terms.do_expand:
        places, num_rows = origin.places, origin.num_rows
        x, idx = spread(x, places, num_rows), None
        scales = None if scales is None else spread(scales, places, num_rows)
        weights = None if weights is None else spread_weights(weights, places, num_rows)
    if scales is None:
        return x, idx, weights, handle, event
    if plan.terms.tma_scales:
        columns = empty_scales(scales.size(0), scales.size(1), scales.dtype, tma=True, device=scales.device)
        scales = columns.copy_(scales)
    return (x, scales), idx, weights, handle, event


def combine(context: ElasticContext, ep: Calls, outputs: Outputs, handle: EPHandle, *, go_on: bool) -> Sums:
    """Bring the experts' outputs back and sum them by their columns, or each row of an expanded batch by itself."""
    origin = _origin_of(context, handle)
    y, weights, expanded = outputs.x, outputs.topk_weights, origin.terms.do_expand
    if expanded and not context.several_sums:
        return _sum_columns(context, ep, outputs, origin), None, event_of(None, asked=go_on)
    native = native_handle(context, handle, ep)
    if expanded:
        y = sum_rows(y, origin.places)
    if weights is None:
        return ep.combine(y, native, bias=outputs.bias, reduce="column"), None, event_of(None, asked=go_on)
    owned = gather_weights(weights, origin.places) if expanded else torch.where(origin.served, weights, 0)
    combined = ep.combine(y, native, bias=outputs.bias, topk_weights=owned, reduce="column")
    return combined.x, combined.topk_weights, event_of(None, asked=go_on)


def _sum_columns(context: ElasticContext, ep: Calls, outputs: Outputs, origin: OriginOnDevice) -> torch.Tensor:
    """Return one sum only of an expanded batch: every row travels, and they are added in column order.

    Where rows go back then, ranks ask each other the first time.
    """
    known = origin.by_expert
    if known is None:
        idx = origin.native.topk_idx()
        known = origin.by_expert = ask(context, origin.terms.num_experts, idx, None, layout="expert")
    rows = rows_without_gaps(list(known.counts), origin.terms.alignment).to(outputs.x.device)
    return ep.combine(outputs.x[rows], known, bias=outputs.bias, reduce="expert")
