"""The tensors of a V2 batch, and how what has arrived is laid out in them: expanded, by hosts, or as it landed.

Legend: T tokens, H hidden, K top-k, N rows of the exchange, L local experts, G packs of scales.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from anyep.compat.deep_ep.checks import refuse
from anyep.compat.deep_ep.elastic_arguments import Terms
from anyep.compat.deep_ep.elastic_context import ElasticContext
from anyep.compat.deep_ep.elastic_fields import slab_starts
from anyep.compat.deep_ep.elastic_rows import empty_scales, fill_rows, scatter_rows
from anyep.compat.deep_ep.ep_handle import EPHandle, HandleKind
from anyep.exchange.calls import Calls
from anyep.exchange.event import Targets
from anyep.exchange.handle import Received

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class DispatchPlan(NamedTuple):
    """A dispatch of one kind, which passed its checks: how it is done."""

    native: Calls
    """the buffer that moves such rows"""
    terms: Terms
    num_packs: int
    """G; 0 without scales"""
    has_weights: bool
    kind: HandleKind
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


new_tokens = partial(tuple.__new__, Tokens)
"""Makes one of a tuple of all fields; the class's own constructor is a Python function, slow from cold caches."""


class Room(NamedTuple):
    """A batch's tensors: those that rows land in, or others that are filled from these."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    places: torch.Tensor | None
    """int64 [N]: where rows of the exchange stand in a compact batch; None: in the same order"""

    def rows(self) -> Rows:
        """Return the rows, in a pair with their scales where there are any."""
        return self.x if self.scales is None else (self.x, self.scales)


def room_for(
    plan: DispatchPlan,
    tokens: Tokens,
    landing: Received | Targets,
    compact: int,
    expanded: int,
    places: torch.Tensor | None,
) -> Room:
    """Return the tensors of a batch of so many rows, compact or expanded."""
    if plan.terms.do_expand:
        x = torch.empty((expanded, tokens.x.shape[1]), dtype=tokens.x.dtype, device="cpu")
        weights = torch.zeros((expanded,), dtype=torch.float32, device="cpu") if plan.has_weights else None
        return Room(x, _room_for_scales(plan, tokens, expanded), None, weights, places)
    idx = landing.topk_idx
    assert idx is not None
    if places is None and compact == idx.shape[0]:
        return Room(landing.x, *_beside(plan, tokens, landing), None)
    x = torch.empty((compact, tokens.x.shape[1]), dtype=tokens.x.dtype, device="cpu")
    weights = torch.zeros((compact, idx.shape[1]), dtype=torch.float32, device="cpu") if plan.has_weights else None
    room_for_idx = torch.empty((compact, idx.shape[1]), dtype=idx.dtype, device="cpu")
    return Room(x, _room_for_scales(plan, tokens, compact), room_for_idx, weights, places)


def _beside(
    plan: DispatchPlan, tokens: Tokens, landing: Received | Targets
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return a compact batch's scales, indices and weights: where they land, if they travel alone and in that order."""
    idx = landing.topk_idx
    assert idx is not None
    if not plan.num_packs:
        return None, idx, landing.scales if plan.has_weights else None
    if not plan.has_weights and not plan.terms.tma_scales:
        return landing.scales, idx, None
    weights = torch.zeros(idx.shape, dtype=torch.float32, device="cpu") if plan.has_weights else None
    return _room_for_scales(plan, tokens, idx.shape[0]), idx, weights


def _room_for_scales(plan: DispatchPlan, tokens: Tokens, rows: int) -> torch.Tensor | None:
    if tokens.scales is None:
        return None
    return empty_scales(rows, plan.num_packs, tokens.scales.dtype, tma=plan.terms.tma_scales)


def fill_room(
    context: ElasticContext, plan: DispatchPlan, room: Room, received: Received, metadata: torch.Tensor | None
) -> None:
    """Lay out what has arrived, now that all of it has; what nobody sent is 0, and -1 in indices.

    ``metadata`` of an expanded batch says where each (row, column) goes.
    """
    if metadata is not None:
        _spread(context, plan, room, received, metadata)
        return
    if room.x.data_ptr() != received.x.data_ptr():
        assert received.topk_idx is not None
        assert room.topk_idx is not None
        fill_rows(room.x, received.x, room.places)
        fill_rows(room.topk_idx, received.topk_idx, room.places, -1)
    beside = received.scales
    if beside is None or (plan.lands and room.places is None and room.x.shape[0] == beside.shape[0]):
        return
    context.loops.take_side(
        beside.shape[0],
        plan.num_packs,
        beside.shape[1] - plan.num_packs,
        beside.data_ptr(),
        0 if room.places is None else room.places.data_ptr(),
        *_addresses(room.scales),
        0 if room.topk_weights is None else room.topk_weights.data_ptr(),
    )


def _spread(
    context: ElasticContext, plan: DispatchPlan, room: Room, received: Received, metadata: torch.Tensor
) -> None:
    """Give every (row, column) of a local expert a row of its own."""
    terms, num_rows = plan.terms, received.x.shape[0]
    served = served_rows(metadata[:num_rows], room.places)
    ends_L = (slab_starts(terms, received.handle) + received.handle.send.numbers("counts")).tolist()
    scatter_rows(context.kernels, received.x, served, room.x, ends_L, terms.alignment)
    beside = received.scales
    if beside is not None:
        context.loops.spread_side(
            num_rows,
            plan.num_packs,
            served.shape[1],
            beside.data_ptr(),
            served.data_ptr(),
            int(plan.has_weights),
            *_addresses(room.scales),
            0 if room.topk_weights is None else room.topk_weights.data_ptr(),
        )


def _addresses(scales: torch.Tensor | None) -> tuple[int, int, int]:
    """Return address and strides."""
    return (0, 0, 0) if scales is None else (scales.data_ptr(), scales.stride(0), scales.stride(1))


def served_rows(metadata: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Return the row of the batch in which each column of each row of the exchange is served, int32 [N, K], or -1."""
    return (metadata if places is None else metadata[places])[:, 2:].contiguous()


def checked_metadata(handle: EPHandle, num_rows: int) -> torch.Tensor:
    """Return ``recv_src_metadata`` of the N rows that were received: loops write where it points, and callers may too.

    RuntimeError where fields do not fit together.
    """
    metadata, width, rows = handle.recv_src_metadata, handle.kind.num_topk + 2, handle.num_rows
    if not isinstance(metadata, torch.Tensor) or metadata.dtype != torch.int32 or metadata.dim() != 2:
        refuse("a handle's recv_src_metadata must be an int32 tensor [N, K + 2]")
    if metadata.shape[0] < num_rows or metadata.shape[1] != width:
        refuse(f"a handle's recv_src_metadata must be [{num_rows}, {width}], got {list(metadata.shape)}")
    if handle.num_valid_tokens != num_rows:
        told = handle.num_valid_tokens
        refuse(f"psum_num_recv_tokens_per_scaleup_rank ends with {told}, but {num_rows} tokens were received")
    metadata = metadata[:num_rows]
    if num_rows and int(metadata[:, 2:].max()) >= rows:
        refuse(f"a handle's recv_src_metadata names rows from {rows} on, which the batch does not have")
    return metadata
