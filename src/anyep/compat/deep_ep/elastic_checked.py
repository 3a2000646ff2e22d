"""Calls of a kind that passed its checks once go straight to their buffer: checks in full cost as long as moving rows.

A kind is everything that the checks look at, but for memory order and device: these the native call refuses itself,
before it sends a word, and the call is then checked in full.
"""

from __future__ import annotations

from typing import Any

import torch

from anyep.compat.deep_ep.checks import host_assert
from anyep.compat.deep_ep.elastic_arguments import Terms, check_outputs, check_routing, check_tokens, unpack_bias
from anyep.compat.deep_ep.elastic_combine import Outputs, buffer_for_sums
from anyep.compat.deep_ep.elastic_context import ElasticContext
from anyep.compat.deep_ep.elastic_landing import DispatchPlan, Tokens
from anyep.compat.deep_ep.elastic_routes import static_rows_of
from anyep.compat.deep_ep.ep_handle import EPHandle, HandleKind
from anyep.exchange.calls import Calls
from anyep.exchange.wire import carrying_wire


def key_of_dispatch(
    x: Any, topk_idx: Any, topk_weights: Any, stats: Any, handle: EPHandle | None, options: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Return the kind of a dispatch; None for what are no tensors. Weights alone the native call refuses itself."""
    try:
        rows = x
        beside: tuple[Any, ...] = (topk_weights is None,)
        if type(x) is tuple:
            rows, scales = x
            beside = (scales.shape, scales.dtype, *_kind_of(topk_weights))
        routing = (topk_idx.shape, topk_idx.dtype) if handle is None else (handle.kind, topk_idx is None)
        counters = _kind_of(stats) if stats is not None else None
        return rows.shape, rows.dtype, beside, routing, counters, options
    except (AttributeError, TypeError, ValueError):
        return None


def _kind_of(tensor: Any) -> tuple[Any, ...]:
    return () if tensor is None else (tensor.shape, tensor.dtype)


def key_of_combine(
    x: Any, topk_weights: Any, bias: Any, handle: EPHandle, num_sms: int, num_qps: int
) -> tuple[Any, ...] | None:
    """Return the kind of a combine; None where there are biases, or what are no tensors."""
    if bias is not None:
        return None
    try:
        weights = None if topk_weights is None else (topk_weights.shape, topk_weights.dtype)
        kind = handle.kind
        rows = handle.num_rows if kind.do_expand else handle.fields["num_recv_tokens"]
        return "sum", kind, rows, x.shape, x.dtype, weights, num_sms, num_qps
    except AttributeError:
        return None


def are_plain(*tensors: Any) -> bool:
    """Return whether all are dense CPU tensors, or None: a call of a known kind that fails has another reason then."""
    return all(
        tensor is None or (type(tensor) is torch.Tensor and tensor.is_cpu and tensor.is_contiguous())
        for tensor in tensors
    )


def check_dispatch(
    context: ElasticContext, x: Any, topk_idx: Any, topk_weights: Any, handle: EPHandle | None, terms: Terms
) -> tuple[DispatchPlan, Tokens]:
    """Check a dispatch's tensors and return the buffer that moves such rows. RuntimeError."""
    idx = None if topk_idx is None else check_routing(topk_idx)
    kind = _kind_of_new(context, idx, terms) if handle is None else handle.kind
    rows, scales, weights = check_tokens(x, (kind.num_tokens, kind.num_topk), topk_weights, terms)
    host_assert(
        terms.num_experts % context.num_ranks == 0,
        f"num_experts={terms.num_experts} must be a multiple of the number of ranks, {context.num_ranks}",
    )
    context.natives.settle_on(rows)  # for good: behind all checks
    packs = 0 if scales is None else scales.shape[1]
    columns, dtype = _beside(scales, weights)
    wire = carrying_wire(rows.dtype, rows.shape[1], columns, dtype, by_column=True)
    static = static_rows_of(context, kind)
    native = context.natives.variant(
        terms.num_experts, wire, kind.num_topk, static_rows=static, source_tokens=handle is None
    )
    lands = not terms.do_expand and context.keeps_order and not (packs and (weights is not None or terms.tma_scales))
    return DispatchPlan(native, terms, packs, weights is not None, kind, lands), Tokens(rows, scales, idx, weights)


def _kind_of_new(context: ElasticContext, idx: torch.Tensor | None, terms: Terms) -> HandleKind:
    assert idx is not None, "the terms were agreed with a handle, or with indices"
    return HandleKind(
        num_experts=terms.num_experts,
        num_max_tokens_per_rank=terms.num_max_tokens,
        expert_alignment=terms.alignment,
        do_expand=terms.do_expand,
        num_sms=terms.num_sms,
        num_tokens=idx.shape[0],
        num_topk=idx.shape[1],
        static_rows=-1 if terms.exact else context.num_ranks * terms.num_max_tokens,
    )


def _beside(scales: torch.Tensor | None, weights: torch.Tensor | None) -> tuple[int, torch.dtype]:
    """Return how many columns travel beside a row, and of which dtype: elastic_dispatch.py has why."""
    if scales is None:
        return (0 if weights is None else weights.shape[1]), torch.float32
    if weights is None:
        return scales.shape[1], scales.dtype
    return scales.shape[1] + weights.shape[1], torch.int32


def check_combine(
    context: ElasticContext, x: Any, handle: EPHandle, topk_weights: Any, bias: object
) -> tuple[Calls, Outputs]:
    """Check a combine's tensors and return the buffer that sums such rows. RuntimeError."""
    checked, weights = check_outputs(x, handle, topk_weights, several_sums=context.several_sums)
    biases = unpack_bias(bias, handle.kind.num_tokens, checked.shape[1])
    context.natives.settle_on(checked)  # where the handle is another buffer's, this may be the first call
    return buffer_for_sums(context, checked.shape[1], handle), Outputs(checked, weights, biases)
