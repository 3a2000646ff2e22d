"""V1's dispatch: compact batches in the order (source rank, source token)."""

from __future__ import annotations

from typing import Any

import torch

import anyep
from anyep.compat.deep_ep import indices
from anyep.compat.deep_ep.checks import refuse
from anyep.compat.deep_ep.domains import Domain
from anyep.compat.deep_ep.events import EventOverlap, no_event
from anyep.compat.deep_ep.handles import NormalHandle, find_handle, new_kept
from anyep.compat.deep_ep.lazy_tuple import lazy
from anyep.compat.deep_ep.native import Kept, Natives, Served
from anyep.compat.deep_ep.normal_batch import (
    Batch,
    NormalContext,
    Rows,
    check_rows,
    checked_batch,
    key_of_batch,
    key_of_rows,
    known_layout,
)
from anyep.compat.deep_ep.recalled import INTERNODE, INTRANODE, ranks_as_experts, sum_for_owners
from anyep.compat.deep_ep.underway import event_of
from anyep.exchange.event import Pending, Targets

Dispatched = tuple[Rows, torch.Tensor | None, torch.Tensor | None, list[int] | None, NormalHandle | None, EventOverlap]
"""What dispatch returns."""


def context_of(natives: Natives, domain: Domain) -> NormalContext:
    """Return what depends on whether calls cross hosts."""
    if domain.crosses_hosts:
        return NormalContext(natives, domain, INTERNODE, domain.per_host)
    return NormalContext(natives, domain, INTRANODE, 0)


def dispatch(context: NormalContext, x: Any, batch: Batch, num_sms: int, *, go_on: bool) -> Dispatched:
    """Send rows; ``go_on``: return when the sizes are known, on a GPU when all is launched.

    Narrow indices are narrowed again at the end, so that such a call is over when it returns.
    """
    natives = context.natives
    idx, weights, per_rank, per_expert, inside, worst_tokens, alignment = batch
    known = known_layout(natives, batch)
    key = key_of_batch(x, batch, known)
    served: Served = natives.checked.get(key) or checked_batch(context, x, batch, key)
    ep, expert_rows = served.ep, None
    if idx is None:
        idx = ranks_as_experts(inside, served.num_experts)
        expert_rows = per_expert if natives.device is None else None  # a device counts topk_idx
    elif indices.topk_idx_t not in indices.WIDE:
        idx = indices.widened(idx)
    pending = None
    received: anyep.Received | Targets
    try:
        if go_on and natives.device is None and (batch[0] is None or idx is batch[0]):
            natives.make_room()
            pending = ep.dispatch(x, idx, weights, expert_rows=expert_rows, wait="sizes")
            received = _landing(pending)
        else:
            received = ep.dispatch(x, idx, weights, expert_rows=expert_rows)
    except (TypeError, ValueError):  # of this rank's tensors, or of ranks that differ
        checked_batch(context, x, batch, None)
        raise
    native, recv_idx, scales, counts = received.handle, received.topk_idx, received.scales, []
    assert native is not None
    underway = None if pending is None or isinstance(received, anyep.Received) else natives.start(pending)
    if natives.device is None:  # a GPU's nobody waits for
        sent = native.send.numbers("rank_rows").tolist()
        if known is None or known.counts is None or known.counts.tolist() != sent:
            _check_counts(per_rank, sent)
    if idx is not batch[0] and recv_idx is not None:
        recv_idx = None if batch[0] is None else recv_idx.to(batch[0].dtype)
    if not worst_tokens:
        counts = list(native.counts)
        if batch[0] is None and natives.device is not None:
            counts = sum_for_owners(natives, per_expert, context.domain.num_ranks)
        if alignment != 1:
            counts = [-(-count // alignment) * alignment for count in counts]
    kept = new_kept((served, native, context, received.source_token, inside, num_sms, underway))
    return (
        received.x if scales is None else (received.x, scales),
        recv_idx,
        received.topk_weights,
        counts,
        lazy(NormalHandle, context.members, kept),
        event_of(underway, asked=True) if go_on else no_event(),
    )


def _landing(pending: Pending[anyep.Received]) -> anyep.Received | Targets:
    """Return where rows will stand; between hosts, where that is known at the end only, what has arrived."""
    targets = pending.targets
    return pending.wait() if targets is None or targets.handle is None else targets


def dispatch_again(context: NormalContext, x: Any, handle: object, *, go_on: bool) -> Dispatched:
    """Send other rows where an earlier dispatch sent its own; ``go_on``: return at once."""
    natives = context.natives
    kept = find_handle(natives, handle)
    key = key_of_rows(x)
    served: Served = natives.checked.get(("again", kept.served, key)) or _checked_again(context, x, kept, key)
    ep = served.ep
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
        _checked_again(context, x, kept, None)
        raise
    rows = received.x if received.scales is None else (received.x, received.scales)
    return rows, None, None, None, None, event_of(underway, asked=True) if go_on else no_event()


def _checked_again(context: NormalContext, x: object, kept: Kept, key: tuple[Any, ...] | None) -> Served:
    """Check rows and return what serves them, and all of their kind."""
    rows, wire = check_rows(x)
    tokens = (rows[0] if isinstance(rows, tuple) else rows).size(0)
    if tokens != kept.handle.num_tokens:
        refuse(f"x has {tokens} tokens, the handle's dispatch {kept.handle.num_tokens}")
    _, experts, topk, static = kept.served
    ep = context.natives.variant(experts, wire, topk, static_rows=static, source_tokens=False)
    served = Served(ep, experts, topk, static)
    return context.natives.remember(None if key is None else ("again", kept.served, key), served)


def _check_counts(given: torch.Tensor, sent: list[int]) -> None:
    """RuntimeError where the caller's counts are not those of the rows that went out."""
    if not given.is_cpu:
        refuse(f"num_tokens_per_rank is on {given.device}, and this buffer exchanges CPU tensors: pass its .cpu()")
    told = given.tolist()
    if told != sent:
        refuse(f"num_tokens_per_rank is {told}, but the tokens sent are {sent}")
