"""A V2 dispatch: compact rows with their scales and raw weights beside them; expanded here where asked for.

Legend: T tokens, H hidden, K top-k, N rows of the exchange, L local experts, G packs of scales, R ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from anyep.compat.deep_ep.elastic_arguments import Terms
from anyep.compat.deep_ep.elastic_fields import Late, Origin, describe_rows, expanded_rows, slab_starts
from anyep.compat.deep_ep.elastic_routes import native_handle, route_of
from anyep.compat.deep_ep.elastic_rows import empty_scales, fill_rows, places_from_handle, places_of, scatter_rows
from anyep.compat.deep_ep.elastic_side import Side
from anyep.compat.deep_ep.ep_handle import EPHandle, HandleKind
from anyep.compat.deep_ep.underway import Underway
from anyep.exchange.calls import Calls
from anyep.exchange.event import Targets
from anyep.exchange.handle import Handle, Received

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Kind(NamedTuple):
    """A kind of dispatch that passed its checks."""

    native: Calls
    """the buffer that moves such rows"""
    terms: Terms
    num_packs: int
    """G; 0 without scales"""
    has_weights: bool
    handle: HandleKind
    """of the handles that such dispatches leave"""
    lands: bool
    """whether a batch is what lands: compact, in the order of the exchange, with scales or weights but not both"""


class Tokens(NamedTuple):
    """What is sent: contiguous, but for the scales."""

    x: torch.Tensor
    """[T, H], any dtype"""
    scales: torch.Tensor | None
    """[T, G] of a 4-byte dtype"""
    topk_idx: torch.Tensor | None
    """[T, K]; None where a handle has it"""
    topk_weights: torch.Tensor | None
    """fp32 [T, K]"""


class RecvBatch(NamedTuple):
    """What dispatch returns, but for the event."""

    x: Rows
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    handle: EPHandle
    underway: Underway | None = None
    """what fills the batch, where it is not over"""


def dispatch(side: Side, kind: Kind, tokens: Tokens, handle: EPHandle | None, *, go_on: bool) -> RecvBatch:
    """Send tokens to their experts' ranks, or where an earlier dispatch sent its own; ``go_on``: it may not be over."""
    if handle is None:
        return (begin_first if go_on else dispatch_first)(side, kind, tokens)
    return (begin_again if go_on else dispatch_again)(side, kind, tokens, handle)


def dispatch_first(side: Side, kind: Kind, tokens: Tokens) -> RecvBatch:
    """Send tokens to their experts' ranks and return the batch with a new handle."""
    idx = tokens.topk_idx
    assert idx is not None
    return _first_batch(side, kind, tokens, kind.native.dispatch(_wired(side, kind, tokens), idx))


def _first_batch(side: Side, kind: Kind, tokens: Tokens, received: Received) -> RecvBatch:
    idx, native, arrived = tokens.topk_idx, received.handle, received.topk_idx
    assert idx is not None
    assert arrived is not None
    if kind.lands:
        origin = Origin(side, kind.terms, native, arrived.numpy().copy(), received.source_token)
        handle = EPHandle.made(kind.handle, origin, native.num_rows)
        if not kind.terms.keep_copy:
            _keep_indices(handle, native, idx)
        if not kind.num_packs:
            return RecvBatch(received.x, arrived, received.scales, handle)
        assert received.scales is not None
        return RecvBatch((received.x, received.scales), arrived, None, handle)
    places = None if side.keeps_order else places_of(native.pair_rows[:, side.number], side.num_scaleup)
    origin = Origin(side, kind.terms, native, None, received.source_token)
    metadata = describe_rows(origin, arrived.data_ptr(), places)
    handle = EPHandle.made(kind.handle, origin, metadata.shape[0])
    handle.fields["recv_src_metadata"] = metadata
    if not kind.terms.keep_copy:
        _keep_indices(handle, native, idx)
    expanded = expanded_rows(side, kind.terms, native) if kind.terms.do_expand else 0
    room = _room(kind, tokens, received, metadata.shape[0], expanded, places)
    _fill(side, kind, room, received, metadata if kind.terms.do_expand else None)
    return _finished(room, handle)


