"""V1's low-latency combine: weighted sums of each token's rows, at its origin.

Legend: T tokens, H hidden, K top-k, E experts, L local experts, R ranks, P = R * Tmax rows of a block.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from anyep.compat.deep_ep import indices
from anyep.compat.deep_ep.checks import check_dense, host_assert, refuse
from anyep.compat.deep_ep.low_latency import WaitClock
from anyep.compat.deep_ep.low_latency_handles import Blocks, LowLatencyKept, find_handle
from anyep.compat.deep_ep.masks import Masks
from anyep.compat.deep_ep.native import Natives
from anyep.compat.deep_ep.recalled import ask_for_blocks
from anyep.compat.deep_ep.underway import Underway
from anyep.exchange.handle import Handle, SendPlan
from anyep.exchange.wire import make_wire


def _recalled(natives: Natives, masks: Masks, members: Any, topk_idx: object) -> LowLatencyKept:
    """Return what copies of members stand for; all ranks tell each other where rows went."""
    most_tokens, hidden, experts = members[2:]
    if not (isinstance(members[0], torch.Tensor) and all(isinstance(one, int) for one in members[2:])):
        refuse("handle must be the tuple that low_latency_dispatch returned, or a copy of it")
    idx = masks.without(indices.widened(indices.check_topk_idx(topk_idx)), experts // masks.num_ranks)
    native = ask_for_blocks(natives, idx, most_tokens, experts)
    ep = natives.variant(experts, make_wire("bf16", "fp32", hidden), idx.size(1), max_tokens=most_tokens)
    kept = LowLatencyKept(natives, Blocks(ep, experts, idx.size(1), most_tokens, hidden), None, None)
    kept.landed, kept.order = native, _order_of(native, members[1], masks)
    return kept


def _order_of(native: Handle, ranges: object, masks: Masks) -> torch.Tensor | None:
    """Return the order in which a block's rows stand without those of ranks masked since the dispatch; None: the same.

    RuntimeError where the rows that went are not those of ``ranges``, the second member of a handle.
    """
    came_LR = torch.from_numpy(native.send.numbers("recv_rows").reshape(masks.num_ranks, -1).T)
    told = check_dense("handle[1]", ranges, torch.int64, list(came_LR.shape), "[L, R]")
    count_LR = (told & 0xFFFFFFFF).cpu()
    masked = [rank for rank in masks.ranks if count_LR[:, rank].any()]
    expected_LR = count_LR.index_fill(1, torch.tensor(masked, dtype=torch.int64, device="cpu"), 0)
    host_assert(torch.equal(came_LR.long(), expected_LR), "handle and topk_idx must be those of one dispatch")
    if not masked:
        return None
    begin, end = (told >> 32)[:, masked, None], ((told >> 32) + (told & 0xFFFFFFFF))[:, masked, None]
    row = torch.arange(native.shape[1], device=told.device)
    gone_LP = ((row >= begin) & (row < end)).any(1)
    return gone_LP.long().argsort(dim=1, stable=True)


def next_combine_buffer(natives: Natives, handle: object) -> torch.Tensor:
    """Return a BF16 tensor [L, P, H] that the next zero-copy combine of ``handle`` reads where it lies."""
    kept = find_handle(natives, handle)
    if kept is None:
        refuse("copies of a handle do not say where rows lie: pass the one that low_latency_dispatch returned")
    kept.combine_buffer = kept.blocks.ep.empty_output(kept.handle, torch.bfloat16)
    return kept.combine_buffer


class Sum(NamedTuple):
    """Arguments of a combine."""

    x: Any
    topk_idx: Any
    topk_weights: Any
    use_logfmt: bool
    zero_copy: bool
    out: Any
    waits: Any


new_sum = partial(tuple.__new__, Sum)
"""Makes one of a tuple of all fields; the class's own constructor is a Python function, slow from cold caches."""


