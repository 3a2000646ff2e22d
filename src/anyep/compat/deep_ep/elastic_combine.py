"""A V2 combine, bit by bit in upstream's order of sums.

::

    stage A   expanded rows of a token at this rank, in column order      rounded    with several reductions
    stage B   the ranks of a host, by their master columns                rounded    with several reductions and hosts
    last      biases, then what remains, by master columns                rounded    at the origin

A rank's or host's *master column* is the last of a token's columns that it serves. Stage A is the owners' work, before
rows travel; a forwarder of each host does stage B. Each stage sums in fp32 and rounds once to bfloat16.

Legend: T tokens, H hidden, K top-k, N rows of the exchange, O hosts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from anyep.compat.deep_ep.elastic_context import ElasticContext
from anyep.compat.deep_ep.elastic_landing import checked_metadata, served_rows
from anyep.compat.deep_ep.elastic_routes import native_handle, rows_by_expert, static_rows_of
from anyep.compat.deep_ep.elastic_rows import places_from_handle, rows_without_gaps
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.compat.deep_ep.events import EventOverlap
from anyep.compat.deep_ep.underway import event_of
from anyep.exchange.calls import Calls
from anyep.exchange.handle import Handle
from anyep.exchange.wire import carrying_wire
from anyep.kernels.spec import Element, KernelSet


class Outputs(NamedTuple):
    """What the experts of a rank return, checked."""

    x: torch.Tensor
    """bfloat16 [rows, H]: a row for each of the batch"""
    topk_weights: torch.Tensor | None
    """fp32 [rows, K], or [rows] of an expanded batch"""
    bias: tuple[torch.Tensor, ...]
    """up to two, bfloat16 [T, H]"""


Sums = tuple[torch.Tensor, torch.Tensor | None, EventOverlap]
"""What combine returns."""


def combine(context: ElasticContext, ep: Calls, outputs: Outputs, handle: EPHandle, *, go_on: bool = False) -> Sums:
    """Bring the experts' outputs back and sum them, with the buffer of :func:`buffer_for_sums`.

    ``go_on``: return when the first half was sent.
    """
    kind = handle.kind
    if kind.do_expand and not context.several_sums:
        return _sum_columns(context, ep, outputs, handle, go_on)
    native = native_handle(context, handle, ep)
    places = places_from_handle(handle, context.num_ranks)
    y, weights = outputs.x, outputs.topk_weights
    if kind.do_expand or weights is not None:
        num_valid = int(native.pair_rows[:, context.number].sum())
        served = served_rows(checked_metadata(handle, num_valid), places)
        if weights is not None:
            weights = _owned_weights(context, weights, served, native.num_rows)
    if kind.do_expand:
        y = ep.empty_output(native, torch.bfloat16)
        _sum_rows(context.kernels, outputs.x, served, (), y)
    elif places is not None:
        y = y[places]
    elif y.shape[0] != native.num_rows:
        y = y[: native.num_rows]
    group = ranks_summed_first(context)
    if go_on:
        return _start(context, ep, y, native, weights, outputs.bias, group=group)
    if weights is None:
        return ep.combine(y, native, bias=outputs.bias, reduce="column", group=group), None, EventOverlap()
    combined = ep.combine(y, native, bias=outputs.bias, topk_weights=weights, reduce="column", group=group)
    return combined.x, combined.topk_weights, EventOverlap()


def ranks_summed_first(context: ElasticContext) -> int:
    """Return how many consecutive ranks get a sum of their own, which is rounded; 0: none."""
    return context.num_scaleup if context.several_sums and context.num_scaleup < context.num_ranks else 0


def buffer_for_sums(context: ElasticContext, hidden: int, handle: EPHandle) -> Calls:
    """Return the buffer that sums rows of ``hidden`` bfloat16."""
    wire = carrying_wire(torch.bfloat16, hidden, 0, torch.float32, by_column=True)
    kind = handle.kind
    return context.natives.variant(kind.num_experts, wire, kind.num_topk, static_rows=static_rows_of(context, kind))


def _start(
    context: ElasticContext,
    ep: Calls,
    y: torch.Tensor,
    native: Handle,
    weights: torch.Tensor | None,
    bias: tuple[torch.Tensor, ...],
    *,
    reduce: str = "column",
    group: int = 0,
) -> Sums:
    """Send the first half."""
    context.natives.make_room()
    pending = ep.combine(y, native, bias=bias, topk_weights=weights, reduce=reduce, group=group, wait=False)
    targets = pending.targets
    assert targets is not None, "a sum's place is always known"
    return targets.x, targets.topk_weights, event_of(context.natives.start(pending))


def _sum_columns(context: ElasticContext, ep: Calls, outputs: Outputs, handle: EPHandle, go_on: bool) -> Sums:
    """One sum only of an expanded batch: every row travels, and they are added in column order."""
    known, y = rows_by_expert(context, handle, ep), outputs.x
    if y.shape[0] != known.num_rows:
        y = y[rows_without_gaps(known.counts, handle.expert_alignment)] if ep.num_hosts > 1 else y[: known.num_rows]
    if go_on:
        return _start(context, ep, y, known, None, outputs.bias, reduce="expert")
    return ep.combine(y, known, bias=outputs.bias, reduce="expert"), None, EventOverlap()


def _sum_rows(
    kernels: KernelSet, x: torch.Tensor, rows: torch.Tensor, bias: tuple[torch.Tensor, ...], out: torch.Tensor
) -> None:
    """out[n] = biases + the rows of ``x`` that ``rows`` int32 [n, W] names, in its order; -1 names none."""
    ranks = rows.clamp(max=0)  # 0 where a row is named, -1 where none is
    table = torch.tensor([x.data_ptr()], dtype=torch.int64, device="cpu")
    entries = (rows.shape[1], 0, ranks.data_ptr(), rows.data_ptr(), table.data_ptr())
    bias0, bias1 = [*(one.data_ptr() for one in bias), 0, 0][:2]
    kernels.reduce(int(Element.BF16), x.shape[1], 0, rows.shape[0], *entries, 0, bias0, bias1, out.data_ptr())
    kernels.fence()


def _owned_weights(context: ElasticContext, weights: torch.Tensor, served: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return fp32 [N, K]: this rank's value in the columns that it serves, 0 elsewhere, so that a sum picks them."""
    num_valid, num_topk = served.shape
    owned = torch.empty((num_rows, num_topk), dtype=torch.float32, device="cpu")
    owned[num_valid:] = 0
    by_column = int(weights.dim() == 2)
    context.loops.gather_weights(
        num_valid, num_topk, served.data_ptr(), by_column, weights.data_ptr(), owned.data_ptr()
    )
    return owned
