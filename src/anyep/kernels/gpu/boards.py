"""What ranks announce to one another's boards, and the peer tables that come of it.

Legend: R ranks, E experts; EXPERTS experts looked at in one go; RANKS: R up to a power of two.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels import spec_device as spec
from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.memory import i32_at, i64_at

NO_FAULT = tl.constexpr(spec.NO_FAULT)
HEAD_BYTES = tl.constexpr(8 * spec.HEAD_WORDS)
FIRST_PLACE_BYTES = tl.constexpr(8 * spec.FIRST_PLACE)
FAULT_BYTES = tl.constexpr(8 * spec.FAULT)
NUM_PLACES = tl.constexpr(spec.NUM_PLACES)
SETTLED, BAD_EXPERT = tl.constexpr(spec.SETTLED), tl.constexpr(spec.BAD_EXPERT)
BLOCK_TOO_SMALL, STATIC_TOO_SMALL = tl.constexpr(spec.BLOCK_TOO_SMALL), tl.constexpr(spec.STATIC_TOO_SMALL)
LANDING_TOO_SMALL = tl.constexpr(spec.LANDING_TOO_SMALL)


@kernel
def announce(
    peer_message_addr: tl.int64,
    capacity: tl.int64,
    place0: tl.int64,
    place1: tl.int64,
    place2: tl.int64,
    place3: tl.int64,
    place4: tl.int64,
    verdict_addr: tl.int64,
    counts_addr: tl.int64,
    num_counts: tl.int64,
    COUNTS: tl.constexpr,
):
    """Grid (R)."""
    message = tl.load(i64_at(peer_message_addr) + tl.program_id(0))
    wanted = message != 0
    head = i64_at(message)
    verdict = tl.load(i64_at(verdict_addr), mask=verdict_addr != 0, other=NO_FAULT)
    tl.store(head, capacity, mask=wanted)
    tl.store(head + 1, place0, mask=wanted)
    tl.store(head + 2, place1, mask=wanted)
    tl.store(head + 3, place2, mask=wanted)
    tl.store(head + 4, place3, mask=wanted)
    tl.store(head + 5, place4, mask=wanted)
    tl.store(head + 6, verdict, mask=wanted)
    last = tl.where(wanted, num_counts, 0)
    for begin in range(0, last, COUNTS):
        number = tl.cast(begin, tl.int64) + tl.arange(0, COUNTS)
        inside = number < last
        tl.store(i32_at(message + HEAD_BYTES) + number, tl.load(i32_at(counts_addr) + number, mask=inside), mask=inside)


@triton.jit
def most_of(expert_total_addr, num_experts, EXPERTS: tl.constexpr):
    """Return the largest number of rows of an expert."""
    most = tl.cast(num_experts * 0, tl.int32)
    for begin in range(0, num_experts, EXPERTS):
        expert = tl.cast(begin, tl.int64) + tl.arange(0, EXPERTS)
        most = tl.maximum(most, tl.max(tl.load(i32_at(expert_total_addr) + expert, mask=expert < num_experts, other=0)))
    return most


@kernel
def connect(
    board_addr: tl.int64,
    message_bytes: tl.int64,
    rank: tl.int32,
    num_ranks: tl.int32,
    base_addr: tl.int64,
    filled_rows_addr: tl.int64,
    static_rows: tl.int64,
    expert_total_addr: tl.int64,
    num_experts: tl.int32,
    block_rows: tl.int32,
    tables_addr: tl.int64,
    summary_addr: tl.int64,
    fault_addr: tl.int64,
    num_gaps: tl.int64,
    gap_begin_addr: tl.int64,
    gap_end_addr: tl.int64,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Grid (1)."""
    ranks = tl.arange(0, RANKS)
    inside = ranks < num_ranks
    head = board_addr + ranks.to(tl.int64) * message_bytes
    verdict = tl.load(i64_at(head + FAULT_BYTES), mask=inside, other=NO_FAULT)
    guilty = tl.min(tl.where(verdict != NO_FAULT, ranks, num_ranks))
    accusation = tl.min(tl.where(ranks == guilty, verdict, NO_FAULT))
    counted = filled_rows_addr != 0
    num_counted = tl.where(counted, num_ranks, 0)
    filled = tl.load(i32_at(filled_rows_addr) + ranks, mask=ranks < num_counted, other=0).to(tl.int64)
    capacity = tl.load(i64_at(head), mask=inside, other=0)
    batch = tl.where((static_rows >= 0) | (filled_rows_addr == 0), static_rows + filled * 0, filled)
    too_large = tl.max(tl.where(inside & (batch > capacity), 1, 0))
    too_many = tl.max(tl.where(inside & (filled > batch), 1, 0))
    code = tl.where(too_many != 0, STATIC_TOO_SMALL, tl.where(too_large != 0, LANDING_TOO_SMALL, SETTLED))
    if block_rows != 0:
        code = tl.where(most_of(expert_total_addr, num_experts, EXPERTS) > block_rows, BLOCK_TOO_SMALL, code)
    code = tl.where(counted, code, SETTLED)
    code = tl.where(guilty < num_ranks, BAD_EXPERT, code)
    base = tl.load(i64_at(base_addr) + ranks, mask=inside, other=0)
    for part in tl.static_range(NUM_PLACES):
        place = tl.load(i64_at(head + (FIRST_PLACE_BYTES + 8 * part)), mask=inside, other=-1)
        table = tl.where(place >= 0, base + place, 0)
        tl.store(i64_at(tables_addr) + part * num_ranks + ranks, tl.where(code == SETTLED, table, 0), mask=inside)
    own = tl.sum(tl.where(ranks == rank, batch, 0))
    tell = (code != SETTLED) & (fault_addr != 0)
    tl.store(i64_at(summary_addr), code.to(tl.int64))
    tl.store(i64_at(summary_addr) + 1, own)
    tl.store(i64_at(summary_addr) + 2, guilty.to(tl.int64))
    tl.store(i64_at(summary_addr) + 3, accusation)
    tl.store(i64_at(fault_addr), code.to(tl.int64), mask=tell)
    tl.store(i64_at(fault_addr) + 1, own, mask=tell)
    tl.store(i64_at(fault_addr) + 2, guilty.to(tl.int64), mask=tell)
    tl.store(i64_at(fault_addr) + 3, accusation, mask=tell)
    empty = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, tl.where(code == SETTLED, 0, num_gaps), EXPERTS):
        gap = tl.cast(first, tl.int64) + tl.arange(0, EXPERTS)
        tl.store(i32_at(gap_begin_addr) + gap, empty, mask=gap < num_gaps)
        tl.store(i32_at(gap_end_addr) + gap, empty, mask=gap < num_gaps)
    if (static_rows >= 0) & counted:
        begin = tl.where(code == SETTLED, tl.sum(tl.where(ranks == rank, filled, 0)), 0)
        tl.store(i32_at(gap_begin_addr) + num_gaps, begin.to(tl.int32))
        tl.store(i32_at(gap_end_addr) + num_gaps, own.to(tl.int32))


@kernel
def withdraw(
    summary_addr: tl.int64,
    entry_rank_addr: tl.int64,
    num_entries: tl.int64,
    counts_addr: tl.int64,
    num_local: tl.int64,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of whichever is more)."""
    refused = tl.load(i64_at(summary_addr)) != SETTLED
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    none = tl.full([BLOCK], -1, tl.int32)
    tl.store(i32_at(entry_rank_addr) + number, none, mask=number < tl.where(refused, num_entries, 0))
    tl.store(i32_at(counts_addr) + number, none + 1, mask=number < tl.where(refused, num_local, 0))
