"""V1's dispatch: compact batches in the order (source rank, source token)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import anyep
from anyep.compat.deep_ep import indices
from anyep.compat.deep_ep.checks import check_count, check_dense, check_device, check_not_on_device, host_assert, refuse
from anyep.compat.deep_ep.domains import Domain
from anyep.compat.deep_ep.events import EventOverlap
from anyep.compat.deep_ep.handles import NormalHandle, NormalKept, find_handle
from anyep.compat.deep_ep.native import Kept, Natives
from anyep.compat.deep_ep.recalled import INTERNODE, INTRANODE, ranks_as_experts
from anyep.compat.deep_ep.underway import event_of
from anyep.exchange.calls import Calls
from anyep.exchange.event import Pending, Targets
from anyep.exchange.handle import Handle
from anyep.exchange.wire import Wire, carrying_wire

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Dispatched = tuple[Rows, torch.Tensor | None, torch.Tensor | None, list[int] | None, NormalHandle | None, EventOverlap]
"""What dispatch returns."""
_SCALE_DTYPES = (torch.float32, torch.int32)


class Batch(NamedTuple):
    """Arguments of a dispatch that is not cached."""

    topk_idx: Any
    topk_weights: Any
    num_tokens_per_rank: Any
    num_tokens_per_expert: Any
    is_token_in_rank: Any
    worst_tokens: int
    alignment: int

    def key(self, x: Any) -> tuple[Any, ...] | None:
        """Return what the checks of :func:`check_batch` depend on; None where they have to be made in any case.

        The native dispatch checks x, topk_idx and topk_weights itself, their memory order included.
        """
        idx, _, per_rank, per_expert, inside, worst_tokens, alignment = self
        rows = _key_of_rows(x)
        try:
            if rows is None or not (per_rank.is_contiguous() and per_expert.is_contiguous() and inside.is_contiguous()):
                return None
            if not (per_rank.is_cpu and per_expert.is_cpu and inside.is_cpu):
                return None
            own = (per_rank.shape, per_rank.dtype, per_expert.shape, per_expert.dtype, inside.shape, inside.dtype)
            routing = None if idx is None else (idx.shape, idx.dtype)
        except AttributeError:
            return None
        return own, rows, routing, self.topk_weights is None, worst_tokens, alignment


def _key_of_rows(x: Any) -> tuple[Any, ...] | None:
    """Return what :func:`check_rows` looks at, but for the memory order."""
    if type(x) is torch.Tensor:
        return x.shape, x.dtype
    if type(x) is tuple and len(x) == 2 and type(x[0]) is torch.Tensor and type(x[1]) is torch.Tensor:
        return x[0].shape, x[0].dtype, x[1].shape, x[1].dtype
    return None


class NormalContext(NamedTuple):
    """What every normal call of a rank needs."""

    natives: Natives
    domain: Domain
    members: int
    """of a handle"""
    group: int
    """ranks whose sums combine rounds before it adds them; 0: none"""


def context_of(natives: Natives, domain: Domain) -> NormalContext:
    """Return what depends on whether calls cross hosts."""
    if domain.crosses_hosts:
        return NormalContext(natives, domain, INTERNODE, domain.per_host)
    return NormalContext(natives, domain, INTRANODE, 0)


def check_rows(x: object) -> tuple[Rows, Wire]:
    """Return rows [T, H] of any dtype, or 1-byte rows with scales [T, P], and the wire they travel on."""
    if not isinstance(x, tuple):
        rows = check_dense("x", x, None, [None, None], "[T, H]")
        return rows, carrying_wire(rows.dtype, rows.size(1), 0, torch.float32)
    host_assert(len(x) == 2, f"x must be a tensor or (x, x_scales), got a tuple of {len(x)}")
    rows = check_dense("x", x[0], None, [None, None], "[T, H]")
    scales = x[1]
    check_device("x_scales", scales)
    host_assert(rows.itemsize == 1, f"x with scales must have elements of 1 byte, got {rows.dtype}")
    host_assert(
        isinstance(scales, torch.Tensor) and scales.dim() == 2 and scales.dtype in _SCALE_DTYPES,
        "x_scales must be a float32 or int32 tensor [T, P]",
    )
    host_assert(scales.size(0) == rows.size(0), f"x_scales has {scales.size(0)} rows for {rows.size(0)} of x")
    host_assert(scales.size(1) > 0, "x_scales has no columns; pass x alone")
    return (rows, scales), carrying_wire(rows.dtype, rows.size(1), scales.size(1), scales.dtype)


def check_batch(x: Rows, domain: Domain, batch: Batch) -> None:
    """Check what get_dispatch_layout gives, and the routing. AssertionError, RuntimeError."""
    given = (batch.num_tokens_per_rank, batch.is_token_in_rank, batch.num_tokens_per_expert)
    assert all(one is not None for one in given), (
        "without a handle, dispatch needs num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert: "
        "get_dispatch_layout returns them"
    )
    tokens, ranks = (x[0] if isinstance(x, tuple) else x).size(0), domain.num_ranks
    check_dense("is_token_in_rank", batch.is_token_in_rank, torch.bool, [tokens, ranks], "[T, R]")
    check_dense("num_tokens_per_rank", batch.num_tokens_per_rank, torch.int32, [ranks], "[R]")
    experts = check_dense("num_tokens_per_expert", batch.num_tokens_per_expert, torch.int32, [None], "[E]").size(0)
    if experts <= 0 or experts % ranks:
        refuse(f"the number of experts, {experts}, must be a multiple of R={ranks}")
    check_count("expert_alignment", batch.alignment, 1)
    check_count("num_worst_tokens", batch.worst_tokens, 0)
    has_idx, has_weights = batch.topk_idx is not None, batch.topk_weights is not None
    host_assert(has_idx == has_weights, "pass both topk_idx and topk_weights, or neither")
    if has_idx:
        idx = indices.check_topk_idx(batch.topk_idx, tokens)
        check_dense("topk_weights", batch.topk_weights, torch.float32, list(idx.shape), "[T, K]")
        host_assert(idx.size(1) > 0, "topk_idx must have at least one column")
    host_assert(batch.worst_tokens == 0 or has_idx, "num_worst_tokens needs topk_idx: it marks the rows of the tail")


def _checked(context: NormalContext, x: Any, batch: Batch) -> Calls:
    """Check a batch and return the buffer that sends it."""
    rows, wire = check_rows(x)
    check_batch(rows, context.domain, batch)
    context.natives.settle_on(rows)  # for good: behind all checks
    topk = context.domain.num_ranks if batch.topk_idx is None else batch.topk_idx.size(1)
    experts = batch.num_tokens_per_expert.size(0)
    ep = context.natives.variant(experts, wire, topk, static_rows=batch.worst_tokens or None)
    return context.natives.remember(batch.key(x), ep)


def dispatch(context: NormalContext, x: Any, batch: Batch, channels: int, *, go_on: bool) -> Dispatched:
    """Send rows; ``go_on``: return when the sizes are known, on a GPU when all is launched.

    Narrow indices are narrowed again at the end, so that such a call is over when it returns.
    """
    natives, idx, weights = context.natives, batch.topk_idx, batch.topk_weights
    ep = natives.checked.get(batch.key(x)) or _checked(context, x, batch)
    experts, expert_rows = batch.num_tokens_per_expert.size(0), None
    if idx is None:
        check_not_on_device("a dispatch without topk_idx", natives.device)
        idx, expert_rows = ranks_as_experts(batch.is_token_in_rank, experts), batch.num_tokens_per_expert
    elif idx.itemsize < 4:
        idx = indices.widened(idx)
    pending = None
    received: anyep.Received | Targets
    try:
        if go_on and natives.device is None and (batch.topk_idx is None or idx is batch.topk_idx):
            natives.make_room()
            pending = ep.dispatch(x, idx, weights, expert_rows=expert_rows, wait="sizes")
            received = _landing(pending)
        else:
            received = ep.dispatch(x, idx, weights, expert_rows=expert_rows)
    except (TypeError, ValueError):  # of this rank's tensors, or of ranks that differ
        _checked(context, x, batch)
        raise
    native = received.handle
    assert native is not None
    underway = None if pending is None or isinstance(received, anyep.Received) else natives.start(pending)
    _check_counts(natives, native, batch.num_tokens_per_rank)
    kept = NormalKept(
        *(ep, experts, idx.size(1), batch.worst_tokens or None, native, natives),
        *(received.source_token, batch.is_token_in_rank, context.domain, channels, underway),
    )
    recv_idx = None if batch.topk_idx is None else received.topk_idx
    if idx is not batch.topk_idx and recv_idx is not None:
        recv_idx = recv_idx.to(batch.topk_idx.dtype)
    return (
        received.x if received.scales is None else (received.x, received.scales),
        recv_idx,
        received.topk_weights,
        _counts_for(batch, native),
        NormalHandle(context.members, kept),
        event_of(underway, asked=go_on),
    )


def _landing(pending: Pending[anyep.Received]) -> anyep.Received | Targets:
    """Return where rows will stand; between hosts, where that is known at the end only, what has arrived."""
    targets = pending.targets
    return pending.wait() if targets is None or targets.handle is None else targets


def dispatch_again(context: NormalContext, x: Any, handle: object, *, go_on: bool) -> Dispatched:
    """Send other rows where an earlier dispatch sent its own; ``go_on``: return at once."""
    natives = context.natives
    kept = find_handle(natives, handle)
    ep = natives.checked.get(_key_of_more(kept, x)) or _checked_again(context, x, kept)
    underway = None
    received: anyep.Received | Targets
    try:
        if go_on and natives.device is None:
            natives.make_room()
            pending = ep.dispatch(x, handle=kept.handle, wait=False)
            received = _landing(pending)
            underway = None if isinstance(received, anyep.Received) else natives.start(pending)
        else:
            received = ep.dispatch(x, handle=kept.handle)
    except (TypeError, ValueError):
        _checked_again(context, x, kept)
        raise
    rows = received.x if received.scales is None else (received.x, received.scales)
    return rows, None, None, None, None, event_of(underway, asked=go_on)


def _key_of_more(kept: Kept, x: Any) -> tuple[Any, ...] | None:
    rows = _key_of_rows(x)
    return None if rows is None else ("again", kept.num_experts, kept.num_topk, kept.static_rows, rows)


def _checked_again(context: NormalContext, x: object, kept: Kept) -> Calls:
    rows, wire = check_rows(x)
    tokens = (rows[0] if isinstance(rows, tuple) else rows).size(0)
    if tokens != kept.handle.num_tokens:
        refuse(f"x has {tokens} tokens, the handle's dispatch {kept.handle.num_tokens}")
    ep = context.natives.variant(
        kept.num_experts, wire, kept.num_topk, static_rows=kept.static_rows, source_tokens=False
    )
    return context.natives.remember(_key_of_more(kept, x), ep)


def _check_counts(natives: Natives, native: Handle, given: torch.Tensor) -> None:
    """RuntimeError where the caller's counts are not those of the rows that went out; a GPU's nobody waits for."""
    if natives.device is not None:
        return
    if not given.is_cpu:
        refuse(f"num_tokens_per_rank is on {given.device}, and this buffer exchanges CPU tensors: pass its .cpu()")
    plan = native.send
    if not natives.loops.same_bytes(plan.field("rank_rows"), given.data_ptr(), 4 * given.size(0)):
        sent = plan.numbers("rank_rows").tolist()
        refuse(f"num_tokens_per_rank is {given.tolist()}, but the tokens sent are {sent}")


def _counts_for(batch: Batch, native: Handle) -> list[int]:
    """Return the rows of each local expert as a caller wants them: none, or aligned."""
    if batch.worst_tokens:
        return []
    alignment = batch.alignment
    if alignment == 1:
        return list(native.counts)
    return [-(-count // alignment) * alignment for count in native.counts]
