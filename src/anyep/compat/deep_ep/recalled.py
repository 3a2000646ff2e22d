"""V1 handles made again from copies of their tensors: clones, pickles, what another Buffer's dispatch returned.

The six members of one host say all that places depend on. The ten between hosts, and the five of low latency, do not
say where rows lie at other ranks: all ranks ask each other then, by a dispatch whose rows nobody reads. So all ranks
must use copies alike.

Legend: T tokens, E experts, R ranks, N received rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from anyep.compat.deep_ep.checks import check_dense, refuse
from anyep.compat.deep_ep.known_handles import UNCOUNTED, version_of
from anyep.compat.deep_ep.native import Kept, Natives, Served, ask_everybody
from anyep.exchange.handle import Handle
from anyep.exchange.wire import carrying_wire

INTRANODE, INTERNODE = 6, 10
"""Members of a handle."""
KEY = {INTRANODE: 0, INTERNODE: 6}
"""The member by which a handle is known: rank_prefix_matrix, recv_gbl_rank_prefix_sum."""
_PREFIX, _TOKENS, _INSIDE = 0, 3, 4
"""Of six: rank_prefix_matrix, recv_src_idx, is_token_in_rank."""
_NOTHING = carrying_wire(torch.uint8, 1, 0, torch.float32)


class Recalled(NamedTuple):
    """What copies of a handle's members stand for."""

    served: Served
    handle: Handle


def recalled(natives: Natives, members: tuple[Any, ...]) -> Kept:
    """Return what a dispatch kept whose handle had such members. RuntimeError for what are none."""
    key = members[KEY[len(members)]]
    if not isinstance(key, torch.Tensor) or key.dtype != torch.int32:
        refuse("handle must hold the tensors that a dispatch returned, or copies of them")
    natives.settle_on(key)
    versions = tuple(_version(one) for one in members)
    known: Kept | None = natives.handles.recall(key, versions)
    if known is not None:
        return known
    kept = (_from_counts if len(members) == INTRANODE else _by_asking)(natives, members)
    if UNCOUNTED not in versions:
        natives.handles.note_recalled(key, versions, kept)
    return kept


def _version(member: Any) -> int:
    """Return how often a member was written to. RuntimeError for what is no tensor."""
    if not isinstance(member, torch.Tensor):
        refuse(f"handle must hold tensors, got {type(member).__name__}")
    return version_of(member)


def ranks_as_experts(inside: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return int32 [T, R]: each rank's first expert where the token goes there, else -1."""
    ranks = inside.size(1)
    first = torch.arange(0, num_experts, num_experts // ranks, dtype=torch.int32, device=inside.device)
    return first.masked_fill(~inside, -1) if inside.size(0) else inside.int()


def _from_counts(natives: Natives, members: tuple[Any, ...]) -> Kept:
    """Six members: who sent how many rows to whom, and which tokens this rank sent where."""
    prefix = check_dense("handle[0]", members[_PREFIX], torch.int32, [None, None], "[R, R]")
    ranks = prefix.size(0)
    inside = check_dense("handle[4]", members[_INSIDE], torch.bool, [None, ranks], "[T, R]")
    token = check_dense("handle[3]", members[_TOKENS], torch.int32, [None], "[N]")
    experts = natives.first_num_experts(ranks)
    announced = prefix.new_zeros((ranks, ranks + experts))
    announced[:, :ranks] = prefix.diff(dim=0, prepend=prefix.new_zeros((1, ranks)))
    announced[:, ranks :: experts // ranks] = announced[:, :ranks]
    rank = natives.buffer(experts).rank
    static = len(token) if len(token) > int(prefix[-1, rank]) else None
    ep = natives.variant(experts, _NOTHING, ranks, static_rows=static)
    try:
        native = ep.handles.recall(ranks_as_experts(inside, experts), announced)
    except ValueError as error:
        raise RuntimeError(f"Assertion exception: handle's members do not belong together: {error}") from error
    return Recalled(Served(ep, experts, ranks, static), native)


def _by_asking(natives: Natives, members: tuple[Any, ...]) -> Kept:
    """Ten members: which tokens this rank sent where; the others tell theirs."""
    inside = check_dense("handle[0]", members[0], torch.bool, [None, None], "[T, R]")
    ranks, rows = inside.size(1), members[7].size(0)
    experts = natives.first_num_experts(ranks)
    static = rows if rows > int(members[6][-1]) else None
    ep = natives.variant(experts, _NOTHING, ranks, static_rows=static)
    native = ask_everybody(ep, ranks_as_experts(inside, experts), "compact")
    return Recalled(Served(ep, experts, ranks, static), native)


def sum_for_owners(natives: Natives, per_expert: torch.Tensor, num_ranks: int) -> list[int]:
    """Return what all ranks' ``per_expert`` int32 [E] add up to for this rank's experts: all tell each other."""
    rows = per_expert.view(num_ranks, -1)
    wire = carrying_wire(torch.int32, rows.size(1), 0, torch.float32)
    ep = natives.variant(per_expert.numel(), wire, 1, static_rows=num_ranks)
    owner = torch.arange(0, per_expert.numel(), rows.size(1), dtype=torch.int32, device=rows.device)
    told: list[int] = ep.dispatch(rows, owner.unsqueeze(1)).x.sum(0).tolist()
    return told


def ask_for_blocks(natives: Natives, topk_idx: torch.Tensor, most_tokens: int, num_experts: int) -> Handle:
    """Return a low-latency dispatch's handle, from where tokens went: all ranks tell each other again."""
    natives.settle_on(topk_idx)
    ep = natives.variant(num_experts, _NOTHING, topk_idx.size(1), max_tokens=most_tokens)
    return ask_everybody(ep, topk_idx, "padded")
