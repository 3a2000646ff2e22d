"""The tuples that V1's dispatch returns as its handle: 6 members on one host, 10 between hosts.

Legend: T tokens, R ranks, H hosts, C channels, N received rows. There are no queues and nothing is forwarded here: a
token goes straight to each of its ranks. Members that describe queues say what they would, were there some.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import anyep
from anyep.compat.deep_ep.checks import host_assert
from anyep.compat.deep_ep.domains import Domain
from anyep.compat.deep_ep.layout import loops, made
from anyep.compat.deep_ep.native import Kept, Natives, empty_i32

HandleTuple = tuple[Any, ...]
_INTRANODE, _INTERNODE = 6, 10
_KEY = {_INTRANODE: 0, _INTERNODE: 6}
"""The member by which a handle is known: rank_prefix_matrix, recv_gbl_rank_prefix_sum."""
_IN_RANK = {_INTRANODE: 4, _INTERNODE: 0}
_CHANNELS = {_INTRANODE: 1, _INTERNODE: 2}
_META_BYTES = 8


def make_handle(
    natives: Natives,
    kept: Kept,
    received: anyep.Received,
    inside: torch.Tensor,
    domain: Domain,
    rank: int,
    channels: int,
) -> HandleTuple:
    """Return a dispatch's handle; ``inside``: is_token_in_rank [T, R]."""
    assert received.source_token is not None
    make = _internode if domain.crosses_hosts else _intranode
    return make(natives, kept, received.source_token, inside, domain, rank, channels)


def find_handle(natives: Natives, handle: object) -> tuple[Kept, torch.Tensor, int]:
    """Return what a handle tuple stands for, its is_token_in_rank and its channels. RuntimeError for others."""
    host_assert(
        isinstance(handle, (tuple, list)) and len(handle) in _KEY,
        f"handle must be a tuple of {_INTRANODE} or {_INTERNODE} tensors as dispatch returned it",
    )
    assert isinstance(handle, (tuple, list))
    members = len(handle)
    kept = natives.find(handle[_KEY[members]])
    return kept, handle[_IN_RANK[members]], int(handle[_CHANNELS[members]].size(1))


def _numbered(inside: torch.Tensor, group: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many tokens each channel sends to each ``group`` of ranks, [D, C] inclusive, and each one's number."""
    tokens, ranks = inside.shape
    destinations = -(-ranks // group)
    prefix, head = made(destinations, channels), made(tokens, destinations)
    loops().number_in_channels(inside.data_ptr(), tokens, ranks, group, channels, prefix.data_ptr(), head.data_ptr())
    return prefix, head


def _starts(kept: Kept, token: torch.Tensor, rank: int, channels: int) -> Any:
    pairs = kept.handle.pair_rows
    starts = empty_i32(pairs.shape[0], channels)
    rows = np.ascontiguousarray(pairs[:, rank])
    loops().channel_starts(token.data_ptr(), rows, kept.handle.source_tokens, channels, starts)
    return starts


def _intranode(
    natives: Natives, kept: Kept, token: torch.Tensor, inside: torch.Tensor, domain: Domain, rank: int, channels: int
) -> HandleTuple:
    prefix, head = _numbered(inside, 1, channels)
    return (
        natives.keep(np.cumsum(kept.handle.pair_rows, axis=0, dtype=np.int32), kept),
        prefix,
        torch.from_numpy(_starts(kept, token, rank, channels)),
        token,
        inside,
        head,
    )


def _internode(
    natives: Natives, kept: Kept, token: torch.Tensor, inside: torch.Tensor, domain: Domain, rank: int, channels: int
) -> HandleTuple:
    per_host, hosts = domain.per_host, domain.num_hosts
    host_prefix, host_head = _numbered(inside, per_host, channels)
    prefix, _ = _numbered(inside, 1, channels)
    rows_R = np.ascontiguousarray(kept.handle.pair_rows[:, rank])
    ends_R = np.cumsum(rows_R, dtype=np.int32)
    starts_RC = _starts(kept, token, rank, channels)
    hosts_R = np.arange(domain.num_ranks) // per_host
    ends_RC = np.concatenate([starts_RC[:, 1:], rows_R[:, None]], axis=1)
    host_ends_HC = np.zeros((hosts, channels), np.int32)
    np.add.at(host_ends_HC, hosts_R, ends_RC)
    num_rows = int(ends_R[-1])
    meta = np.zeros((len(token), 2), np.int32)
    meta[:num_rows, 0] = np.repeat(hosts_R, rows_R)
    meta[:num_rows, 1] = 1 << (rank % per_host)
    nvl_head = np.full((num_rows, per_host), -1, np.int32)
    nvl_head[:, rank % per_host] = np.arange(num_rows)
    return (
        inside,
        host_prefix,
        prefix,
        torch.from_numpy(host_ends_HC),
        torch.from_numpy(np.cumsum(host_ends_HC[:, -1], dtype=np.int32)),
        torch.from_numpy(starts_RC + (ends_R - rows_R)[:, None].astype(np.int32)),
        natives.keep(ends_R, kept),
        torch.from_numpy(meta).view(torch.uint8).view(len(token), _META_BYTES),
        host_head,
        torch.from_numpy(nvl_head),
    )
