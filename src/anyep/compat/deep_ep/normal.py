"""V1's dispatch and combine: compact batches in the order (source rank, source token)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import anyep
from anyep.compat.deep_ep import indices
from anyep.compat.deep_ep.checks import check_cpu, check_dense, host_assert, refuse
from anyep.compat.deep_ep.domains import Domain
from anyep.compat.deep_ep.handles import NormalHandle, Origin, find_handle
from anyep.compat.deep_ep.native import Kept, Natives
from anyep.compat.deep_ep.recalled import INTERNODE, INTRANODE, ranks_as_experts
from anyep.compat.deep_ep.underway import Underway
from anyep.exchange.calls import Calls
from anyep.exchange.event import Pending, Targets
from anyep.exchange.handle import Handle
from anyep.exchange.wire import Wire, carrying_wire

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
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

    def kind(self, x: Any) -> tuple[Any, ...] | None:
        """Return what the checks of :func:`check_batch` depend on; None where they have to be made in any case.

        The native dispatch checks x, topk_idx and topk_weights itself, their memory order included.
        """
        idx, _, per_rank, per_expert, inside, worst_tokens, alignment = self
        try:
            if not (per_rank.is_contiguous() and per_expert.is_contiguous() and inside.is_contiguous()):
                return None
            if not (per_rank.is_cpu and per_expert.is_cpu and inside.is_cpu):
                return None
            own = (per_rank.shape, per_rank.dtype, per_expert.shape, per_expert.dtype, inside.shape, inside.dtype)
            routing = None if idx is None else (idx.shape, idx.dtype)
        except AttributeError:
            return None
        rows = (x.shape, x.dtype) if type(x) is torch.Tensor else _kind_of_rows(x)
        return own, rows, routing, self.topk_weights is None, worst_tokens, alignment


def _kind_of_rows(x: Any) -> tuple[Any, ...] | None:
    """Return what :func:`check_rows` looks at, but for the memory order."""
    if type(x) is torch.Tensor:
        return x.shape, x.dtype
    if type(x) is tuple and len(x) == 2 and type(x[0]) is torch.Tensor and type(x[1]) is torch.Tensor:
        return x[0].shape, x[0].dtype, x[1].shape, x[1].dtype
    return None


class Side(NamedTuple):
    """What every call of a rank needs."""

    natives: Natives
    domain: Domain
    members: int
    """of a handle"""
    group: int
    """ranks whose sums combine rounds before it adds them; 0: none"""


def side_of(natives: Natives, domain: Domain) -> Side:
    """Return what depends on whether calls cross hosts."""
    if domain.crosses_hosts:
        return Side(natives, domain, INTERNODE, domain.per_host)
    return Side(natives, domain, INTRANODE, 0)


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
    if batch.alignment < 1:
        refuse(f"expert_alignment must be at least 1, got {batch.alignment}")
    has_idx, has_weights = batch.topk_idx is not None, batch.topk_weights is not None
    host_assert(has_idx == has_weights, "pass both topk_idx and topk_weights, or neither")
    if has_idx:
        idx = indices.check_topk_idx(batch.topk_idx, tokens)
        check_dense("topk_weights", batch.topk_weights, torch.float32, list(idx.shape), "[T, K]")
        host_assert(idx.size(1) > 0, "topk_idx must have at least one column")
    host_assert(batch.worst_tokens == 0 or has_idx, "num_worst_tokens needs topk_idx: it marks the rows of the tail")


def _checked(side: Side, x: Any, batch: Batch) -> Calls:
    """Check a batch and return the buffer that sends it."""
    rows, wire = check_rows(x)
    check_batch(rows, side.domain, batch)
    topk = side.domain.num_ranks if batch.topk_idx is None else batch.topk_idx.size(1)
    experts = batch.num_tokens_per_expert.size(0)
    return side.natives.variant(experts, wire, topk, static_rows=batch.worst_tokens or None)


class Dispatched(NamedTuple):
    """What dispatch returns; ``underway`` if it is not over."""

    rows: Rows
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    counts: list[int]
    handle: NormalHandle
    underway: Underway | None


def dispatch(side: Side, x: Any, batch: Batch, channels: int, *, go_on: bool) -> Dispatched:
    """Send rows; ``go_on``: return when the sizes are known."""
    kind, natives, idx = batch.kind(x), side.natives, batch.topk_idx
    ep = natives.checked.get(kind)
    if ep is None:
        ep = _checked(side, x, batch)
        if kind is not None and kind[1] is not None:
            natives.remember(kind, ep)
    experts, expert_rows = batch.num_tokens_per_expert.size(0), None
    if idx is None:
        idx, expert_rows = ranks_as_experts(batch.is_token_in_rank, experts), batch.num_tokens_per_expert
    elif idx.itemsize < 4:
        idx = indices.widened(idx)
    pending = None
    received: anyep.Received | Targets
    try:
        if go_on and (batch.topk_idx is None or idx is batch.topk_idx):  # narrow ones are narrowed again at the end
            natives.make_room()
            pending = ep.dispatch(x, idx, batch.topk_weights, expert_rows=expert_rows, wait="sizes")
            received = _landing(pending)
        else:
            received = ep.dispatch(x, idx, batch.topk_weights, expert_rows=expert_rows)
    except (TypeError, ValueError):  # of this rank's tensors, or of ranks that differ
        _checked(side, x, batch)
        raise
    native = received.handle
    assert native is not None
    underway = None if pending is None or isinstance(received, anyep.Received) else natives.start(pending)
    _check_counts(natives, native, batch)
    kept = Kept(ep, experts, idx.size(1), batch.worst_tokens or None, native)
    origin = Origin(natives, kept, received.source_token, batch.is_token_in_rank, side.domain, channels, underway)
    recv_idx = None if batch.topk_idx is None else received.topk_idx
    if recv_idx is not None and recv_idx.dtype is not batch.topk_idx.dtype:
        recv_idx = recv_idx.to(batch.topk_idx.dtype)
    counts = list(native.counts)
    if batch.worst_tokens:
        counts = []
    elif batch.alignment > 1:
        counts = [-(-count // batch.alignment) * batch.alignment for count in counts]
    return Dispatched(
        received.x if received.scales is None else (received.x, received.scales),
        recv_idx,
        received.topk_weights,
        counts,
        NormalHandle(side.members, origin),
        underway,
    )


def _landing(pending: Pending[anyep.Received]) -> anyep.Received | Targets:
    """Return where rows will stand; between hosts, where that is known at the end only, what has arrived."""
    targets = pending.targets
    return pending.wait() if targets is None or targets.handle is None else targets


def dispatch_again(side: Side, x: Any, handle: object, *, go_on: bool) -> tuple[Rows, Underway | None]:
    """Send other rows where an earlier dispatch sent its own; ``go_on``: return at once."""
    kept = find_handle(side.natives, handle)
    rows = _kind_of_rows(x)
    kind = ("again", kept.num_experts, kept.num_topk, kept.static_rows, rows)
    ep = side.natives.checked.get(kind)
    if ep is None:
        ep = _checked_again(side, x, kept)
        if rows is not None:
            side.natives.remember(kind, ep)
    underway = None
    received: anyep.Received | Targets
    try:
        if go_on:
            side.natives.make_room()
            pending = ep.dispatch(x, handle=kept.handle, wait=False)
            received = _landing(pending)
            underway = None if isinstance(received, anyep.Received) else side.natives.start(pending)
        else:
            received = ep.dispatch(x, handle=kept.handle)
    except (TypeError, ValueError):
        _checked_again(side, x, kept)
        raise
    return (received.x if received.scales is None else (received.x, received.scales)), underway


def _checked_again(side: Side, x: object, kept: Kept) -> Calls:
    rows, wire = check_rows(x)
    tokens = (rows[0] if isinstance(rows, tuple) else rows).size(0)
    if tokens != kept.handle.num_tokens:
        refuse(f"x has {tokens} tokens, the handle's dispatch {kept.handle.num_tokens}")
    return side.natives.variant(kept.num_experts, wire, kept.num_topk, static_rows=kept.static_rows)


def _check_counts(natives: Natives, native: Handle, batch: Batch) -> None:
    """RuntimeError where the caller's counts are not those of the rows that went out."""
    plan, given = native.send, batch.num_tokens_per_rank
    if natives.loops.same_bytes(plan.field("rank_rows"), given.data_ptr(), given.nbytes):
        return
    refuse(f"num_tokens_per_rank is {given.tolist()}, but the tokens sent are {plan.numbers('rank_rows').tolist()}")