def dispatch_again(side: Side, kind: Kind, tokens: Tokens, handle: EPHandle) -> RecvBatch:
    """Send other tokens where an earlier dispatch sent its own."""
    received = kind.native.dispatch(_wired(side, kind, tokens), handle=native_handle(side, handle, kind.native))
    places = places_from_handle(handle, side.num_ranks)
    if kind.lands and places is None and handle.num_recv_tokens == received.x.shape[0]:
        if not kind.num_packs:
            return RecvBatch(received.x, received.topk_idx, received.scales, handle)
        assert received.scales is not None
        return RecvBatch((received.x, received.scales), received.topk_idx, None, handle)
    expanded = handle.num_expanded_tokens if kind.terms.do_expand else 0
    room = _room(kind, tokens, received, handle.num_recv_tokens, expanded, places)
    _fill(side, kind, room, received, handle.recv_src_metadata if kind.terms.do_expand else None)
    return _finished(room, handle)


def begin_first(side: Side, kind: Kind, tokens: Tokens) -> RecvBatch:
    """The same, but return when the sizes are known: rows are there when ``underway`` was waited for."""
    idx = tokens.topk_idx
    assert idx is not None
    side.natives.make_room()
    pending = kind.native.dispatch(_wired(side, kind, tokens), idx, wait="sizes")
    landing = pending.targets
    if landing is None or landing.handle is None:  # between hosts a handle is known at the end
        return _first_batch(side, kind, tokens, pending.wait())
    native, late = landing.handle, Late()
    places = None if side.keeps_order else places_of(native.pair_rows[:, side.number], side.num_scaleup)
    origin = Origin(side, kind.terms, native, None, landing.source_token, late)
    compact = native.num_rows if kind.terms.exact else side.num_ranks * kind.terms.num_max_tokens
    expanded = expanded_rows(side, kind.terms, native) if kind.terms.do_expand else 0
    room = _room(kind, tokens, landing, compact, expanded, places)
    handle = EPHandle.made(kind.handle, origin, compact)
    if not kind.terms.keep_copy:
        _keep_indices(handle, native, idx)

    def fill(received: Received) -> None:
        assert received.topk_idx is not None
        late.metadata = describe_rows(origin, received.topk_idx.data_ptr(), places)
        _fill(side, kind, room, received, late.metadata if kind.terms.do_expand else None)

    late.underway = side.natives.start(pending, fill)
    return _finished(room, handle)._replace(underway=late.underway)


def begin_again(side: Side, kind: Kind, tokens: Tokens, handle: EPHandle) -> RecvBatch:
    """Send other tokens where an earlier dispatch sent its own, and return at once."""
    native, places = native_handle(side, handle, kind.native), places_from_handle(handle, side.num_ranks)
    metadata = handle.recv_src_metadata if kind.terms.do_expand else None  # waits for the first, if that goes on
    side.natives.make_room()
    pending = kind.native.dispatch(_wired(side, kind, tokens), handle=native, wait=False)
    landing = pending.targets
    if landing is None:
        pending.wait()
        raise AssertionError("a rank without memory refuses")
    expanded = handle.num_expanded_tokens if kind.terms.do_expand else 0
    room = _room(kind, tokens, landing, handle.num_recv_tokens, expanded, places)
    underway = side.natives.start(pending, lambda received: _fill(side, kind, room, received, metadata))
    return _finished(room, handle)._replace(underway=underway)


def _wired(side: Side, kind: Kind, tokens: Tokens) -> Rows:
    """Return the rows, and what travels beside them: scales or weights as they are, or both as side words."""
    x, scales, _, weights = tokens
    if scales is None:
        return x if weights is None else (x, weights)
    if weights is None:
        return x, scales
    if not (scales.is_cpu and weights.is_cpu):
        raise ValueError("scales and weights must be on the CPU")  # told in full by who checks the call
    weights = weights.contiguous()
    words = torch.empty((x.shape[0], kind.num_packs + weights.shape[1]), dtype=torch.int32, device="cpu")
    side.loops.pack_side(
        x.shape[0],
        kind.num_packs,
        weights.shape[1],
        scales.data_ptr(),
        *scales.stride(),
        weights.data_ptr(),
        words.data_ptr(),
    )
    return x, words


