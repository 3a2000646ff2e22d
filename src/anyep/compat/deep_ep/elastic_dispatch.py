"""A V2 dispatch: compact rows with their scales, raw weights and numbers beside them; expanded here where asked for.

Legend: T tokens, H hidden, K top-k, N rows of the exchange, L local experts, G packs of scales, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from anyep.compat.deep_ep.elastic_arguments import Terms, Tokens
from anyep.compat.deep_ep.elastic_natives import RAW_DTYPES, Natives, RowKind
from anyep.compat.deep_ep.elastic_rows import (
    empty_scales,
    laid_out,
    places_by_scaleup_rank,
    places_from_handle,
    scatter_rows,
)
from anyep.compat.deep_ep.elastic_sizes import align
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.exchange.handle import Received


class Rank(NamedTuple):
    """Who dispatches, and how it orders what it receives."""

    number: int
    num_ranks: int
    num_scaleup: int
    """groups of the row order: all ranks, unless several hosts take part"""
    sorted: bool
    """order by the tokens' numbers at large, whatever the groups"""


class RecvBatch(NamedTuple):
    """What dispatch returns, but for the event."""

    x: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    handle: EPHandle


def dispatch_first(natives: Natives, rank: Rank, tokens: Tokens, terms: Terms) -> RecvBatch:
    """Send tokens to their experts' ranks and return the batch with a new handle."""
    kind = tokens.kind(terms.num_experts)
    native = natives.for_rows(kind)
    received = native.dispatch(_wired(natives, rank, tokens, kind, terms.num_max_tokens), tokens.topk_idx)
    handle, places = _describe(natives, rank, tokens, terms, received)
    natives.remember(handle, native, native.handles.adopt(received.handle))
    return _batch(natives, tokens, terms, received, handle, places)


def dispatch_again(natives: Natives, rank: Rank, tokens: Tokens, terms: Terms, handle: EPHandle) -> RecvBatch:
    """Send other tokens where an earlier dispatch sent its own."""
    kind = tokens.kind(terms.num_experts)
    native = natives.for_rows(kind)
    known = natives.recall(native, kind, handle)
    received = native.dispatch(_wired(natives, rank, tokens, kind, terms.num_max_tokens), handle=known)
    places = places_from_handle(handle, rank.num_ranks)
    return _batch(natives, tokens, terms, received, handle, places)


