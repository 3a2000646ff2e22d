"""V1's dispatch and combine: compact batches in the order (source rank, source token)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import anyep
from anyep.compat.deep_ep.checks import check_cpu, check_dense, host_assert, refuse
from anyep.compat.deep_ep.domains import Domain
from anyep.compat.deep_ep.handles import HandleTuple, find_handle, make_handle
from anyep.compat.deep_ep.indices import check_topk_idx, widened
from anyep.compat.deep_ep.native import Kept, Natives, Underway
from anyep.exchange.wire import Wire, carrying_wire

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_SCALE_DTYPES = (torch.float32, torch.int32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Arguments of a dispatch that is not cached, checked."""

    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_tokens_per_rank: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor
    worst_tokens: int
    alignment: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """What every call of a rank needs."""

    natives: Natives
    domain: Domain
    rank: int


def check_rows(x: object) -> tuple[Rows, Wire]:
    """Return rows [T, H] of any dtype, or 1-byte rows with scales [T, P], and the wire they travel on."""
    if not isinstance(x, tuple):
        rows = check_dense("x", x, None, [None, None], "[T, H]")
        return rows, carrying_wire(rows.dtype, rows.size(1), 0, torch.float32)
    host_assert(len(x) == 2, f"x must be a tensor or (x, x_scales), got a tuple of {len(x)}")
    rows = check_dense("x", x[0], None, [None, None], "[T, H]")
    scales = x[1]
    check_cpu("x_scales", scales)
    host_assert(rows.itemsize == 1, f"x with scales must have elements of 1 byte, got {rows.dtype}")
    host_assert(
        isinstance(scales, torch.Tensor) and scales.dim() == 2 and scales.dtype in _SCALE_DTYPES,
        "x_scales must be a float32 or int32 tensor [T, P]",
    )
    host_assert(scales.size(0) == rows.size(0), f"x_scales has {scales.size(0)} rows for {rows.size(0)} of x")
    host_assert(scales.size(1) > 0, "x_scales has no columns; pass x alone")
    return (rows, scales), carrying_wire(rows.dtype, rows.size(1), scales.size(1), scales.dtype)


def check_batch(
    x: Rows,
    domain: Domain,
    *,
    topk_idx: object,
    topk_weights: object,
    num_tokens_per_rank: object,
    num_tokens_per_expert: object,
    is_token_in_rank: object,
    worst_tokens: int,
    alignment: int,
) -> Batch:
    """Check what get_dispatch_layout gives, and the routing. AssertionError, RuntimeError."""
    given = (num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert)
    assert all(one is not None for one in given), (
        "without a handle, dispatch needs num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert: "
        "get_dispatch_layout returns them"
    )
    tokens, ranks = (x[0] if isinstance(x, tuple) else x).size(0), domain.num_ranks
    inside = check_dense("is_token_in_rank", is_token_in_rank, torch.bool, [tokens, ranks], "[T, R]")
    per_rank = check_dense("num_tokens_per_rank", num_tokens_per_rank, torch.int32, [ranks], "[R]")
    per_expert = check_dense("num_tokens_per_expert", num_tokens_per_expert, torch.int32, [None], "[E]")
    experts = per_expert.size(0)
    if experts <= 0 or experts % ranks:
        refuse(f"the number of experts, {experts}, must be a multiple of R={ranks}")
    if alignment < 1:
        refuse(f"expert_alignment must be at least 1, got {alignment}")
    host_assert((topk_idx is None) == (topk_weights is None), "pass both topk_idx and topk_weights, or neither")
    idx = weights = None
    if topk_idx is not None:
        idx = check_topk_idx(topk_idx, tokens)
        weights = check_dense("topk_weights", topk_weights, torch.float32, list(idx.shape), "[T, K]")
    host_assert(worst_tokens == 0 or idx is not None, "num_worst_tokens needs topk_idx: it marks the rows of the tail")
    return Batch(
        topk_idx=idx,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_expert=per_expert,
        is_token_in_rank=inside,
        worst_tokens=worst_tokens,
        alignment=alignment,
    )


def dispatch(
    side: Side, x: Rows, wire: Wire, batch: Batch, channels: int
) -> tuple[Rows, torch.Tensor | None, torch.Tensor | None, list[int], HandleTuple]:
    """Send rows; return what V1 returns but for the event."""
    experts = batch.num_tokens_per_expert.size(0)
    static_rows = batch.worst_tokens or None
    if batch.topk_idx is None:
        idx, expert_rows = _ranks_as_experts(batch.is_token_in_rank, experts), batch.num_tokens_per_expert
    else:
        idx, expert_rows = widened(batch.topk_idx), None
    topk = idx.size(1)
    if topk == 0:
        raise RuntimeError("Assertion exception: topk_idx must have at least one column")
    ep = side.natives.variant(experts, wire, topk, static_rows=static_rows)
    received = ep.dispatch(x, idx, batch.topk_weights, expert_rows=expert_rows)
    _check_counts(received, batch)
    kept = Kept(ep=ep, num_experts=experts, num_topk=topk, static_rows=static_rows, landed=received.handle)
    handle = make_handle(side.natives, kept, received, batch.is_token_in_rank, side.domain, side.rank, channels)
    counts = [] if static_rows else _rounded(received.counts, batch.alignment)
    recv_idx = None
    if batch.topk_idx is not None:
        recv_idx = received.topk_idx
        if recv_idx is not None and recv_idx.dtype != batch.topk_idx.dtype:
            recv_idx = recv_idx.to(batch.topk_idx.dtype)
    return _rows_of(received), recv_idx, received.topk_weights, counts, handle


