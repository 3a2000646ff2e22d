"""The sending half of a dispatch before a word is exchanged: check the caller's tensors, decide who gets what.

An error here is this rank's own; it costs the others nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anyep.exchange.arguments import check_tensor
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.handle import Handle, SendPlan
from anyep.exchange.wire import Rows, check_rows

_IDX_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Outgoing:
    """A checked and routed batch, ready to be announced."""

    rows: Rows
    topk_weights: torch.Tensor | None
    plan: SendPlan
    layout: str
    static_rows: int | None
    cached: Handle | None


def prepare(
    end: Endpoint, x: object, topk_idx: object, topk_weights: object, *, layout: str, static_rows: int | None
) -> Outgoing:
    """Check the caller's tensors and decide who gets what. Raises TypeError and ValueError; exchanges nothing."""
    rows = check_rows(end.wire, x)
    _check_num_tokens(end, rows.num_tokens)
    shape = [rows.num_tokens, end.num_topk]
    idx = check_tensor("topk_idx", topk_idx, dtypes=_IDX_DTYPES, shape=shape, legend="[T, num_topk]")
    return Outgoing(
        rows=rows,
        topk_weights=_check_weights(topk_weights, shape),
        plan=_route(end, idx, by_expert=layout == "expert"),
        layout=layout,
        static_rows=static_rows,
        cached=None,
    )


def prepare_cached(end: Endpoint, x: object, topk_idx: object, topk_weights: object, handle: Handle) -> Outgoing:
    """Check tensors that take the way of an earlier dispatch."""
    if topk_idx is not None:
        raise ValueError("topk_idx must be None when a handle is given: the handle knows where the tokens go")
    rows = check_rows(end.wire, x)
    if rows.num_tokens != handle.num_tokens:
        raise ValueError(f"x has {rows.num_tokens} tokens, but the handle's dispatch sent {handle.num_tokens}")
    return Outgoing(
        rows=rows,
        topk_weights=_check_weights(topk_weights, [handle.num_tokens, end.num_topk]),
        plan=handle.send,
        layout=handle.layout,
        static_rows=handle.static_rows,
        cached=handle,
    )


def _check_num_tokens(end: Endpoint, num_tokens: int) -> None:
    if num_tokens > end.max_tokens:
        raise ValueError(
            f"x has {num_tokens} tokens, but this buffer was made with max_tokens_per_rank={end.max_tokens}; "
            "split the batch or make a larger buffer"
        )


def _check_weights(topk_weights: object, shape: list[int]) -> torch.Tensor | None:
    if topk_weights is None:
        return None
    return check_tensor("topk_weights", topk_weights, dtypes=[torch.float32], shape=shape, legend="[T, num_topk]")


def _route(end: Endpoint, topk_idx: torch.Tensor, *, by_expert: bool) -> SendPlan:
    num_tokens, num_topk = topk_idx.shape
    width = num_topk if by_expert else min(num_topk, end.num_ranks)
    num_experts = end.placement.num_experts
    plan = SendPlan(
        num_tokens=num_tokens,
        width=width,
        by_expert=by_expert,
        topk_idx=topk_idx.clone(),
        entry_rank=torch.empty((num_tokens, width), dtype=torch.int32, device="cpu"),
        entry_row=torch.empty((num_tokens, width), dtype=torch.int32, device="cpu"),
        rank_rows=torch.empty(end.num_ranks, dtype=torch.int32, device="cpu"),
        expert_rows=torch.empty(num_experts, dtype=torch.int32, device="cpu"),
    )
    scratch = torch.empty(end.num_ranks + num_experts, dtype=torch.int32, device="cpu")
    bad = end.kernels.route(
        plan.topk_idx.data_ptr(),
        topk_idx.itemsize,
        num_tokens,
        num_topk,
        num_experts,
        end.num_ranks,
        end.tables.rank_E.data_ptr(),
        int(by_expert),
        plan.entry_rank.data_ptr(),
        plan.entry_row.data_ptr(),
        plan.rank_rows.data_ptr(),
        plan.expert_rows.data_ptr(),
        scratch.data_ptr(),
    )
    if bad >= 0:
        token, column = divmod(bad, num_topk)
        value = int(topk_idx[token, column])
        raise ValueError(
            f"topk_idx[{token}, {column}] is {value}; experts are 0 to {num_experts - 1}, and -1 means none"
        )
    return plan
