"""A V2 dispatch: compact rows with their scales and raw weights beside them; expanded here where asked for.

Legend: T tokens, K top-k, N rows of the exchange.
"""

from __future__ import annotations

import torch

from anyep.compat.deep_ep.elastic_context import ElasticContext
from anyep.compat.deep_ep.elastic_fields import Late, Origin, describe_rows, expanded_rows, new_origin
from anyep.compat.deep_ep.elastic_landing import DispatchPlan, Rows, Tokens, checked_metadata, fill_room, room_for
from anyep.compat.deep_ep.elastic_routes import native_handle, route_of
from anyep.compat.deep_ep.elastic_rows import places_from_handle, places_of
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.compat.deep_ep.events import EventOverlap, no_event
from anyep.compat.deep_ep.underway import event_of
from anyep.exchange.handle import Handle, Received

Dispatched = tuple[Rows, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]
"""What dispatch returns."""


def dispatch_first(context: ElasticContext, plan: DispatchPlan, tokens: Tokens) -> Dispatched:
    """Send tokens to their experts' ranks and return the batch with a new handle."""
    x, scales, idx, weights = tokens
    assert idx is not None
    rows = _wired(context, plan, tokens) if scales is not None else x if weights is None else (x, weights)
    received = plan.native.dispatch(rows, idx)
    if not plan.lands:
        return _first_batch(context, plan, tokens, received)
    native, arrived, beside = received.handle, received.topk_idx, received.scales
    assert arrived is not None
    num_rows, num_topk = native.num_rows, plan.kind.num_topk
    columns = context.notebook.piece(num_rows * ((num_topk + 7) // 8))
    context.loops.note_columns(arrived.data_ptr(), native.send.idx_bytes, num_rows, num_topk, columns[1])
    origin = new_origin((context, plan.terms, native, columns, received.source_token, None))
    handle = EPHandle.made(plan.kind, origin, num_rows)
    if not plan.terms.keep_copy:
        _keep_indices(handle, native, idx)
    if scales is None:
        return received.x, arrived, beside, handle, no_event()
    assert beside is not None
    return (received.x, beside), arrived, None, handle, no_event()


def _first_batch(context: ElasticContext, plan: DispatchPlan, tokens: Tokens, received: Received) -> Dispatched:
    native, arrived, idx = received.handle, received.topk_idx, tokens.topk_idx
    assert arrived is not None
    assert idx is not None
    places = None if context.keeps_order else places_of(native.pair_rows[:, context.number], context.num_scaleup)
    origin = Origin(context, plan.terms, native, None, received.source_token, None)
    metadata = describe_rows(origin, arrived, places)
    handle = EPHandle.made(plan.kind, origin, metadata.shape[0])
    handle.fields["recv_src_metadata"] = metadata
    if not plan.terms.keep_copy:
        _keep_indices(handle, native, idx)
    expanded = expanded_rows(context, plan.terms, native) if plan.terms.do_expand else 0
    room = room_for(plan, tokens, received, metadata.shape[0], expanded, places)
    fill_room(context, plan, room, received, metadata if plan.terms.do_expand else None)
    return room.rows(), room.topk_idx, room.topk_weights, handle, EventOverlap()


def _landed(plan: DispatchPlan, received: Received, handle: EPHandle) -> Dispatched:
    """Return a batch that is what landed: weights travel in the place of scales where there are none."""
    scales = received.scales
    if plan.num_packs:
        assert scales is not None
        return (received.x, scales), received.topk_idx, None, handle, no_event()
    return received.x, received.topk_idx, scales, handle, no_event()


def dispatch_again(context: ElasticContext, plan: DispatchPlan, tokens: Tokens, handle: EPHandle) -> Dispatched:
    """Send other tokens where an earlier dispatch sent its own."""
    received = plan.native.dispatch(_wired(context, plan, tokens), handle=native_handle(context, handle, plan.native))
    places = places_from_handle(handle, context.num_ranks)
    if plan.lands and places is None and handle.fields["num_recv_tokens"] == received.handle.num_rows:
        return _landed(plan, received, handle)
    expanded = handle.num_expanded_tokens if plan.terms.do_expand else 0
    room = room_for(plan, tokens, received, handle.num_recv_tokens, expanded, places)
    metadata = checked_metadata(handle, received.x.shape[0]) if plan.terms.do_expand else None
    fill_room(context, plan, room, received, metadata)
    return room.rows(), room.topk_idx, room.topk_weights, handle, EventOverlap()


def begin_first(context: ElasticContext, plan: DispatchPlan, tokens: Tokens) -> Dispatched:
    """As :func:`dispatch_first`, but return when the sizes are known: rows are there when the event was waited for."""
    idx = tokens.topk_idx
    assert idx is not None
    context.natives.make_room()
    pending = plan.native.dispatch(_wired(context, plan, tokens), idx, wait="sizes")
    landing = pending.targets
    if landing is None or landing.handle is None:  # between hosts a handle is known at the end
        return *_first_batch(context, plan, tokens, pending.wait())[:-1], event_of(None, asked=True)
    native, late = landing.handle, Late()
    places = None if context.keeps_order else places_of(native.pair_rows[:, context.number], context.num_scaleup)
    origin = Origin(context, plan.terms, native, None, landing.source_token, late)
    compact = native.num_rows if plan.terms.exact else context.num_ranks * plan.terms.num_max_tokens
    expanded = expanded_rows(context, plan.terms, native) if plan.terms.do_expand else 0
    room = room_for(plan, tokens, landing, compact, expanded, places)
    handle = EPHandle.made(plan.kind, origin, compact)
    if not plan.terms.keep_copy:
        _keep_indices(handle, native, idx)

    def fill(received: Received) -> None:
        assert received.topk_idx is not None
        late.metadata = describe_rows(origin, received.topk_idx, places)
        fill_room(context, plan, room, received, late.metadata if plan.terms.do_expand else None)

    late.underway = context.natives.start(pending, fill)
    return room.rows(), room.topk_idx, room.topk_weights, handle, event_of(late.underway)


def begin_again(context: ElasticContext, plan: DispatchPlan, tokens: Tokens, handle: EPHandle) -> Dispatched:
    """As :func:`dispatch_again`, but return at once."""
    native, places = native_handle(context, handle, plan.native), places_from_handle(handle, context.num_ranks)
    metadata = None
    if plan.terms.do_expand:  # waits for the first, if that goes on
        metadata = checked_metadata(handle, int(native.pair_rows[:, context.number].sum()))
    context.natives.make_room()
    pending = plan.native.dispatch(_wired(context, plan, tokens), handle=native, wait=False)
    landing = pending.targets
    if landing is None:
        pending.wait()
        raise AssertionError("a rank without memory refuses")
    expanded = handle.num_expanded_tokens if plan.terms.do_expand else 0
    room = room_for(plan, tokens, landing, handle.num_recv_tokens, expanded, places)
    underway = context.natives.start(pending, lambda received: fill_room(context, plan, room, received, metadata))
    return room.rows(), room.topk_idx, room.topk_weights, handle, event_of(underway)


def _wired(context: ElasticContext, plan: DispatchPlan, tokens: Tokens) -> Rows:
    """Return the rows, and what travels beside them: scales or weights as they are, or both as side words."""
    x, scales, _, weights = tokens
    if scales is None:
        return x if weights is None else (x, weights)
    if weights is None:
        return x, scales
    if not (scales.is_cpu and weights.is_cpu):
        raise ValueError("scales and weights must be on the CPU")  # told in full by who checks the call
    weights = weights.contiguous()
    words = torch.empty((x.shape[0], plan.num_packs + weights.shape[1]), dtype=torch.int32, device="cpu")
    context.loops.pack_side(
        x.shape[0],
        plan.num_packs,
        weights.shape[1],
        scales.data_ptr(),
        *scales.stride(),
        weights.data_ptr(),
        words.data_ptr(),
    )
    return x, words


def _keep_indices(handle: EPHandle, native: Handle, topk_idx: torch.Tensor) -> None:
    """Let the handle have the caller's own indices, to which it may write."""
    handle.fields["topk_idx"] = topk_idx
    route_of(handle, native).note("topk_idx", topk_idx)
