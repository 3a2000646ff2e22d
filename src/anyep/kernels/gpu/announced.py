"""What all ranks announced, added up: rows of experts and batches, and whether a batch must be refused.

Legend: R ranks, E experts; EXPERTS experts looked at in one go; RANKS: R up to a power of two.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels import spec_device as spec
from anyep.kernels.gpu.boards import BAD_EXPERT, COUNTS_FROM, SETTLED
from anyep.kernels.gpu.memory import i32_at, i64_at

BLOCK_TOO_SMALL, STATIC_TOO_SMALL = tl.constexpr(spec.BLOCK_TOO_SMALL), tl.constexpr(spec.STATIC_TOO_SMALL)
LANDING_TOO_SMALL = tl.constexpr(spec.LANDING_TOO_SMALL)


@triton.jit
def count_at(board_addr, message_bytes, source, position, inside):
    """Return int32 counts that a source announced; 0 where ``inside`` is false."""
    counts = board_addr + tl.cast(source, tl.int64) * message_bytes + COUNTS_FROM
    return tl.load(i32_at(counts) + position, mask=inside, other=0)


@triton.jit
def with_padding(total, alignment, block_rows):
    """Return how many rows experts take up that have ``total``."""
    padded = (total + alignment - 1) // alignment * alignment
    return tl.where(block_rows != 0, block_rows + padded * 0, padded)


@triton.jit
def blocks_of(
    board_addr,
    message_bytes,
    num_ranks,
    num_experts,
    expert_rank_addr,
    owner,
    expert,
    alignment,
    block_rows,
    EXPERTS: tl.constexpr,
):
    """Return how many rows the experts of ``owner`` before ``expert`` have, with their padding and without."""
    padded, dense = owner * 0, owner * 0
    for begin in range(0, num_experts, EXPERTS):
        others = tl.cast(begin, tl.int64) + tl.arange(0, EXPERTS)
        inside = others < num_experts
        ours = inside & (others < expert) & (tl.load(i32_at(expert_rank_addr) + others, mask=inside, other=-1) == owner)
        total = tl.zeros([EXPERTS], tl.int32)
        for source in range(num_ranks):
            total += count_at(board_addr, message_bytes, source, num_ranks + others, ours)
        padded += tl.sum(tl.where(ours, with_padding(total, alignment, block_rows), 0))
        dense += tl.sum(total)
    return padded, dense


@triton.jit
def batches_of(
    board_addr,
    message_bytes,
    num_ranks,
    num_experts,
    expert_rank_addr,
    alignment,
    block_rows,
    BY_EXPERT: tl.constexpr,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Return int32 [RANKS], the rows of every rank's batch, and how many the largest expert has."""
    ranks = tl.arange(0, RANKS)
    filled, most = tl.zeros([RANKS], tl.int32), num_ranks * 0
    if BY_EXPERT:
        for begin in range(0, num_experts, EXPERTS):
            experts = tl.cast(begin, tl.int64) + tl.arange(0, EXPERTS)
            inside = experts < num_experts
            owner = tl.load(i32_at(expert_rank_addr) + experts, mask=inside, other=-1)
            total = tl.zeros([EXPERTS], tl.int32)
            for source in range(num_ranks):
                total += count_at(board_addr, message_bytes, source, num_ranks + experts, inside)
            most = tl.maximum(most, tl.max(total))
            rows = with_padding(total, alignment, block_rows)
            for rank in range(num_ranks):
                filled += tl.where(ranks == rank, tl.sum(tl.where(owner == rank, rows, 0)), 0)
    else:
        for source in range(num_ranks):
            filled += count_at(board_addr, message_bytes, source, ranks, ranks < num_ranks)
    return filled, most


@triton.jit
def found_in(board_addr, message_bytes, num_ranks, block_rows, static_rows, filled, most, guilty, RANKS: tl.constexpr):
    """Return whether the batch is refused, and why."""
    ranks = tl.arange(0, RANKS)
    inside = ranks < num_ranks
    capacity = tl.load(i64_at(board_addr + ranks.to(tl.int64) * message_bytes), mask=inside, other=0)
    rows = filled.to(tl.int64)
    batch = tl.where(static_rows >= 0, static_rows + rows * 0, rows)
    too_large = tl.max(tl.where(inside & (batch > capacity), 1, 0))
    too_many = tl.max(tl.where(inside & (rows > batch), 1, 0))
    code = tl.where(too_many != 0, STATIC_TOO_SMALL, tl.where(too_large != 0, LANDING_TOO_SMALL, SETTLED))
    code = tl.where((block_rows != 0) & (most > block_rows), BLOCK_TOO_SMALL, code)
    return tl.where(guilty < num_ranks, BAD_EXPERT, code)
