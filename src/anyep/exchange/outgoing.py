"""The sending half of a dispatch before a word is exchanged: check the caller's tensors, decide who gets what.

An error here is this rank's own; it costs the others nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.exchange.arguments import check_tensor
from anyep.exchange.crossing import Crossing
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.geometry import Geometry
from anyep.exchange.handle import Handle, SendPlan
from anyep.exchange.routing import order_entries, plan_of
from anyep.exchange.wire import Rows, check_rows

_IDX_DTYPES = (torch.int64, torch.int32)
_WEIGHTS_DTYPES = (torch.float32,)


class Outgoing(NamedTuple):
    """A checked and routed batch, ready to be announced."""

    rows: Rows
    topk_weights: torch.Tensor | None
    geometry: Geometry
    """of this batch; a cached dispatch may have weights where the first had none"""
    plan: SendPlan
    layout: str
    cached: Handle | None


def prepare(
    end: Endpoint,
    x: object,
    topk_idx: object,
    topk_weights: object,
    *,
    layout: str,
    expert_rows: object = None,
    make: Callable[[Endpoint, torch.Tensor, Geometry], SendPlan] | None = None,
) -> Outgoing:
    """Check the caller's tensors and decide who gets what (``make``; None: :func:`make_plan`).

    Raises TypeError and ValueError; exchanges nothing.
    """
    rows = check_rows(end.wire, x, end.where)
    num_tokens = rows.num_tokens
    if num_tokens > end.max_tokens:
        raise ValueError(
            f"x has {num_tokens} tokens, but this buffer was made with max_tokens_per_rank={end.max_tokens}; "
            "split the batch or make a larger buffer"
        )
    shape = (num_tokens, end.num_topk)
    idx = check_tensor("topk_idx", topk_idx, dtypes=_IDX_DTYPES, shape=shape, legend="[T, num_topk]", device=end.where)
    weights = _check_weights(end, topk_weights, shape)
    geometry = end.geometry(layout, idx.itemsize, weights is not None)
    plan = (make or make_plan)(end, idx, geometry)
    if expert_rows is not None:
        plan.numbers("expert_rows")[:] = _check_expert_rows(end, expert_rows, geometry)
    return Outgoing(
        rows=rows,
        topk_weights=weights,
        geometry=geometry,
        plan=plan,
        layout=layout,
        cached=None,
    )


def prepare_cached(end: Endpoint, x: object, topk_idx: object, topk_weights: object, handle: Handle) -> Outgoing:
    """Check tensors that take the way of an earlier dispatch."""
    if topk_idx is not None:
        raise ValueError("topk_idx must be None when a handle is given: the handle knows where the tokens go")
    rows = check_rows(end.wire, x, end.where)
    if rows.num_tokens != handle.num_tokens:
        raise ValueError(f"x has {rows.num_tokens} tokens, but the handle's dispatch sent {handle.num_tokens}")
    weights = _check_weights(end, topk_weights, (handle.num_tokens, end.num_topk))
    return Outgoing(
        rows=rows,
        topk_weights=weights,
        geometry=end.geometry(handle.layout, handle.send.idx_bytes, weights is not None),
        plan=handle.send,
        layout=handle.layout,
        cached=handle,
    )


def _check_expert_rows(end: Endpoint, expert_rows: object, geometry: Geometry) -> NDArray[np.int32]:
    if geometry.by_expert:
        raise ValueError("expert_rows goes with layout='compact'; other layouts count what topk_idx says")
    shape = (end.placement.num_experts,)
    counts: NDArray[np.int32] = check_tensor(
        "expert_rows", expert_rows, dtypes=(torch.int32,), shape=shape, legend="[num_experts]"
    ).numpy()
    return counts


def _check_weights(end: Endpoint, topk_weights: object, shape: tuple[int, int]) -> torch.Tensor | None:
    if topk_weights is None:
        return None
    legend = "[T, num_topk]"
    return check_tensor(
        "topk_weights", topk_weights, dtypes=_WEIGHTS_DTYPES, shape=shape, legend=legend, device=end.where
    )


def make_plan(end: Endpoint, topk_idx: torch.Tensor, geometry: Geometry) -> SendPlan:
    """Copy topk_idx and route it. ValueError for an expert that does not exist."""
    plan = plan_of(end, geometry, topk_idx.data_ptr(), topk_idx.shape[0])
    order_entries(end, plan)
    if end.across is not None:
        plan.crossing = Crossing(end.across, end.kernels, plan, end.hidden * end.wire.output_dtype.itemsize)
    return plan