def _wired(
    natives: Natives, rank: Rank, tokens: Tokens, kind: RowKind, max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows as a raw wire takes them, and the side words."""
    scales, weights = tokens.scales, tokens.topk_weights
    words = kind.num_packs + kind.num_topk + 1
    side = torch.empty((tokens.num_tokens, words), dtype=torch.int32, device="cpu")
    scales_addr, strides = (0, (0, 0)) if scales is None else (scales.data_ptr(), scales.stride())
    natives.loops.pack_side(
        tokens.num_tokens,
        kind.num_packs,
        kind.num_topk,
        scales_addr,
        *strides,
        0 if weights is None else weights.data_ptr(),
        rank.number * max_tokens,
        side.data_ptr(),
    )
    return tokens.x.view(RAW_DTYPES[kind.itemsize]), side


def _describe(
    natives: Natives, rank: Rank, tokens: Tokens, terms: Terms, received: Received
) -> tuple[EPHandle, torch.Tensor | None]:
    """Fill a handle from what arrived; also return where rows of the exchange stand in the batch."""
    announced = received.handle.announced
    assert announced is not None, "buffers with a raw wire keep what was announced"
    counts = torch.from_numpy(announced)
    slabs = _count(natives, rank, terms, counts)
    places = None
    if not rank.sorted and rank.num_scaleup < rank.num_ranks:
        places = places_by_scaleup_rank(announced[:, rank.number].tolist(), rank.num_scaleup)
    aligned_L = [align(count, terms.alignment) for count in received.counts] if terms.exact else []
    num_rows, num_expanded = _batch_rows(rank, terms, tokens.topk_idx.shape[1], received, sum(aligned_L))
    handle = EPHandle(
        do_expand=terms.do_expand,
        num_experts=terms.num_experts,
        expert_alignment=terms.alignment,
        num_max_tokens_per_rank=terms.num_max_tokens,
        num_sms=terms.num_sms,
        topk_idx=tokens.topk_idx.clone() if terms.keep_copy else tokens.topk_idx,
        num_recv_tokens=num_rows,
        num_expanded_tokens=num_expanded,
        num_recv_tokens_per_expert_list=aligned_L,
        psum_num_recv_tokens_per_scaleup_rank=slabs.sums,
        psum_num_recv_tokens_per_expert=slabs.ends,
        num_unaligned_recv_tokens_per_expert=slabs.counts,
        recv_src_metadata=_metadata(natives, tokens, terms, received, places, slabs.starts, num_rows),
        dst_buffer_slot_idx=_slots(natives, rank, tokens, terms),
        announced_counts=counts,
    )
    return handle, places


class _Slabs(NamedTuple):
    """Counts of a batch, int32; elastic_loops.py: count_rows."""

    sums: torch.Tensor
    counts: torch.Tensor
    ends: torch.Tensor
    starts: torch.Tensor


def _count(natives: Natives, rank: Rank, terms: Terms, announced: torch.Tensor) -> _Slabs:
    num_local = terms.num_experts // rank.num_ranks
    sizes = (rank.num_scaleup, num_local, num_local, num_local)
    memory = torch.empty((sum(sizes),), dtype=torch.int32, device="cpu")
    slabs = _Slabs(*torch.split_with_sizes(memory, sizes))
    natives.loops.count_rows(
        announced.data_ptr(),
        rank.num_ranks,
        terms.num_experts,
        rank.number,
        rank.num_scaleup,
        num_local,
        terms.alignment,
        int(terms.do_expand),
        *[part.data_ptr() for part in slabs],
    )
    return slabs


def _batch_rows(rank: Rank, terms: Terms, num_topk: int, received: Received, expanded: int) -> tuple[int, int]:
    """Return the rows of a batch, compact and expanded: what arrived, or the most that can arrive."""
    if terms.exact:
        return received.x.shape[0], expanded
    most, num_local = rank.num_ranks * terms.num_max_tokens, len(received.counts)
    padding = (terms.alignment - 1) * num_local
    return most, align(most * min(num_topk, num_local) + padding, terms.alignment)


def _metadata(
    natives: Natives,
    tokens: Tokens,
    terms: Terms,
    received: Received,
    places: torch.Tensor | None,
    starts: torch.Tensor,
    num_rows: int,
) -> torch.Tensor:
    assert received.topk_idx is not None
    assert received.scales is not None
    valid, num_topk = received.topk_idx.shape
    metadata = torch.empty((num_rows, num_topk + 2), dtype=torch.int32, device="cpu")
    if valid < num_rows:
        metadata[valid:] = -1
    natives.loops.describe_rows(
        received.topk_idx.data_ptr(),
        received.topk_idx.itemsize,
        valid,
        num_topk,
        received.scales.data_ptr(),
        received.scales.shape[1],
        max(1, terms.num_max_tokens),
        0 if places is None else places.data_ptr(),
        starts.data_ptr() if terms.do_expand else 0,
        metadata.data_ptr(),
    )
    return metadata


def _slots(natives: Natives, rank: Rank, tokens: Tokens, terms: Terms) -> torch.Tensor:
    idx = tokens.topk_idx
    slots = torch.empty(idx.shape, dtype=torch.int32, device="cpu")
    natives.loops.number_slots(
        idx.data_ptr(),
        idx.itemsize,
        *idx.shape,
        rank.num_ranks,
        terms.num_experts // rank.num_ranks,
        rank.number * terms.num_max_tokens,
        slots.data_ptr(),
    )
    return slots


def served_rows(metadata: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Return the row of the batch in which each column of each row of the exchange is served, int32 [N, K], or -1."""
    return (metadata if places is None else metadata[places])[:, 2:].contiguous()


def _batch(
    natives: Natives,
    tokens: Tokens,
    terms: Terms,
    received: Received,
    handle: EPHandle,
    places: torch.Tensor | None,
) -> RecvBatch:
    """Lay the rows out as the handle says; what nobody sent is 0, and -1 in indices."""
    if terms.do_expand:
        return _expanded_batch(natives, tokens, terms, received, handle, places)
    total, num_topk, idx = handle.num_recv_tokens, tokens.topk_idx.shape[1], received.topk_idx
    assert idx is not None
    scales, weights = _side_tensors(tokens, terms, (total,), (num_topk,), filled=total == idx.shape[0])
    place_addr = 0 if places is None else places.data_ptr()
    _unpack_side(natives.loops.take_side, received, num_topk, place_addr, scales, weights)
    x = laid_out(received.x, places, total).view(tokens.x.dtype)
    return RecvBatch(x if scales is None else (x, scales), laid_out(idx, places, total, -1), weights, handle)


def _expanded_batch(
    natives: Natives,
    tokens: Tokens,
    terms: Terms,
    received: Received,
    handle: EPHandle,
    places: torch.Tensor | None,
) -> RecvBatch:
    """Give every (row, column) of a local expert a row of its own."""
    total, num_topk = handle.num_expanded_tokens, tokens.topk_idx.shape[1]
    served = served_rows(handle.recv_src_metadata[: received.x.shape[0]], places)
    ends_L = handle.psum_num_recv_tokens_per_expert.tolist()
    x = scatter_rows(natives.kernels, received.x, served, total, ends_L, terms.alignment).view(tokens.x.dtype)
    scales, weights = _side_tensors(tokens, terms, (total,), (), filled=False)
    _unpack_side(natives.loops.spread_side, received, num_topk, served.data_ptr(), scales, weights)
    return RecvBatch(x if scales is None else (x, scales), None, weights, handle)


def _side_tensors(
    tokens: Tokens, terms: Terms, rows: tuple[int], columns: tuple[int, ...], *, filled: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the memory of a batch's scales and weights; zeros unless every row will be ``filled``."""
    scales = weights = None
    if tokens.scales is not None:
        scales = empty_scales(*rows, tokens.scales.shape[1], tokens.scales.dtype, tma=terms.tma_scales)
    if tokens.topk_weights is not None:
        make = torch.empty if filled else torch.zeros
        weights = make(rows + columns, dtype=torch.float32, device="cpu")
    return scales, weights


def _unpack_side(
    loop: Callable[..., None],
    received: Received,
    num_topk: int,
    where_addr: int,
    scales: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> None:
    """Let a loop bring the side words where they belong; ``where``: what it is told of the rows' places."""
    if scales is None and weights is None:
        return
    side = received.scales
    assert side is not None
    loop(
        side.shape[0],
        side.shape[1] - num_topk - 1 if scales is not None else 0,
        num_topk,
        side.data_ptr(),
        where_addr,
        *((0, 0, 0) if scales is None else (scales.data_ptr(), *scales.stride())),
        0 if weights is None else weights.data_ptr(),
    )