class _Room(NamedTuple):
    """A batch's tensors: those that rows land in, or others that are filled from these."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    places: torch.Tensor | None
    """int64 [N]: where rows of the exchange stand in a compact batch; None: in the same order"""


def _room(
    kind: Kind, tokens: Tokens, landing: Received | Targets, compact: int, expanded: int, places: torch.Tensor | None
) -> _Room:
    """Return the tensors of a batch of so many rows, compact or expanded."""
    if kind.terms.do_expand:
        x = torch.empty((expanded, tokens.x.shape[1]), dtype=tokens.x.dtype, device="cpu")
        weights = torch.zeros((expanded,), dtype=torch.float32, device="cpu") if kind.has_weights else None
        return _Room(x, _room_for_scales(kind, tokens, expanded), None, weights, places)
    idx = landing.topk_idx
    assert idx is not None
    if places is None and compact == idx.shape[0]:
        return _Room(landing.x, *_beside(kind, tokens, landing), None)
    x = torch.empty((compact, tokens.x.shape[1]), dtype=tokens.x.dtype, device="cpu")
    weights = torch.zeros((compact, idx.shape[1]), dtype=torch.float32, device="cpu") if kind.has_weights else None
    room_for_idx = torch.empty((compact, idx.shape[1]), dtype=idx.dtype, device="cpu")
    return _Room(x, _room_for_scales(kind, tokens, compact), room_for_idx, weights, places)


def _beside(
    kind: Kind, tokens: Tokens, landing: Received | Targets
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return a compact batch's scales, indices and weights: where they land, if they travel alone and in that order."""
    idx = landing.topk_idx
    assert idx is not None
    if not kind.num_packs:
        return None, idx, landing.scales if kind.has_weights else None
    if not kind.has_weights and not kind.terms.tma_scales:
        return landing.scales, idx, None
    weights = torch.zeros(idx.shape, dtype=torch.float32, device="cpu") if kind.has_weights else None
    return _room_for_scales(kind, tokens, idx.shape[0]), idx, weights


def _room_for_scales(kind: Kind, tokens: Tokens, rows: int) -> torch.Tensor | None:
    if tokens.scales is None:
        return None
    return empty_scales(rows, kind.num_packs, tokens.scales.dtype, tma=kind.terms.tma_scales)


def _fill(side: Side, kind: Kind, room: _Room, received: Received, metadata: torch.Tensor | None) -> None:
    """Lay out what has arrived, now that all of it has; what nobody sent is 0, and -1 in indices.

    ``metadata`` of an expanded batch says where each (row, column) goes.
    """
    if metadata is not None:
        _spread(side, kind, room, received, metadata)
        return
    if room.x.data_ptr() != received.x.data_ptr():
        assert received.topk_idx is not None
        assert room.topk_idx is not None
        fill_rows(room.x, received.x, room.places)
        fill_rows(room.topk_idx, received.topk_idx, room.places, -1)
    beside = received.scales
    if beside is None or (kind.lands and room.places is None and room.x.shape[0] == beside.shape[0]):
        return
    side.loops.take_side(
        beside.shape[0],
        kind.num_packs,
        beside.shape[1] - kind.num_packs,
        beside.data_ptr(),
        0 if room.places is None else room.places.data_ptr(),
        *_addresses(room.scales),
        0 if room.topk_weights is None else room.topk_weights.data_ptr(),
    )


def _spread(side: Side, kind: Kind, room: _Room, received: Received, metadata: torch.Tensor) -> None:
    """Give every (row, column) of a local expert a row of its own."""
    terms, num_rows = kind.terms, received.x.shape[0]
    served = served_rows(metadata[:num_rows], room.places)
    ends_L = (slab_starts(terms, received.handle) + received.handle.send.numbers("counts")).tolist()
    scatter_rows(side.kernels, received.x, served, room.x, ends_L, terms.alignment)
    beside = received.scales
    if beside is not None:
        side.loops.spread_side(
            num_rows,
            kind.num_packs,
            served.shape[1],
            beside.data_ptr(),
            served.data_ptr(),
            int(kind.has_weights),
            *_addresses(room.scales),
            0 if room.topk_weights is None else room.topk_weights.data_ptr(),
        )


def _addresses(scales: torch.Tensor | None) -> tuple[int, int, int]:
    """Return address and strides."""
    return (0, 0, 0) if scales is None else (scales.data_ptr(), scales.stride(0), scales.stride(1))


def served_rows(metadata: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Return the row of the batch in which each column of each row of the exchange is served, int32 [N, K], or -1."""
    return (metadata if places is None else metadata[places])[:, 2:].contiguous()


def _keep_indices(handle: EPHandle, native: Handle, topk_idx: torch.Tensor) -> None:
    """Let the handle have the caller's own indices, to which it may write."""
    handle.fields["topk_idx"] = topk_idx
    route_of(handle, native).note("topk_idx", topk_idx)


def _finished(room: _Room, handle: EPHandle) -> RecvBatch:
    x = room.x if room.scales is None else (room.x, room.scales)
    return RecvBatch(x, room.topk_idx, room.topk_weights, handle)