def combine(
    natives: Natives, masks: Masks, handle: object, given: Sum, *, go_on: bool
) -> tuple[torch.Tensor, Underway | None]:
    """Sum rows at their origins; ``go_on``: send the first half; the sums [T, H] are valid after the second."""
    kept = find_handle(natives, handle) or _recalled(natives, masks, handle, given.topk_idx)
    if given.zero_copy or natives.device is not None or not _as_dispatched(natives, kept, given):
        _check_sum(natives, kept, given)
    if given.waits is not None:
        ranks = kept.blocks.ep.num_ranks
        check_dense("combine_wait_recv_cost_stats", given.waits, torch.int64, [ranks], f"[{ranks}]")
    y = _take_combine_buffer(kept) if given.zero_copy else given.x
    if kept.order is not None:
        y = y.gather(1, kept.order.unsqueeze(2).expand(y.shape))
    try:
        return _start_sum(natives, kept, y, given) if go_on else _run_sum(kept, y, given)
    except (TypeError, ValueError):  # of this rank's tensors, or of ranks that differ
        _check_sum(natives, kept, given)
        raise


def _run_sum(kept: LowLatencyKept, y: torch.Tensor, given: Sum) -> tuple[torch.Tensor, None]:
    clock = None if given.waits is None else WaitClock(kept.blocks.ep, given.waits)
    wire = "logfmt10" if given.use_logfmt else None
    summed = kept.blocks.ep.combine(y, kept.handle, topk_weights=given.topk_weights, out=given.out, wire=wire)
    if clock is not None:
        clock.stop()
    return summed, None


def _start_sum(natives: Natives, kept: LowLatencyKept, y: torch.Tensor, given: Sum) -> tuple[torch.Tensor, Underway]:
    natives.make_room()
    clock = WaitClock(kept.blocks.ep, given.waits)
    wire = "logfmt10" if given.use_logfmt else None
    pending = kept.blocks.ep.combine(
        y, kept.handle, topk_weights=given.topk_weights, out=given.out, wire=wire, wait=False
    )
    assert pending.targets is not None, "a sum's place is always known"
    return pending.targets.x, natives.start(pending, lambda _: clock.stop())


def _as_dispatched(natives: Natives, kept: LowLatencyKept, given: Sum) -> bool:
    """Return whether all is right that the native combine does not check: rows in bfloat16, the dispatch's experts."""
    x, idx, weights = given[:3]
    if type(x) is not torch.Tensor or x.dtype is not torch.bfloat16 or weights is None:
        return False
    plan = kept.handle.send
    if idx is not kept.topk_idx and not _has_kind(idx, plan):
        return False
    num_bytes = plan.num_tokens * plan.geometry.num_topk * plan.idx_bytes
    same: bool = idx.nbytes == num_bytes and natives.loops.same_bytes(idx.data_ptr(), plan.idx_addr, num_bytes)
    return same


def _has_kind(idx: object, plan: SendPlan) -> bool:
    """Return whether a tensor is such as the dispatch's topk_idx, whatever it says."""
    return (
        type(idx) is torch.Tensor
        and idx.dtype is indices.topk_idx_t
        and idx.itemsize == plan.idx_bytes
        and idx.shape == (plan.num_tokens, plan.geometry.num_topk)
        and idx.is_cpu
        and idx.is_contiguous()
    )


def _check_sum(natives: Natives, kept: LowLatencyKept, given: Sum) -> None:
    """Check a combine's tensors. RuntimeError."""
    check_dense("x", given.x, torch.bfloat16, [*kept.handle.shape, kept.blocks.hidden], "[L, R * Tmax, H]")
    idx = indices.check_topk_idx(given.topk_idx, kept.handle.num_tokens)
    check_dense("topk_weights", given.topk_weights, torch.float32, list(idx.shape), "[T, K]")
    if natives.device is None:  # on a GPU nobody waits for what it has
        _check_same_routing(idx, kept)
    if given.out is not None:
        check_dense("out", given.out, torch.bfloat16, [idx.size(0), kept.blocks.hidden], "[T, H]")


def _take_combine_buffer(kept: LowLatencyKept) -> torch.Tensor:
    buffer, kept.combine_buffer = kept.combine_buffer, None
    if buffer is None:
        refuse("zero_copy=True: write the rows to get_next_low_latency_combine_buffer(handle) first")
    return buffer


def _check_same_routing(topk_idx: torch.Tensor, kept: LowLatencyKept) -> None:
    """RuntimeError unless the experts are those of the dispatch; -1 may stand in place of any that were masked then."""
    sent, topk_idx = kept.handle.send.topk_idx(), indices.widened(topk_idx)
    if torch.equal(topk_idx, sent):
        return
    same = topk_idx.shape == sent.shape and bool(((topk_idx == sent) | (sent == -1)).all())
    host_assert(same, "topk_idx must be the one that low_latency_dispatch was given")
