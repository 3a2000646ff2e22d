"""V2's dispatch and combine of CUDA tensors: compact batches of one host, laid out by torch's operations on the device.

The host's way (elastic_dispatch.py, elastic_combine.py) works on memory that the CPU reads. What needs that is refused
here with the reason: expanded batches, several hosts, and the fields that name rows and ranks.

Legend: T tokens, K top-k, N received rows, L local experts, G packs of scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from anyep.compat.deep_ep.checks import check_host
from anyep.compat.deep_ep.elastic_combine import Outputs, Sums
from anyep.compat.deep_ep.elastic_context import ElasticContext
from anyep.compat.deep_ep.elastic_dispatch import Dispatched
from anyep.compat.deep_ep.elastic_landing import DispatchPlan, Rows, Tokens
from anyep.compat.deep_ep.elastic_routes import native_handle, route_of
from anyep.compat.deep_ep.elastic_rows import empty_scales
from anyep.compat.deep_ep.elastic_sizes import align
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.compat.deep_ep.underway import event_of
from anyep.exchange.calls import Calls
from anyep.exchange.device.plan import DeviceCounts
from anyep.exchange.handle import Handle, Received


class OriginOnDevice:
    """What a dispatch left on the device, from which a handle's fields are made when they are looked at."""

    def __init__(self, context: ElasticContext, plan: DispatchPlan, native: Handle, served: torch.Tensor) -> None:
        self.context = context
        self.native = native
        self.served = served
        """bool [N, K]: the columns that this rank serves"""
        self.terms = plan.terms

    def make(self, handle: EPHandle, name: str) -> Any:
        """Return a field. Unavailable for those that only the host's memory has."""
        maker = _MAKERS.get(name)
        if maker is None:
            check_host(f"the field {name} of a handle", self.context.natives.device)
        assert maker is not None
        return maker(self)

    def counts(self) -> torch.Tensor:
        """Return int32 [L], without waiting for them."""
        counts = self.native.counts
        if isinstance(counts, DeviceCounts):
            return counts.tensor.clone()
        return torch.tensor(list(counts), dtype=torch.int32, device=self.served.device)

    def aligned(self) -> torch.Tensor:
        alignment = self.terms.alignment
        return (self.counts() + alignment - 1) // alignment * alignment

    def aligned_list(self) -> list[int]:
        return [align(count, self.terms.alignment) for count in self.native.counts] if self.terms.exact else []


_MAKERS: dict[str, Callable[[OriginOnDevice], Any]] = {
    "do_expand": lambda origin: origin.terms.do_expand,
    "num_experts": lambda origin: origin.terms.num_experts,
    "expert_alignment": lambda origin: origin.terms.alignment,
    "num_max_tokens_per_rank": lambda origin: origin.terms.num_max_tokens,
    "num_sms": lambda origin: origin.terms.num_sms,
    "topk_idx": lambda origin: origin.native.topk_idx().clone(),
    "num_recv_tokens_per_expert_list": OriginOnDevice.aligned_list,
    "psum_num_recv_tokens_per_expert": lambda origin: origin.aligned().cumsum(0, dtype=torch.int32),
    "num_unaligned_recv_tokens_per_expert": OriginOnDevice.counts,
    "token_metadata_at_forward": lambda _: None,
    "channel_linked_list": lambda _: None,
    "cached_recv_src_metadata_before_sort": lambda _: None,
}


def check_on_device(context: ElasticContext, *, expands: bool) -> None:
    """Raise Unavailable for batches that are not laid out on a device yet."""
    if expands:
        check_host("an expanded batch", context.natives.device)
    if context.num_scaleup < context.num_ranks:
        check_host("a buffer whose ranks are several hosts", context.natives.device)


def dispatch_first(context: ElasticContext, plan: DispatchPlan, tokens: Tokens, *, go_on: bool) -> Dispatched:
    """Send tokens to their experts' ranks; all is launched on return, and a CUDA event stands behind it (``go_on``)."""
    idx = tokens.topk_idx
    assert idx is not None
    received = plan.native.dispatch(_wired(tokens), idx)
    native, arrived = received.handle, received.topk_idx
    assert arrived is not None
    handle = EPHandle.made(plan.kind, OriginOnDevice(context, plan, native, arrived >= 0), native.num_rows)
    if not plan.terms.keep_copy:
        handle.fields["topk_idx"] = idx
        route_of(handle, native).note("topk_idx", idx)
    return _batch(plan, tokens, received, handle, go_on=go_on)


def dispatch_again(
    context: ElasticContext, plan: DispatchPlan, tokens: Tokens, handle: EPHandle, *, go_on: bool
) -> Dispatched:
    """Send other tokens where an earlier dispatch sent its own."""
    received = plan.native.dispatch(_wired(tokens), handle=native_handle(context, handle, plan.native))
    return _batch(plan, tokens, received, handle, go_on=go_on)


def _wired(tokens: Tokens) -> Rows:
    """Return the rows, and what travels beside them: scales or weights as they are, or both as 4-byte words."""
    x, scales, _, weights = tokens
    if scales is None:
        return x if weights is None else (x, weights)
    if weights is None:
        return x, scales
    return x, torch.cat([scales.contiguous().view(torch.int32), weights.contiguous().view(torch.int32)], dim=1)


def _batch(plan: DispatchPlan, tokens: Tokens, received: Received, handle: EPHandle, *, go_on: bool) -> Dispatched:
    """Take apart what travelled beside the rows."""
    beside, event = received.scales, event_of(None, asked=go_on)
    if tokens.scales is None:
        return received.x, received.topk_idx, beside, handle, event
    assert beside is not None
    weights = beside[:, plan.num_packs :].contiguous().view(torch.float32) if plan.has_weights else None
    scales = beside[:, : plan.num_packs].contiguous().view(tokens.scales.dtype)
    if plan.terms.tma_scales:
        columns = empty_scales(scales.size(0), scales.size(1), scales.dtype, tma=True, device=scales.device)
        scales = columns.copy_(scales)
    return (received.x, scales), received.topk_idx, weights, handle, event


def combine(context: ElasticContext, ep: Calls, outputs: Outputs, handle: EPHandle, *, go_on: bool) -> Sums:
    """Bring the experts' outputs back and sum them by their columns."""
    origin = handle.source
    if not isinstance(origin, OriginOnDevice):
        check_host("a handle that is not the one which dispatch returned", context.natives.device)
    assert isinstance(origin, OriginOnDevice)
    native, weights = native_handle(context, handle, ep), outputs.topk_weights
    y = outputs.x
    if weights is None:
        return ep.combine(y, native, bias=outputs.bias, reduce="column"), None, event_of(None, asked=go_on)
    owned = torch.where(origin.served, weights, 0)
    combined = ep.combine(y, native, bias=outputs.bias, topk_weights=owned, reduce="column")
    return combined.x, combined.topk_weights, event_of(None, asked=go_on)
