"""Where rows of a V2 batch stand on a device: slabs of experts, sums of a token's rows, and what a handle says of them.

All of it is torch's operations, none of which waits for the device. Legend: T tokens, H hidden, K top-k, N received
rows, L local experts, R ranks, S rows of an expanded batch.
"""

from __future__ import annotations

import torch


def slab_rows(idx: torch.Tensor, counts: torch.Tensor, alignment: int, num_rows: int) -> torch.Tensor:
    """Return int64 [N, K]: the expanded row of each (row, column), by expert, then row, then column.

    ``idx`` [N, K] local experts, -1 for none, which get row ``num_rows``: one behind all others. ``counts`` int32 [L].

    >>> idx = torch.tensor([[1, -1], [0, 1]])
    >>> slab_rows(idx, torch.tensor([1, 2], dtype=torch.int32), 2, 4).tolist()
    [[2, 4], [0, 3]]
    """
    num_local = counts.numel()
    expert = idx.flatten().long()
    expert = torch.where(expert < 0, num_local, expert)
    order = expert.argsort(stable=True)
    begins = slab_begins(counts, alignment)
    gaps = torch.cat([begins - (counts.cumsum(0) - counts), begins.new_zeros(1)])  # of padding before each slab
    sorted_expert = expert[order]
    place = torch.arange(len(order), device=idx.device, dtype=torch.int64) + gaps[sorted_expert]
    place = torch.where(sorted_expert == num_local, num_rows, place)
    return torch.empty_like(place).scatter_(0, order, place).view(idx.shape)


def slab_begins(counts: torch.Tensor, alignment: int) -> torch.Tensor:
    """Return int64 [L]: where each expert's slab begins."""
    aligned = aligned_counts(counts, alignment).long()
    return aligned.cumsum(0) - aligned


def aligned_counts(counts: torch.Tensor, alignment: int) -> torch.Tensor:
    """Return int32 [L]: rows of each expert with its padding."""
    return (counts + alignment - 1) // alignment * alignment


def spread(rows: torch.Tensor, places: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return [S, W]: each of ``rows`` [N, W] of any dtype at its ``places`` int64 [N, K], and zeros elsewhere."""
    source = rows.contiguous().view(torch.uint8)
    spread_bytes = source.new_zeros((num_rows + 1, source.shape[1]))
    for column in places.unbind(1):
        spread_bytes.index_copy_(0, column, source)
    return spread_bytes[:num_rows].view(rows.dtype)


def spread_weights(weights: torch.Tensor, places: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return fp32 [S]: each weight of ``weights`` fp32 [N, K] at its place, and zeros elsewhere."""
    spread_out = weights.new_zeros(num_rows + 1).scatter_(0, places.flatten(), weights.flatten())
    return spread_out[:num_rows]


def gather_weights(weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return fp32 [N, K] from ``weights`` fp32 [S]: 0 in columns that have no row."""
    return torch.cat([weights, weights.new_zeros(1)])[places]


def sum_rows(y: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return bfloat16 [N, H]: the rows of ``y`` bfloat16 [S, H] at each row's places, added in fp32 in column order.

    From the first row on, so that a lone -0.0 stays; rows without any are 0.
    """
    num_rows, first = len(y), torch.ones((len(places), 1), dtype=torch.bool, device=y.device)
    total = torch.zeros((len(places), y.shape[1]), dtype=torch.float32, device=y.device)
    for column in places.unbind(1) if num_rows else ():
        here = (column < num_rows).unsqueeze(1)
        row = y[column.clamp(max=num_rows - 1)].float()
        total = torch.where(here, torch.where(first, row, total + row), total)
        first = first & ~here
    return total.bfloat16()


def describe_rows(
    places: torch.Tensor, served: torch.Tensor, token: torch.Tensor, recv_rows: torch.Tensor, max_tokens: int
) -> torch.Tensor:
    """Return ``EPHandle.recv_src_metadata`` int32 [N, K + 2]; rows that nobody sent are -1.

    ``places`` int64 [N, K] and ``served`` bool [N, K]: the row of each column, and which columns have one. ``token``
    int32 [N]: each row's token at its source; ``recv_rows`` int32 [R]: rows of each source.
    """
    num_rows, num_topk = served.shape
    number = torch.arange(num_rows, device=places.device, dtype=torch.int64)
    source = torch.searchsorted(recv_rows.long().cumsum(0), number, right=True)
    columns = torch.arange(num_topk, device=places.device, dtype=torch.int64)
    master = torch.where(served, columns, -1).amax(1)
    metadata = torch.cat(
        [
            (source * max_tokens + token).unsqueeze(1),
            (source * num_topk + master).unsqueeze(1),
            torch.where(served, places, -1),
        ],
        dim=1,
    )
    return torch.where((source < len(recv_rows)).unsqueeze(1), metadata, -1).int()


def number_slots(topk_idx: torch.Tensor, experts_per_rank: int, num_ranks: int, first_id: int) -> torch.Tensor:
    """Return ``EPHandle.dst_buffer_slot_idx`` int32 [T, K]: slots of each rank in token order, at master columns.

    >>> number_slots(torch.tensor([[0, 1], [2, 0], [-1, 1]]), 2, 2, 10).tolist()
    [[-1, 10], [10, 11], [-1, 12]]
    """
    rank = torch.where(topk_idx < 0, num_ranks, topk_idx.long() // experts_per_rank)
    goes = rank.new_zeros((len(rank), num_ranks + 1)).scatter_(1, rank, 1)
    slots = (goes.cumsum(0) - goes).gather(1, rank) + first_id
    later = rank.unsqueeze(2) == rank.unsqueeze(1)  # [T, K, K]: whether another column serves the same rank
    is_master = ~later.triu(1).any(2) & (rank < num_ranks)
    return torch.where(is_master, slots, -1).int()
