"""The tuples that V1's dispatch returns as its handle: 6 members on one host, 10 between hosts.

Legend: T tokens, R ranks, H hosts, C channels, N received rows. There are no queues here: members that describe them
say what they would hold if each token went straight to its ranks. What a rank forwards for others is in no member.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from anyep.compat.deep_ep.checks import refuse
from anyep.compat.deep_ep.handles_on_device import members_on_device
from anyep.compat.deep_ep.layout import loops, made, tensor_on
from anyep.compat.deep_ep.lazy_tuple import LazyTuple, item
from anyep.compat.deep_ep.native import Kept, Natives, Served
from anyep.compat.deep_ep.normal_batch import NormalContext
from anyep.compat.deep_ep.recalled import INTERNODE, INTRANODE, KEY, recalled
from anyep.compat.deep_ep.underway import Underway
from anyep.exchange.device.plan import DevicePlan
from anyep.exchange.handle import Handle


class NormalKept(NamedTuple):
    """What a handle's members are made from: the dispatch's own records; only ``inside`` is the caller's."""

    served: Served
    handle: Handle
    context: NormalContext
    token: torch.Tensor | None
    """source token of each row [N]"""
    inside: torch.Tensor
    """the caller's is_token_in_rank [T, R], handed on as a member"""
    num_sms: int
    """twice the channels that members describe"""
    underway: Underway | None
    """what brings the source tokens, where the dispatch is not over"""

    @property
    def channels(self) -> int:
        return max(1, self.num_sms // 2)


new_kept = partial(tuple.__new__, NormalKept)
"""Makes one of a tuple of all fields; the class's own constructor is a Python function, slow from cold caches."""


class NormalHandle(LazyTuple):
    """A dispatch's handle."""

    def _make(self) -> tuple[Any, ...]:
        kept: NormalKept = self.origin
        if isinstance(kept.handle.send, DevicePlan):
            return _on_device(kept)
        if kept.underway is not None:
            kept.underway.wait()
        if kept.context.natives.device is None:
            return (_intranode if len(self) == INTRANODE else _internode)(kept)
        return _by_way_of_host(kept, KEY[len(self)])


def find_handle(natives: Natives, handle: object) -> Kept:
    """Return what a handle stands for, or a tuple of its members, or of copies of them. RuntimeError for others."""
    if type(handle) is NormalHandle:
        made: NormalKept = item(handle, 0)
        if made.context.natives is natives:
            return made
    if not isinstance(handle, (tuple, list)) or len(handle) not in KEY:
        refuse(f"handle must be a tuple of {INTRANODE} or {INTERNODE} tensors as dispatch returned it")
    kept = natives.handles.find(handle[KEY[len(handle)]])
    return kept if isinstance(kept, NormalKept) else recalled(natives, tuple(handle))


def _sent(kept: Kept, ranks: int) -> torch.Tensor:
    """Return bool [T, R]: which ranks each token was sent to."""
    ranks_TW = kept.handle.send.entry_ranks()
    sent = np.zeros((len(ranks_TW), ranks), np.bool_)
    token, entry = np.nonzero(ranks_TW >= 0)
    sent[token, ranks_TW[token, entry]] = True
    return tensor_on(sent)


def _numbered(inside: torch.Tensor, group: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many tokens each channel sends to each ``group`` of ranks, [D, C] inclusive, and each one's number."""
    tokens, ranks = inside.shape
    destinations = -(-ranks // group)
    prefix, head = made(destinations, channels), made(tokens, destinations)
    loops().number_in_channels(inside.data_ptr(), tokens, ranks, group, channels, prefix.data_ptr(), head.data_ptr())
    return prefix, head


def _starts(kept: Kept, token: torch.Tensor, rank: int, channels: int) -> Any:
    pairs = kept.handle.pair_rows
    starts = np.empty((pairs.shape[0], channels), np.int32)
    rows = np.ascontiguousarray(pairs[:, rank])
    loops().channel_starts(token.data_ptr(), rows, kept.handle.source_tokens, channels, starts)
    return starts


def _on_device(kept: NormalKept) -> tuple[Any, ...]:
    """Six members: on a device all ranks are on one host."""
    assert kept.token is not None, "the variants of normal calls bring source tokens"
    prefix, *others = members_on_device(kept.handle, kept.token, kept.inside, kept.served.ep.rank, kept.channels)
    return kept.context.natives.handles.keep_tensor(prefix, kept), *others


def _by_way_of_host(kept: NormalKept, key: int) -> tuple[Any, ...]:
    """Between hosts a device's dispatch is the host's: so are its members, but for where they lie."""
    assert kept.token is not None, "the variants of normal calls bring source tokens"
    on_host = kept._replace(token=kept.token.cpu())
    made = (_intranode if key == KEY[INTRANODE] else _internode)(on_host)
    members = [kept.inside if one is kept.inside else one.to(kept.token.device, copy=True) for one in made]
    members[key] = kept.context.natives.handles.keep_tensor(members[key], kept)
    return tuple(members)


def _intranode(kept: NormalKept) -> tuple[Any, ...]:
    token, domain, channels = kept.token, kept.context.domain, kept.channels
    assert token is not None, "the variants of normal calls bring source tokens"
    prefix, head = _numbered(_sent(kept, domain.num_ranks), 1, channels)
    return (
        kept.context.natives.handles.keep(np.cumsum(kept.handle.pair_rows, axis=0, dtype=np.int32), kept),
        prefix,
        tensor_on(_starts(kept, token, kept.served.ep.rank, channels)),
        token,
        kept.inside,
        head,
    )


def _internode(kept: NormalKept) -> tuple[Any, ...]:
    token, domain, channels = kept.token, kept.context.domain, kept.channels
    assert token is not None, "the variants of normal calls bring source tokens"
    rank, per_host, hosts = kept.served.ep.rank, domain.per_host, domain.num_hosts
    sent = _sent(kept, domain.num_ranks)
    host_prefix, host_head = _numbered(sent, per_host, channels)
    prefix, _ = _numbered(sent, 1, channels)
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
        kept.inside,
        host_prefix,
        prefix,
        torch.from_numpy(host_ends_HC),
        torch.from_numpy(np.cumsum(host_ends_HC[:, -1], dtype=np.int32)),
        torch.from_numpy(starts_RC + (ends_R - rows_R)[:, None].astype(np.int32)),
        kept.context.natives.handles.keep(ends_R, kept),
        tensor_on(meta.view(np.uint8)),
        host_head,
        tensor_on(nvl_head),
    )
