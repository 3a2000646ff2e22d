"""Places worked out on the device: from what all ranks announced to where every row begins.

Each program of ``settle`` looks at all that ranks announced and keeps what concerns its own bin, so that programs hand
nothing to one another: R E numbers from caches cost less than a second launch.

Legend: R ranks, E experts, L local experts; EXPERTS experts looked at in one go.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels import spec_device as spec
from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.memory import i32_at

HEAD_BYTES = tl.constexpr(8 * spec.HEAD_WORDS)


@triton.jit
def count_at(board_addr, message_bytes, source, position, inside):
    """Return int32 counts that a source announced; 0 where ``inside`` is false."""
    counts = board_addr + tl.cast(source, tl.int64) * message_bytes + HEAD_BYTES
    return tl.load(i32_at(counts) + position, mask=inside, other=0)


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
        rows = (total + alignment - 1) // alignment * alignment
        rows = tl.where(block_rows != 0, block_rows + rows * 0, rows)
        padded += tl.sum(tl.where(ours, rows, 0))
        dense += tl.sum(total)
    return padded, dense


@triton.jit
def settle_rank(
    board_addr,
    message_bytes,
    rank,
    num_ranks,
    num_experts,
    expert_rank_addr,
    alignment,
    block_rows,
    send_start_addr,
    recv_rows_addr,
    recv_start_addr,
    filled_rows_addr,
    destination,
    BY_EXPERT: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """How many rows a rank receives, and in the compact layout from whom, and where they begin."""
    if BY_EXPERT:
        total, _ = blocks_of(
            *(board_addr, message_bytes, num_ranks, num_experts, expert_rank_addr),
            *(destination, num_experts, alignment, block_rows, EXPERTS),
        )
    else:
        total = destination * 0
        for source in range(num_ranks):
            rows = count_at(board_addr, message_bytes, source, destination, destination >= 0)
            tl.store(i32_at(send_start_addr) + destination, total, mask=source == rank)
            here = destination == rank
            tl.store(i32_at(recv_rows_addr) + source, rows, mask=here)
            tl.store(i32_at(recv_start_addr) + source, total, mask=here)
            total += rows
    tl.store(i32_at(filled_rows_addr) + destination, total)


@triton.jit
def settle_expert(
    board_addr,
    message_bytes,
    rank,
    num_ranks,
    num_experts,
    num_local,
    expert_rank_addr,
    expert_local_addr,
    alignment,
    block_rows,
    send_start_addr,
    dense_start_addr,
    recv_rows_addr,
    recv_start_addr,
    counts_addr,
    block_start_addr,
    expert_total_addr,
    gap_begin_addr,
    gap_end_addr,
    expert,
    BY_EXPERT: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """How many rows an expert receives, and by expert from whom, and where they begin."""
    owner = tl.load(i32_at(expert_rank_addr) + expert)
    local = tl.load(i32_at(expert_local_addr) + expert)
    here = owner == rank
    start, dense = owner * 0, owner * 0
    if BY_EXPERT:
        start, dense = blocks_of(
            *(board_addr, message_bytes, num_ranks, num_experts, expert_rank_addr),
            *(owner, expert, alignment, block_rows, EXPERTS),
        )
    total = owner * 0
    for source in range(num_ranks):
        rows = count_at(board_addr, message_bytes, source, num_ranks + expert, expert >= 0)
        if BY_EXPERT:
            own = source == rank
            tl.store(i32_at(send_start_addr) + expert, start + total, mask=own)
            tl.store(i32_at(dense_start_addr) + expert, dense + total, mask=own & (block_rows != 0))
            bin_ = tl.cast(source, tl.int64) * num_local + local
            tl.store(i32_at(recv_rows_addr) + bin_, rows, mask=here)
            tl.store(i32_at(recv_start_addr) + bin_, start + total, mask=here)
        total += rows
    tl.store(i32_at(expert_total_addr) + expert, total)
    tl.store(i32_at(counts_addr) + local, total, mask=here)
    if BY_EXPERT:
        padded = (total + alignment - 1) // alignment * alignment
        tl.store(i32_at(block_start_addr) + local, start, mask=here)
        tl.store(i32_at(gap_begin_addr) + local, start + total, mask=here)
        tl.store(i32_at(gap_end_addr) + local, start + tl.where(block_rows != 0, total, padded), mask=here)


@kernel
def settle(
    board_addr: tl.int64,
    message_bytes: tl.int64,
    rank: tl.int32,
    num_ranks: tl.int32,
    num_experts: tl.int32,
    num_local: tl.int32,
    expert_rank_addr: tl.int64,
    expert_local_addr: tl.int64,
    alignment: tl.int32,
    block_rows: tl.int32,
    send_start_addr: tl.int64,
    dense_start_addr: tl.int64,
    recv_rows_addr: tl.int64,
    recv_start_addr: tl.int64,
    counts_addr: tl.int64,
    block_start_addr: tl.int64,
    filled_rows_addr: tl.int64,
    expert_total_addr: tl.int64,
    gap_begin_addr: tl.int64,
    gap_end_addr: tl.int64,
    BY_EXPERT: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Grid (R + E): ranks, then experts."""
    number = tl.program_id(0)
    if number < num_ranks:
        settle_rank(
            *(board_addr, message_bytes, rank, num_ranks, num_experts, expert_rank_addr, alignment, block_rows),
            *(send_start_addr, recv_rows_addr, recv_start_addr, filled_rows_addr, number, BY_EXPERT, EXPERTS),
        )
    else:
        settle_expert(
            *(board_addr, message_bytes, rank, num_ranks, num_experts, num_local, expert_rank_addr, expert_local_addr),
            *(alignment, block_rows, send_start_addr, dense_start_addr, recv_rows_addr, recv_start_addr, counts_addr),
            *(block_start_addr, expert_total_addr, gap_begin_addr, gap_end_addr, number - num_ranks),
            *(BY_EXPERT, EXPERTS),
        )