class Summed(NamedTuple):
    """What combine returns; ``underway`` if it is not over."""

    x: torch.Tensor
    topk_weights: torch.Tensor | None
    underway: Underway | None = None


def check_bias(bias: object, num_tokens: int, hidden: int) -> list[torch.Tensor]:
    """Return none, one or two biases [T, H]. RuntimeError for others."""
    if bias is None:
        return []
    given: tuple[Any, ...] = tuple(bias) if isinstance(bias, (tuple, list)) else (bias,)
    host_assert(
        not isinstance(bias, (tuple, list)) or len(given) == 2, f"bias must be a tensor or two, got {len(given)}"
    )
    return [check_dense("bias", one, torch.bfloat16, [num_tokens, hidden], "[T, H]") for one in given]


def combine(side: Side, x: Any, handle: object, topk_weights: Any, bias: object, *, go_on: bool) -> Summed:
    """Sum rows at their origins; ``go_on``: return before that is over."""
    natives = side.natives
    kept = find_handle(natives, handle)
    ep = natives.checked.get(_kind_of_sum(kept, x, topk_weights)) or _checked_sum(natives, x, kept, topk_weights)
    biases = () if bias is None else check_bias(bias, kept.handle.num_tokens, x.shape[-1])
    try:
        if go_on:
            natives.make_room()
            pending = ep.combine(x, kept.handle, topk_weights=topk_weights, bias=biases, group=side.group, wait=False)
        else:
            summed = ep.combine(x, kept.handle, topk_weights=topk_weights, bias=biases, group=side.group)
    except (TypeError, ValueError):
        _checked_sum(natives, x, kept, topk_weights)
        raise
    if not go_on:
        return Summed(summed, None) if topk_weights is None else Summed(summed.x, summed.topk_weights)
    targets = pending.targets
    assert targets is not None, "a sum's place is always known"
    return Summed(targets.x, targets.topk_weights, natives.start(pending))


