"""Places worked out on the device: from what all ranks announced to where every row begins, and where peers' memory is.

Each program of ``settle`` looks at all that ranks announced and keeps what concerns its own bin, so that programs hand
nothing to one another: R E numbers from caches cost less than a second launch.

Legend: R ranks, E experts, L local experts; EXPERTS experts looked at in one go; RANKS: R up to a power of two; BLOCK
entries looked at in one go.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels.gpu.announced import batches_of, blocks_of, count_at, found_in, with_padding
from anyep.kernels.gpu.boards import SETTLED, accused, conclude
from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.memory import i32_at, load_indices


@triton.jit
def place_bin(
    keys_addr,
    KEY_BYTES: tl.constexpr,
    bin_,
    start,
    num_entries,
    taken_back,
    entry_rank_addr,
    entry_slot_addr,
    entry_row_addr,
    BLOCK: tl.constexpr,
):
    """Give the entries of a bin their rows, and take them back where the batch is refused."""
    for begin in range(0, num_entries, BLOCK):
        entry = tl.cast(begin, tl.int64) + tl.arange(0, BLOCK)
        ours = load_indices(keys_addr, entry, entry < num_entries, KEY_BYTES) == bin_
        slot = tl.load(i32_at(entry_slot_addr) + entry, mask=ours, other=0)
        tl.store(i32_at(entry_row_addr) + entry, slot + start, mask=ours)
        back = ours & (entry < tl.where(taken_back, num_entries, 0))
        tl.store(i32_at(entry_rank_addr) + entry, slot * 0 - 1, mask=back)


@triton.jit
def place_nowhere(num_entries, entry_slot_addr, entry_row_addr, BLOCK: tl.constexpr):
    """Give entries without a rank row -1."""
    for begin in range(0, num_entries, BLOCK):
        entry = tl.cast(begin, tl.int64) + tl.arange(0, BLOCK)
        slot = tl.load(i32_at(entry_slot_addr) + entry, mask=entry < num_entries, other=0)
        tl.store(i32_at(entry_row_addr) + entry, slot * 0 - 1, mask=slot < 0)


@triton.jit
def settle_rank(
    board_addr, message_bytes, rank, num_ranks, send_start_addr, recv_rows_addr, recv_start_addr, destination
):
    """Write from whom a rank receives and where that begins, and return where this rank's rows do."""
    total, own = destination * 0, destination * 0
    for source in range(num_ranks):
        rows = count_at(board_addr, message_bytes, source, destination, destination >= 0)
        own = tl.where(source == rank, total, own)
        here = destination == rank
        tl.store(i32_at(recv_rows_addr) + source, rows, mask=here)
        tl.store(i32_at(recv_start_addr) + source, total, mask=here)
        total += rows
    tl.store(i32_at(send_start_addr) + destination, own)
    return own


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
    refused,
    taken_back,
    send_start_addr,
    dense_start_addr,
    recv_rows_addr,
    recv_start_addr,
    counts_addr,
    block_start_addr,
    gap_begin_addr,
    gap_end_addr,
    source_begin_addr,
    source_count_addr,
    expert,
    BY_EXPERT: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Write how many rows an expert receives, and by expert from whom; return where this rank's rows begin."""
    owner = tl.load(i32_at(expert_rank_addr) + expert)
    local = tl.load(i32_at(expert_local_addr) + expert)
    here = owner == rank
    start, dense = owner * 0, owner * 0
    if BY_EXPERT:
        start, dense = blocks_of(
            *(board_addr, message_bytes, num_ranks, num_experts, expert_rank_addr),
            *(owner, expert, alignment, block_rows, EXPERTS),
        )
    total, own = owner * 0, owner * 0
    for source in range(num_ranks):
        rows = count_at(board_addr, message_bytes, source, num_ranks + expert, expert >= 0)
        own = tl.where(source == rank, total, own)
        if BY_EXPERT:
            bin_ = tl.cast(source, tl.int64) * num_local + local
            tl.store(i32_at(recv_rows_addr) + bin_, rows, mask=here)
            tl.store(i32_at(recv_start_addr) + bin_, start + total, mask=here)
            block = local.to(tl.int64) * num_ranks + source
            tl.store(i32_at(source_begin_addr) + block, total, mask=here & (source_begin_addr != 0))
            tl.store(i32_at(source_count_addr) + block, rows, mask=here & (source_begin_addr != 0))
        total += rows
    tl.store(i32_at(counts_addr) + local, tl.where(taken_back, 0, total), mask=here)
    if BY_EXPERT:
        tl.store(i32_at(send_start_addr) + expert, start + own)
        tl.store(i32_at(dense_start_addr) + expert, dense + own, mask=block_rows != 0)
        tl.store(i32_at(block_start_addr) + local, start, mask=here)
        end = start + tl.where(block_rows != 0, total, with_padding(total, alignment, 0))
        tl.store(i32_at(gap_begin_addr) + local, tl.where(refused, 0, start + total), mask=here)
        tl.store(i32_at(gap_end_addr) + local, tl.where(refused, 0, end), mask=here)
    return start + own


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
    static_rows: tl.int64,
    withdraws: tl.int32,
    base_addr: tl.int64,
    tables_addr: tl.int64,
    summary_addr: tl.int64,
    fault_addr: tl.int64,
    send_start_addr: tl.int64,
    dense_start_addr: tl.int64,
    recv_rows_addr: tl.int64,
    recv_start_addr: tl.int64,
    counts_addr: tl.int64,
    block_start_addr: tl.int64,
    filled_rows_addr: tl.int64,
    gap_begin_addr: tl.int64,
    gap_end_addr: tl.int64,
    source_begin_addr: tl.int64,
    source_count_addr: tl.int64,
    source_rows_addr: tl.int64,
    num_entries: tl.int64,
    topk_idx_addr: tl.int64,
    entry_rank_addr: tl.int64,
    entry_slot_addr: tl.int64,
    entry_row_addr: tl.int64,
    BY_EXPERT: tl.constexpr,
    IDX_BYTES: tl.constexpr,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R + E + 1): ranks, experts, and what concerns them all. ``num_entries`` 0: entries are placed elsewhere."""
    number = tl.program_id(0)
    filled, most = batches_of(
        *(board_addr, message_bytes, num_ranks, num_experts, expert_rank_addr, alignment, block_rows),
        *(BY_EXPERT, RANKS, EXPERTS),
    )
    guilty, accusation = accused(board_addr, message_bytes, num_ranks, RANKS)
    code = found_in(board_addr, message_bytes, num_ranks, block_rows, static_rows, filled, most, guilty, RANKS)
    refused = code != SETTLED
    taken_back = refused & (withdraws != 0)
    entries = (num_entries, taken_back, entry_rank_addr, entry_slot_addr, entry_row_addr)
    if number < num_ranks:
        tl.store(i32_at(filled_rows_addr) + number, tl.sum(tl.where(tl.arange(0, RANKS) == number, filled, 0)))
        if BY_EXPERT:
            told = count_at(board_addr, message_bytes, number, rank, number >= 0)
            tl.store(i32_at(source_rows_addr) + number, tl.where(taken_back, 0, told), mask=source_rows_addr != 0)
        else:
            start = settle_rank(
                *(board_addr, message_bytes, rank, num_ranks),
                *(send_start_addr, recv_rows_addr, recv_start_addr, number),
            )
            place_bin(entry_rank_addr, 4, number, start, *entries, BLOCK)
    elif number < num_ranks + num_experts:
        expert = number - num_ranks
        start = settle_expert(
            *(board_addr, message_bytes, rank, num_ranks, num_experts, num_local, expert_rank_addr, expert_local_addr),
            *(alignment, block_rows, refused, taken_back, send_start_addr, dense_start_addr),
            *(recv_rows_addr, recv_start_addr, counts_addr, block_start_addr, gap_begin_addr, gap_end_addr),
            *(source_begin_addr, source_count_addr, expert, BY_EXPERT, EXPERTS),
        )
        if BY_EXPERT:
            place_bin(topk_idx_addr, IDX_BYTES, expert, start, *entries, BLOCK)
    else:
        own = tl.sum(tl.where(tl.arange(0, RANKS) == rank, filled, 0))
        num_rows = tl.where(static_rows >= 0, static_rows, own.to(tl.int64))
        conclude(
            *(board_addr, message_bytes, num_ranks, base_addr, tables_addr, summary_addr, fault_addr),
            *(code, num_rows, guilty, accusation, RANKS),
        )
        behind = static_rows >= 0
        tl.store(i32_at(gap_begin_addr) + num_local, tl.where(refused, 0, own), mask=behind)
        tl.store(i32_at(gap_end_addr) + num_local, static_rows.to(tl.int32), mask=behind)
        place_nowhere(num_entries, entry_slot_addr, entry_row_addr, BLOCK)
