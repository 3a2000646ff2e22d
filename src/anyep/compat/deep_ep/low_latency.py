"""V1's low-latency calls: a row for each (token, expert) in blocks of fixed size, weighted sums at the origin.

Legend: T tokens, H hidden, K top-k, E experts, L local experts, R ranks, P = R * Tmax rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

import anyep
from anyep.compat.deep_ep import indices
from anyep.compat.deep_ep.checks import check_count, check_dense, host_assert, refuse
from anyep.compat.deep_ep.events import EventOverlap, no_event
from anyep.compat.deep_ep.lazy_tuple import lazy
from anyep.compat.deep_ep.low_latency_handles import MEMBERS, Blocks, LowLatencyHandle, LowLatencyKept
from anyep.compat.deep_ep.masks import Masks
from anyep.compat.deep_ep.native import Natives
from anyep.compat.deep_ep.underway import ends_of, event_of
from anyep.exchange.calls import Calls
from anyep.exchange.device.plan import DeviceCounts
from anyep.exchange.wire import Wire, make_wire


class Request(NamedTuple):
    """Arguments of a dispatch."""

    x: Any
    topk_idx: Any
    most_tokens: int
    num_experts: int
    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool

    def key(self) -> tuple[Any, ...] | None:
        """Return what :meth:`check` depends on; the native dispatch checks the tensors' memory order itself."""
        x, idx, *numbers = self
        if type(x) is not torch.Tensor or type(idx) is not torch.Tensor:
            return None
        return x.shape, x.dtype, idx.shape, idx.dtype, *numbers

    def check(self, num_ranks: int) -> Wire:
        """Return how rows travel. RuntimeError."""
        most_tokens, experts = self.most_tokens, self.num_experts
        rows = check_dense("x", self.x, torch.bfloat16, [None, None], "[T, H]")
        indices.check_topk_idx(self.topk_idx, rows.size(0))
        check_count("num_max_dispatch_tokens_per_rank", most_tokens, 0)
        check_count("num_experts", experts, 1)
        if experts % num_ranks:
            refuse(f"num_experts={experts} must be a multiple of R={num_ranks}")
        if rows.size(0) > most_tokens:
            refuse(f"x has {rows.size(0)} tokens, more than num_max_dispatch_tokens_per_rank={most_tokens}")
        return wire_for(rows.size(1), use_fp8=self.use_fp8, round_scale=self.round_scale, use_ue8m0=self.use_ue8m0)


new_request = partial(tuple.__new__, Request)
"""Makes one of a tuple of all fields; the class's own constructor is a Python function, slow from cold caches."""


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


Dispatched = tuple[
    torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    torch.Tensor,
    LowLatencyHandle,
    EventOverlap,
    Callable[[], None] | None,
]
"""What low_latency_dispatch returns."""


