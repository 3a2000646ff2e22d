"""V1's low-latency calls: a row for each (token, expert) in blocks of fixed size, weighted sums at the origin.

Legend: T tokens, H hidden, K top-k, E experts, L local experts, R ranks, P = R * Tmax rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import anyep
from anyep.compat.deep_ep.checks import check_dense, host_assert, refuse
from anyep.compat.deep_ep.indices import check_topk_idx, widened
from anyep.compat.deep_ep.masks import Masks
from anyep.compat.deep_ep.native import Kept, Natives, Underway
from anyep.exchange.wire import Wire, make_wire

HandleTuple = tuple[torch.Tensor, torch.Tensor, int, int, int]
"""(src_info int32 [L, P], layout_range int64 [L, R], Tmax, H, E)"""
_LAYOUT_RANGE = 1
"""The member by which a handle is known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatched:
    """What low_latency_dispatch returns, valid once ``underway`` has ended."""

    x: torch.Tensor
    scales: torch.Tensor | None
    count: torch.Tensor
    handle: HandleTuple
    underway: Underway


def wire_for(hidden: int, *, use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> Wire:
    """Return how rows travel. RuntimeError where flags exclude each other."""
    host_assert(not use_ue8m0 or round_scale, "use_ue8m0 needs round_scale=True: its scales are powers of two")
    if not use_fp8:
        return make_wire("bf16", "fp32", hidden)
    return make_wire("fp8", "ue8m0" if use_ue8m0 else "pow2" if round_scale else "fp32", hidden)


def dispatch(
    natives: Natives,
    masks: Masks,
    num_ranks: int,
    x: object,
    topk_idx: object,
    most_tokens: int,
    num_experts: int,
    stats: object,
    waits: object,
    wire_of: Callable[[int], Wire],
) -> Dispatched:
    """Check, and send the first half."""
    rows = check_dense("x", x, torch.bfloat16, [None, None], "[T, H]")
    idx = check_topk_idx(topk_idx, rows.size(0))
    if num_experts <= 0 or num_experts % num_ranks:
        refuse(f"num_experts={num_experts} must be a multiple of R={num_ranks}")
    if rows.size(0) > most_tokens:
        refuse(f"x has {rows.size(0)} tokens, more than num_max_dispatch_tokens_per_rank={most_tokens}")
    local = num_experts // num_ranks
    received_stats = _check_stats("cumulative_local_expert_recv_stats", stats, torch.int32, local)
    waited = _check_stats("dispatch_wait_recv_cost_stats", waits, torch.int64, num_ranks)
    ep = natives.variant(num_experts, wire_of(rows.size(1)), idx.size(1), max_tokens=most_tokens)
    natives.make_room()
    clock = WaitClock(ep, waited)
    pending = ep.dispatch(rows, masks.without(widened(idx), local), layout="padded", wait=False)
    targets = pending.targets
    if targets is None:  # without memory: all ranks refuse together
        pending.wait()
        raise AssertionError("a rank without memory refuses")
    assert targets.source_token is not None
    count, ranges = np.empty(local, np.int32), np.empty((local, num_ranks), np.int64)
    kept = Kept(ep=ep, num_experts=num_experts, num_topk=idx.size(1))

    def fill(received: anyep.Received) -> None:
        assert received.source_begin is not None
        assert received.source_count is not None
        count[:] = received.counts
        np.left_shift(received.source_begin.numpy(), 32, out=ranges, dtype=np.int64)
        np.bitwise_or(ranges, received.source_count.numpy(), out=ranges)
        kept.landed = received.handle
        if received_stats is not None:
            received_stats.add_(torch.from_numpy(count))
        clock.stop()

    kept.underway = natives.start(pending, fill)
    return Dispatched(
        x=targets.x,
        scales=targets.scales,
        count=torch.from_numpy(count),
        handle=(targets.source_token, natives.keep(ranges, kept), most_tokens, rows.size(1), num_experts),
        underway=kept.underway,
    )


def find_handle(natives: Natives, handle: object) -> tuple[Kept, tuple[int, int, int]]:
    """Return what a handle stands for, and its [L, P, H]. RuntimeError for others."""
    host_assert(
        isinstance(handle, (tuple, list)) and len(handle) == 5,
        "handle must be the tuple of 5 that low_latency_dispatch returned",
    )
    assert isinstance(handle, (tuple, list))
    return natives.find(handle[_LAYOUT_RANGE]), (*handle[0].shape, int(handle[3]))


def next_combine_buffer(natives: Natives, handle: object) -> torch.Tensor:
    """Return a BF16 tensor [L, P, H] that the next zero-copy combine of ``handle`` reads where it lies."""
    kept, _ = find_handle(natives, handle)
    kept.combine_buffer = kept.ep.empty_output(kept.handle, torch.bfloat16)
    return kept.combine_buffer


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a combine brings rows back."""

    use_logfmt: bool
    zero_copy: bool


def combine(
    natives: Natives,
    x: object,
    topk_idx: object,
    topk_weights: object,
    handle: object,
    manner: Manner,
    out: object,
    waits: object,
) -> tuple[torch.Tensor, Underway]:
    """Check, and send the first half; the sums [T, H] are valid once the second has ended."""
    kept, shape = find_handle(natives, handle)
    y = check_dense("x", x, torch.bfloat16, shape, "[L, R * Tmax, H]")
    idx = check_topk_idx(topk_idx, kept.handle.num_tokens)
    weights = check_dense("topk_weights", topk_weights, torch.float32, list(idx.shape), "[T, K]")
    _check_same_routing(idx, kept)
    target = None
    if out is not None:
        target = check_dense("out", out, torch.bfloat16, [idx.size(0), shape[2]], "[T, H]")
    if manner.zero_copy:
        host_assert(
            kept.combine_buffer is not None,
            "zero_copy=True: write the rows to get_next_low_latency_combine_buffer(handle) first",
        )
        assert kept.combine_buffer is not None
        y, kept.combine_buffer = kept.combine_buffer, None
    waited = _check_stats("combine_wait_recv_cost_stats", waits, torch.int64, kept.ep.num_ranks)
    natives.make_room()
    clock = WaitClock(kept.ep, waited)
    pending = kept.ep.combine(
        y,
        kept.handle,
        topk_weights=weights,
        out=target,
        wire="logfmt10" if manner.use_logfmt else None,
        wait=False,
    )
    assert pending.targets is not None, "a sum's place is always known"
    return pending.targets.x, natives.start(pending, lambda _: clock.stop())


def _check_same_routing(topk_idx: torch.Tensor, kept: Kept) -> None:
    """RuntimeError unless the experts are those of the dispatch; -1 may stand in place of any that were masked then."""
    sent, topk_idx = kept.handle.send.topk_idx(), widened(topk_idx)
    if torch.equal(topk_idx, sent):
        return
    same = topk_idx.shape == sent.shape and bool(((topk_idx == sent) | (sent == -1)).all())
    host_assert(same, "topk_idx must be the one that low_latency_dispatch was given")


class WaitClock:
    """Adds how long each rank was waited for, in nanoseconds, to a caller's int64 [R]."""

    def __init__(self, ep: anyep.Buffer, waits: torch.Tensor | None) -> None:
        self._ep = ep
        self._waits = waits
        self._before = None if waits is None else ep.stats().waiting_s_by_source

    def stop(self) -> None:
        """Add what was waited since."""
        if self._waits is not None and self._before is not None:
            self._waits.add_(((self._ep.stats().waiting_s_by_source - self._before) * 1e9).long())


def _check_stats(name: str, value: object, dtype: torch.dtype, size: int) -> torch.Tensor | None:
    return None if value is None else check_dense(name, value, dtype, [size], f"[{size}]")
