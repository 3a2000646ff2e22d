"""The six members of a dispatch's handle on a device: handles.py by torch's operations, none of which waits.

Legend: T tokens, R ranks, C channels, N received rows.
"""

from __future__ import annotations

from typing import Any

import torch

from anyep.exchange.device.announced import announced_on, entry_ranks
from anyep.exchange.device.plan import DevicePlan
from anyep.exchange.handle import Handle


def members_on_device(
    handle: Handle, token: torch.Tensor, inside: torch.Tensor, rank: int, channels: int
) -> tuple[Any, ...]:
    """Return the members; ``token`` int32 [N]: source token of each row, ``inside`` the caller's bool [T, R]."""
    plan = handle.send
    assert isinstance(plan, DevicePlan), "a device's handle has a device's plan"
    pairs_RR = announced_on(plan)[:, : plan.map.num_ranks]
    sent = _sent(entry_ranks(plan), plan.map.num_ranks)
    prefix, head = number_in_channels(sent, channels)
    tokens_R = torch.from_numpy(handle.source_tokens).to(token.device)
    starts = channel_starts(token, pairs_RR[:, rank].contiguous(), tokens_R, channels)
    return pairs_RR.cumsum(0, dtype=torch.int32), prefix, starts, token, inside, head


def _sent(ranks_TW: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Return bool [T, R]: which ranks each token was sent to."""
    columns = torch.where(ranks_TW < 0, num_ranks, ranks_TW).long()
    sent = torch.zeros((len(ranks_TW), num_ranks + 1), dtype=torch.bool, device=ranks_TW.device)
    return sent.scatter_(1, columns, True)[:, :num_ranks]


def number_in_channels(sent: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many tokens each channel sends to each rank, int32 [R, C] inclusive, and each one's number [T, R].

    >>> prefix, head = number_in_channels(torch.tensor([[True], [False], [True]]), 2)
    >>> prefix.tolist(), head.tolist()
    ([[1, 2]], [[0], [-1], [0]])
    """
    num_tokens, num_ranks = sent.shape
    length = max(1, -(-num_tokens // channels))
    before = torch.zeros((num_tokens + 1, num_ranks), dtype=torch.int32, device=sent.device)
    torch.cumsum(sent, 0, dtype=torch.int32, out=before[1:])
    ends = torch.arange(1, channels + 1, device=sent.device) * length
    prefix = before[ends.clamp(max=num_tokens)].t().contiguous()
    first = torch.arange(num_tokens, device=sent.device) // length * length
    return prefix, torch.where(sent, before[:-1] - before[first], -1)


def channel_starts(token: torch.Tensor, rows_R: torch.Tensor, tokens_R: torch.Tensor, channels: int) -> torch.Tensor:
    """Return int32 [R, C]: how many of each source's rows belong to earlier channels; rows behind the last count not.

    >>> int32 = torch.tensor([[0, 2, 1, 0], [2, 1, 3, 2]], dtype=torch.int32)
    >>> channel_starts(int32[0, :3], int32[1, :2], int32[1, 2:], 2).tolist()
    [[0, 1], [0, 0]]
    """
    num_ranks = len(rows_R)
    number = torch.arange(len(token), device=token.device, dtype=torch.int32)
    source = torch.searchsorted(rows_R.cumsum(0, dtype=torch.int32), number, right=True)
    lengths = ((tokens_R + channels - 1) // channels).clamp(min=1)
    channel = token // torch.cat([lengths, lengths.new_ones(1)])[source]
    flat = source * channels + channel.clamp(0, channels - 1)
    counts = torch.zeros((num_ranks + 1) * channels, dtype=torch.int32, device=token.device)
    counts.scatter_add_(0, flat, torch.ones_like(number))
    by_channel = counts.view(num_ranks + 1, channels)[:num_ranks]
    return by_channel.cumsum(1, dtype=torch.int32) - by_channel
