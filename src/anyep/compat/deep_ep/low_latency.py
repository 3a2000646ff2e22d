"""V1's low-latency calls: a row for each (token, expert) in blocks of fixed size, weighted sums at the origin.

Legend: T tokens, H hidden, K top-k, E experts, L local experts, R ranks, P = R * Tmax rows of a block.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch

import anyep
from anyep.compat.deep_ep import indices
from anyep.compat.deep_ep.checks import check_dense, host_assert, refuse
from anyep.compat.deep_ep.lazy_tuple import LazyTuple
from anyep.compat.deep_ep.masks import Masks
from anyep.compat.deep_ep.native import LowLatencyKept, Natives
from anyep.compat.deep_ep.recalled import ask_for_blocks
from anyep.compat.deep_ep.underway import Underway
from anyep.exchange.handle import Handle
from anyep.exchange.wire import Wire, make_wire

_MEMBERS = 5
_LAYOUT_RANGE = 1
"""The member by which a handle is known."""


class Origin(NamedTuple):
    """What a handle's members are made from."""

    natives: Natives
    kept: LowLatencyKept
    token: torch.Tensor
    """int32 [L, P]"""
    request: Request


class LowLatencyHandle(LazyTuple):
    """(src_info int32 [L, P], layout_range int64 [L, R], Tmax, H, E); a range is (first row << 32) | rows."""

    origin: Origin

    def _make(self) -> tuple[Any, ...]:
        natives, kept, token, request = self.origin
        ranks = kept.ep.num_ranks
        ranges = np.empty((request.num_experts // ranks, ranks), np.int64)
        kept.ranges = weakref.ref(ranges)
        _fill_ranges(kept)
        return token, natives.keep(ranges, kept), request.most_tokens, kept.hidden, request.num_experts


def _fill_ranges(kept: LowLatencyKept) -> None:
    """Fill what was looked at, once it is known: called when either comes true."""
    ranges = None if kept.ranges is None else kept.ranges()
    if kept.sources is None or ranges is None:
        return
    begin, count = kept.sources
    np.left_shift(begin.numpy(), 32, out=ranges, dtype=np.int64)
    np.bitwise_or(ranges, count.numpy(), out=ranges)


class Request(NamedTuple):
    """Arguments of a dispatch."""

    x: Any
    topk_idx: Any
    most_tokens: int
    num_experts: int
    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool

    def kind(self) -> tuple[Any, ...] | None:
        """Return what :meth:`check` depends on; the native dispatch checks the tensors' memory order itself."""
        x, idx = self.x, self.topk_idx
        if type(x) is not torch.Tensor or type(idx) is not torch.Tensor:
            return None
        return (x.shape, x.dtype, idx.shape, idx.dtype, *self[2:])

    def check(self, num_ranks: int) -> Wire:
        """Return how rows travel. RuntimeError."""
        most_tokens, experts = self.most_tokens, self.num_experts
        rows = check_dense("x", self.x, torch.bfloat16, [None, None], "[T, H]")
        indices.check_topk_idx(self.topk_idx, rows.size(0))
        if experts <= 0 or experts % num_ranks:
            refuse(f"num_experts={experts} must be a multiple of R={num_ranks}")
        if rows.size(0) > most_tokens:
            refuse(f"x has {rows.size(0)} tokens, more than num_max_dispatch_tokens_per_rank={most_tokens}")
        return wire_for(rows.size(1), use_fp8=self.use_fp8, round_scale=self.round_scale, use_ue8m0=self.use_ue8m0)


class Statistics(NamedTuple):
    """What a caller wants added up: int32 [L] rows of each expert, int64 [R] nanoseconds waited for each rank."""

    received: Any
    waits: Any

    def check(self, num_experts: int, num_ranks: int) -> None:
        """RuntimeError for tensors of another kind."""
        if self.received is not None:
            local = num_experts // num_ranks
            check_dense("cumulative_local_expert_recv_stats", self.received, torch.int32, [local], f"[{local}]")
        if self.waits is not None:
            check_dense("dispatch_wait_recv_cost_stats", self.waits, torch.int64, [num_ranks], f"[{num_ranks}]")


class Dispatched(NamedTuple):
    """What low_latency_dispatch returns; ``underway`` if it is not over."""

    rows: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    counts: torch.Tensor
    handle: LowLatencyHandle
    underway: Underway | None = None


def dispatch(
    natives: Natives, masks: Masks, request: Request, statistics: Statistics | None, *, go_on: bool
) -> Dispatched:
    """Send rows; ``go_on``: return when the first half was sent."""
    kind = request.kind()
    ep = natives.checked.get(kind) or _checked(natives, masks.num_ranks, request, kind)
    if statistics is not None:
        statistics.check(request.num_experts, masks.num_ranks)
    idx = request.topk_idx if request.topk_idx.itemsize >= 4 else indices.widened(request.topk_idx)
    if masks.enabled:
        idx = masks.without(idx, request.num_experts // masks.num_ranks)
    try:
        return (_start if go_on else _run)(natives, ep, request, idx, statistics)
    except (TypeError, ValueError):  # of this rank's tensors, or of ranks that differ
        request.check(masks.num_ranks)
        raise


def _checked(natives: Natives, num_ranks: int, request: Request, kind: tuple[Any, ...] | None) -> anyep.Buffer:
    wire, topk = request.check(num_ranks), request.topk_idx.size(1)
    ep = natives.variant(request.num_experts, wire, topk, max_tokens=request.most_tokens)
    return ep if kind is None else natives.remember(kind, ep)


def _run(
    natives: Natives, ep: anyep.Buffer, request: Request, idx: torch.Tensor, statistics: Statistics | None
) -> Dispatched:
    clock = None if statistics is None else WaitClock(ep, statistics.waits)
    received = ep.dispatch(request.x, idx, layout="padded")
    kept = LowLatencyKept(ep, request.num_experts, idx.shape[1], None, received.handle, request.x.shape[1])
    assert received.source_begin is not None
    assert received.source_count is not None
    assert received.source_token is not None
    kept.sources = received.source_begin, received.source_count
    count = torch.from_numpy(received.handle.send.numbers("counts").copy())
    if statistics is not None and clock is not None:
        _add(statistics, count, clock)
    return Dispatched(
        received.x if received.scales is None else (received.x, received.scales),
        count,
        LowLatencyHandle(_MEMBERS, Origin(natives, kept, received.source_token, request)),
    )


def _start(
    natives: Natives, ep: anyep.Buffer, request: Request, idx: torch.Tensor, statistics: Statistics | None
) -> Dispatched:
    natives.make_room()
    clock = None if statistics is None else WaitClock(ep, statistics.waits)
    pending = ep.dispatch(request.x, idx, layout="padded", wait=False)
    targets = pending.targets
    if targets is None:  # without memory: all ranks refuse together
        pending.wait()
        raise AssertionError("a rank without memory refuses")
    assert targets.source_token is not None
    counts = np.empty(request.num_experts // ep.num_ranks, np.int32)
    count = torch.from_numpy(counts)
    kept = LowLatencyKept(ep, request.num_experts, idx.shape[1], hidden=request.x.shape[1])

    def fill(received: anyep.Received) -> None:
        assert received.source_begin is not None
        assert received.source_count is not None
        counts[:] = received.handle.send.numbers("counts")
        kept.sources, kept.landed = (received.source_begin, received.source_count), received.handle
        _fill_ranges(kept)
        if statistics is not None and clock is not None:
            _add(statistics, count, clock)

    kept.underway = natives.start(pending, fill)
    rows = targets.x if targets.scales is None else (targets.x, targets.scales)
    handle = LowLatencyHandle(_MEMBERS, Origin(natives, kept, targets.source_token, request))
    return Dispatched(rows, count, handle, kept.underway)


def _add(statistics: Statistics, count: torch.Tensor, clock: WaitClock) -> None:
    if statistics.received is not None:
        statistics.received.add_(count)
    clock.stop()


def find_handle(natives: Natives, handle: object) -> LowLatencyKept | None:
    """Return what a handle, or a tuple of its members, stands for; None for copies. RuntimeError for others."""
    if type(handle) is LowLatencyHandle and handle.origin.natives is natives:
        return handle.origin.kept
    if not isinstance(handle, (tuple, list)) or len(handle) != _MEMBERS:
        refuse(f"handle must be the tuple of {_MEMBERS} that low_latency_dispatch returned")
    kept = natives.find(handle[_LAYOUT_RANGE])
    if kept is not None and not isinstance(kept, LowLatencyKept):
        refuse("handle must be that of a low_latency_dispatch, got members of a dispatch's")
    return kept


def _recalled(natives: Natives, masks: Masks, members: Any, topk_idx: object) -> LowLatencyKept:
    """Return what copies of members stand for; all ranks tell each other where rows went."""
    most_tokens, hidden, experts = members[2:]
    if not (isinstance(members[0], torch.Tensor) and all(isinstance(one, int) for one in members[2:])):
        refuse("handle must be the tuple that low_latency_dispatch returned, or a copy of it")
    idx = masks.without(indices.widened(indices.check_topk_idx(topk_idx)), experts // masks.num_ranks)
    native = ask_for_blocks(natives, idx, most_tokens, experts)
    ep = natives.variant(experts, make_wire("bf16", "fp32", hidden), idx.size(1), max_tokens=most_tokens)
    return LowLatencyKept(ep, experts, idx.size(1), None, native, hidden)


def wire_for(hidden: int, *, use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> Wire:
    """Return how rows travel. RuntimeError where flags exclude each other."""
    host_assert(not use_ue8m0 or round_scale, "use_ue8m0 needs round_scale=True: its scales are powers of two")
    if not use_fp8:
        return make_wire("bf16", "fp32", hidden)
    return make_wire("fp8", "ue8m0" if use_ue8m0 else "pow2" if round_scale else "fp32", hidden)


def next_combine_buffer(natives: Natives, handle: object) -> torch.Tensor:
    """Return a BF16 tensor [L, P, H] that the next zero-copy combine of ``handle`` reads where it lies."""
    kept = find_handle(natives, handle)
    if kept is None:
        refuse("copies of a handle do not say where rows lie: pass the one that low_latency_dispatch returned")
    kept.combine_buffer = kept.ep.empty_output(kept.handle, torch.bfloat16)
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


def combine(
    natives: Natives, masks: Masks, handle: object, given: Sum, *, go_on: bool
) -> tuple[torch.Tensor, Underway | None]:
    """Sum rows at their origins; ``go_on``: send the first half; the sums [T, H] are valid after the second."""
    kept = find_handle(natives, handle) or _recalled(natives, masks, handle, given.topk_idx)
    if given.zero_copy or not _as_dispatched(natives, kept.handle, given):
        _check_sum(kept, given)
    if given.waits is not None:
        ranks = kept.ep.num_ranks
        check_dense("combine_wait_recv_cost_stats", given.waits, torch.int64, [ranks], f"[{ranks}]")
    y = _take_combine_buffer(kept) if given.zero_copy else given.x
    try:
        return (_start_sum if go_on else _run_sum)(natives, kept, y, given)
    except (TypeError, ValueError):  # of this rank's tensors, or of ranks that differ
        _check_sum(kept, given)
        raise


def _run_sum(natives: Natives, kept: LowLatencyKept, y: torch.Tensor, given: Sum) -> tuple[torch.Tensor, None]:
    clock = None if given.waits is None else WaitClock(kept.ep, given.waits)
    wire = "logfmt10" if given.use_logfmt else None
    summed = kept.ep.combine(y, kept.handle, topk_weights=given.topk_weights, out=given.out, wire=wire)
    if clock is not None:
        clock.stop()
    return summed, None


def _start_sum(natives: Natives, kept: LowLatencyKept, y: torch.Tensor, given: Sum) -> tuple[torch.Tensor, Underway]:
    natives.make_room()
    clock = WaitClock(kept.ep, given.waits)
    wire = "logfmt10" if given.use_logfmt else None
    pending = kept.ep.combine(y, kept.handle, topk_weights=given.topk_weights, out=given.out, wire=wire, wait=False)
    assert pending.targets is not None, "a sum's place is always known"
    return pending.targets.x, natives.start(pending, lambda _: clock.stop())


def _as_dispatched(natives: Natives, handle: Handle, given: Sum) -> bool:
    """Return whether all is right that the native combine does not check: rows in bfloat16, the dispatch's experts."""
    x, idx, plan = given.x, given.topk_idx, handle.send
    return (
        type(x) is torch.Tensor
        and type(idx) is torch.Tensor
        and x.dtype is torch.bfloat16
        and idx.dtype is indices.topk_idx_t
        and idx.itemsize == plan.idx_bytes
        and idx.shape == (plan.num_tokens, plan.geometry.num_topk)
        and idx.is_cpu
        and idx.is_contiguous()
        and given.topk_weights is not None
        and natives.loops.same_bytes(idx.data_ptr(), plan.idx_addr, idx.nbytes)
    )


def _check_sum(kept: LowLatencyKept, given: Sum) -> None:
    """Check a combine's tensors. RuntimeError."""
    check_dense("x", given.x, torch.bfloat16, [*kept.handle.shape, kept.hidden], "[L, R * Tmax, H]")
    idx = indices.check_topk_idx(given.topk_idx, kept.handle.num_tokens)
    check_dense("topk_weights", given.topk_weights, torch.float32, list(idx.shape), "[T, K]")
    _check_same_routing(idx, kept)
    if given.out is not None:
        check_dense("out", given.out, torch.bfloat16, [idx.size(0), kept.hidden], "[T, H]")


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
