"""What all ranks announced of a dispatch, kept with its plan on the device; and boards made of such numbers again.

Legend: R ranks, E experts, W entries a token.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from anyep.exchange.device.plan import DevicePlan
from anyep.exchange.device.reach import NOWHERE
from anyep.kernels.spec_device import CAPACITY, FAULT, HEAD_WORDS, NO_FAULT, message_bytes

_ANY_ROWS = 1 << 40


def announced_on(plan: DevicePlan) -> torch.Tensor:
    """Return int32 [R, R + E]: rows for each rank, then (token, column) pairs of each expert, told by each; dense.

    On the device, without waiting, of a plan that keeps its board.
    """
    where = plan.map
    assert where.board_addr, "rows of this kind say which token they are"
    board = plan.device_memory[where.first(where.board_addr) :]
    return counts_on(board, where.num_ranks, where.num_ranks, where.num_experts).contiguous()


def counts_on(board: torch.Tensor, num_messages: int, num_ranks: int, num_experts: int) -> torch.Tensor:
    """Return int32 [messages, R + E] on a board, int32; a view."""
    stride = message_bytes(num_ranks, num_experts) // 4
    shape, first = (num_messages, num_ranks + num_experts), board.storage_offset() + 2 * HEAD_WORDS
    return board.as_strided(shape, (stride, 1), first)


def board_of(counts: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Return a board, int32, as if messages with ``counts`` int32 [messages, R + E] had come, with room for all."""
    num_messages, num_counts = counts.shape
    words = message_bytes(num_ranks, num_counts - num_ranks) // 8
    board = torch.full((num_messages, words), NOWHERE, dtype=torch.int64, device=counts.device)
    board[:, CAPACITY] = _ANY_ROWS
    board[:, FAULT] = NO_FAULT
    numbers = board.view(torch.int32).flatten()
    counts_on(numbers, num_messages, num_ranks, num_counts - num_ranks).copy_(counts)
    return numbers


def entry_ranks(plan: DevicePlan) -> torch.Tensor:
    """Return the rank of each entry, int32 [T, W] on the device, -1 for none; a view."""
    where = plan.map
    first = where.first(where.entry_rank_addr)
    return plan.device_memory[first : first + plan.num_tokens * where.width].view(plan.num_tokens, where.width)


def forget_rows_from(plan: DevicePlan, gone: Collection[int]) -> None:
    """Take ranks out of a dispatch that was, before its rows are combined: none come back from them."""
    ranks_TW = entry_ranks(plan)
    for rank in gone:  # one by one: a list of them would have to come from the host
        ranks_TW.masked_fill_(ranks_TW == rank, -1)