def _kind_of_sum(kept: Kept, x: Any, topk_weights: Any) -> tuple[Any, ...] | None:
    """Return what a combine's buffer depends on; the native combine checks the rest."""
    try:
        columns = None if topk_weights is None else topk_weights.shape[-1]
        return kept.num_experts, kept.num_topk, kept.static_rows, x.shape[-1], x.dtype, columns
    except (AttributeError, IndexError):
        return None


def _checked_sum(natives: Natives, x: object, kept: Kept, topk_weights: object) -> Calls:
    """Check a combine's tensors and return the buffer that sums them. RuntimeError."""
    y = check_dense("x", x, None, [kept.handle.num_rows, None], "[N, H]")
    if y.dtype != torch.bfloat16:
        refuse(f"Unsupported type: combine takes bfloat16 rows, got {y.dtype}")
    topk = kept.num_topk
    if topk_weights is not None:
        topk = check_dense("topk_weights", topk_weights, torch.float32, [y.size(0), None], "[N, K]").size(1)
    wire = carrying_wire(y.dtype, y.size(1), 0, torch.float32)
    ep = natives.variant(kept.num_experts, wire, topk, static_rows=kept.static_rows)
    kind = _kind_of_sum(kept, x, topk_weights)
    return ep if kind is None else natives.remember(kind, ep)