def dispatch(
    natives: Natives, masks: Masks, request: Request, statistics: Statistics | None, *, go_on: bool, wants_hook: bool
) -> Dispatched:
    """Send rows; ``go_on``: return when the first half was sent, and with a hook for the second if one is wanted."""
    key = request.key()
    blocks: Blocks = natives.checked.get(key) or _checked(natives, masks.num_ranks, request, key)
    if statistics is not None:
        statistics.check(request.num_experts, masks.num_ranks)
    idx = request[1] if indices.topk_idx_t in indices.WIDE else indices.widened(request[1])
    if masks.enabled:
        idx = masks.without(idx, request.num_experts // masks.num_ranks)
    try:
        if go_on and (natives.device is None or blocks.ep.num_hosts == 1):
            return _start(natives, blocks, request, idx, statistics, wants_hook=wants_hook)
        done = _run(natives, blocks, request, idx, statistics)
        if go_on:  # between hosts a device's batch has come when its size is known
            return *done[:3], event_of(None, asked=not wants_hook), _nothing_left if wants_hook else None
        return done
    except (TypeError, ValueError):  # of this rank's tensors, or of ranks that differ
        request.check(masks.num_ranks)
        raise


def _checked(natives: Natives, num_ranks: int, request: Request, key: tuple[Any, ...] | None) -> Blocks:
    wire, topk, hidden = request.check(num_ranks), request.topk_idx.size(1), request.x.size(1)
    natives.settle_on(request.x)
    experts, most_tokens = request.num_experts, request.most_tokens
    ep = natives.variant(experts, wire, topk, max_tokens=most_tokens)
    return natives.remember(key, Blocks(ep, experts, topk, most_tokens, hidden))


def _run(
    natives: Natives, blocks: Blocks, request: Request, idx: torch.Tensor, statistics: Statistics | None
) -> Dispatched:
    ep = blocks[0]
    clock = None if statistics is None else WaitClock(ep, statistics.waits)
    received = ep.dispatch(request[0], idx, layout="padded")
    begin, sent = received.source_begin, received.source_count
    assert begin is not None
    assert sent is not None
    kept = LowLatencyKept(natives, blocks, request[1], received.source_token)
    kept.landed, kept.sources = received.handle, (begin, sent)
    count = _counts_of(received)
    if statistics is not None and clock is not None:
        _add(statistics, count, clock)
    rows = received.x if received.scales is None else (received.x, received.scales)
    return rows, count, lazy(LowLatencyHandle, MEMBERS, kept), no_event(), None


def _start(
    natives: Natives,
    blocks: Blocks,
    request: Request,
    idx: torch.Tensor,
    statistics: Statistics | None,
    *,
    wants_hook: bool,
) -> Dispatched:
    ep = blocks.ep
    natives.make_room()
    clock = None if statistics is None else WaitClock(ep, statistics.waits)
    pending = ep.dispatch(request.x, idx, layout="padded", wait=False)
    targets = pending.targets
    if targets is None:  # without memory: all ranks refuse together
        pending.wait()
        raise AssertionError("a rank without memory refuses")
    local = request.num_experts // ep.num_ranks
    count = torch.empty(local, dtype=torch.int32, device=request.x.device)
    kept = LowLatencyKept(natives, blocks, request.topk_idx, targets.source_token)

    def fill(received: anyep.Received) -> None:
        assert received.source_begin is not None
        assert received.source_count is not None
        count.copy_(_counts_of(received))
        kept.sources, kept.landed = (received.source_begin, received.source_count), received.handle
        kept.fill_ranges()
        if statistics is not None and clock is not None:
            _add(statistics, count, clock)

    kept.underway = natives.start(pending, fill)
    rows = targets.x if targets.scales is None else (targets.x, targets.scales)
    return rows, count, lazy(LowLatencyHandle, MEMBERS, kept), *ends_of(kept.underway, wants_hook=wants_hook)


def _nothing_left() -> None:
    """Do what a hook does where all has come."""


def _counts_of(received: anyep.Received) -> torch.Tensor:
    """Return int32 [L], of the caller's own; on a GPU nobody waits for them."""
    if isinstance(received.counts, DeviceCounts):
        return received.counts.tensor.clone()
    counts = torch.from_numpy(received.handle.send.numbers("counts").copy())
    return counts if received.x.is_cpu else counts.to(received.x.device)


def _add(statistics: Statistics, count: torch.Tensor, clock: WaitClock) -> None:
    if statistics.received is not None:
        statistics.received.add_(count)
    clock.stop()


def wire_for(hidden: int, *, use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> Wire:
    """Return how rows travel. RuntimeError where flags exclude each other."""
    host_assert(not use_ue8m0 or round_scale, "use_ue8m0 needs round_scale=True: its scales are powers of two")
    if not use_fp8:
        return make_wire("bf16", "fp32", hidden)
    return make_wire("fp8", "ue8m0" if use_ue8m0 else "pow2" if round_scale else "fp32", hidden)


class WaitClock:
    """Adds how long each rank was waited for, in nanoseconds, to a caller's int64 [R]."""

    def __init__(self, ep: Calls, waits: torch.Tensor | None) -> None:
        self._ep = ep
        self._waits = waits
        self._before = None if waits is None else ep.stats().waiting_s_by_source

    def stop(self) -> None:
        """Add what was waited since."""
        if self._waits is not None and self._before is not None:
            waited_s = self._ep.stats().waiting_s_by_source - self._before
            self._waits.add_((waited_s * 1e9).long().to(self._waits.device))