def dispatch_again(side: Side, x: Rows, wire: Wire, handle: object) -> Rows:
    """Send other rows where an earlier dispatch sent its own."""
    kept, _, _ = find_handle(side.natives, handle)
    ep = side.natives.variant(kept.num_experts, wire, kept.num_topk, static_rows=kept.static_rows)
    tokens = (x[0] if isinstance(x, tuple) else x).size(0)
    if tokens != kept.handle.num_tokens:
        refuse(f"x has {tokens} tokens, the handle's dispatch {kept.handle.num_tokens}")
    return _rows_of(ep.dispatch(x, handle=kept.handle))


def _rows_of(received: anyep.Received) -> Rows:
    return received.x if received.scales is None else (received.x, received.scales)


def _ranks_as_experts(inside: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return int32 [T, R]: each rank's first expert where the token goes there, else -1."""
    ranks = inside.size(1)
    first = torch.arange(0, num_experts, num_experts // ranks, dtype=torch.int32, device="cpu")
    return first.masked_fill(~inside, -1) if inside.size(0) else inside.int()


def _check_counts(received: anyep.Received, batch: Batch) -> None:
    """RuntimeError where the caller's counts are not those of the rows that went out."""
    sent = received.handle.send.numbers("rank_rows")
    given = batch.num_tokens_per_rank.numpy()
    if sent.tobytes() != given.tobytes():
        refuse(f"num_tokens_per_rank is {given.tolist()}, but the tokens sent are {sent.tolist()}")


def _rounded(counts: list[int], alignment: int) -> list[int]:
    return counts if alignment == 1 else [-(-count // alignment) * alignment for count in counts]


@dataclass(frozen=True, kw_only=True, eq=False)
class Summed:
    """What combine returns; ``underway`` if it is not over."""

    x: torch.Tensor
    topk_weights: torch.Tensor | None
    underway: Underway | None


def check_bias(bias: object, num_tokens: int, hidden: int) -> list[torch.Tensor]:
    """Return none, one or two biases [T, H]. RuntimeError for others."""
    if bias is None:
        return []
    given: tuple[Any, ...] = tuple(bias) if isinstance(bias, (tuple, list)) else (bias,)
    host_assert(
        not isinstance(bias, (tuple, list)) or len(given) == 2, f"bias must be a tensor or two, got {len(given)}"
    )
    return [check_dense("bias", one, torch.bfloat16, [num_tokens, hidden], "[T, H]") for one in given]


def combine(side: Side, x: object, handle: object, topk_weights: object, bias: object, *, go_on: bool) -> Summed:
    """Sum rows at their origins; ``go_on``: return before that is over."""
    kept, _, _ = find_handle(side.natives, handle)
    y = check_dense("x", x, None, [kept.handle.num_rows, None], "[N, H]")
    if y.dtype != torch.bfloat16:
        refuse(f"Unsupported type: combine takes bfloat16 rows, got {y.dtype}")
    weights = None
    if topk_weights is not None:
        weights = check_dense("topk_weights", topk_weights, torch.float32, [y.size(0), None], "[N, K]")
    wire = carrying_wire(y.dtype, y.size(1), 0, torch.float32)
    topk = weights.size(1) if weights is not None else kept.num_topk
    ep = side.natives.variant(kept.num_experts, wire, topk, static_rows=kept.static_rows)
    biases = check_bias(bias, kept.handle.num_tokens, y.size(1))
    group = side.domain.per_host if side.domain.crosses_hosts else 0
    if not go_on:
        summed = ep.combine(y, kept.handle, topk_weights=weights, bias=biases, group=group)
        if isinstance(summed, torch.Tensor):
            return Summed(x=summed, topk_weights=None, underway=None)
        return Summed(x=summed.x, topk_weights=summed.topk_weights, underway=None)
    side.natives.make_room()
    pending = ep.combine(y, kept.handle, topk_weights=weights, bias=biases, group=group, wait=False)
    targets = pending.targets
    assert targets is not None, "a sum's place is always known"
    return Summed(x=targets.x, topk_weights=targets.topk_weights, underway=side.natives.start(pending))
