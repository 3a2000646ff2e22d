"""What ranks announce to one another's boards, and the peer tables that come of it.

Legend: R ranks; RANKS: R up to a power of two.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels import spec_device as spec
from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.memory import i32_at, i64_at

NO_FAULT = tl.constexpr(spec.NO_FAULT)
COUNTS_FROM = tl.constexpr(8 * spec.HEAD_WORDS)
"""Bytes of a message before its counts."""
FIRST_PLACE_BYTES = tl.constexpr(8 * spec.FIRST_PLACE)
FAULT_BYTES = tl.constexpr(8 * spec.FAULT)
NUM_PLACES = tl.constexpr(spec.NUM_PLACES)
SETTLED, BAD_EXPERT = tl.constexpr(spec.SETTLED), tl.constexpr(spec.BAD_EXPERT)


@triton.jit
def tell(messages, capacity, place0, place1, place2, place3, place4, verdict):
    """Write the head of a message to every one of ``messages``, int64 addresses, 0 to skip one."""
    wanted = messages != 0
    nothing = messages * 0
    tl.store(i64_at(messages), nothing + capacity, mask=wanted)
    tl.store(i64_at(messages) + 1, nothing + place0, mask=wanted)
    tl.store(i64_at(messages) + 2, nothing + place1, mask=wanted)
    tl.store(i64_at(messages) + 3, nothing + place2, mask=wanted)
    tl.store(i64_at(messages) + 4, nothing + place3, mask=wanted)
    tl.store(i64_at(messages) + 5, nothing + place4, mask=wanted)
    tl.store(i64_at(messages) + 6, nothing + verdict, mask=wanted)


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
    verdict = tl.load(i64_at(verdict_addr), mask=verdict_addr != 0, other=NO_FAULT)
    tell(message, capacity, place0, place1, place2, place3, place4, verdict)
    last = tl.where(message != 0, num_counts, 0)
    for begin in range(0, last, COUNTS):
        number = tl.cast(begin, tl.int64) + tl.arange(0, COUNTS)
        inside = number < last
        tl.store(
            i32_at(message + COUNTS_FROM) + number, tl.load(i32_at(counts_addr) + number, mask=inside), mask=inside
        )


@triton.jit
def accused(board_addr, message_bytes, num_ranks, RANKS: tl.constexpr):
    """Return the first rank whose verdict is a fault, num_ranks for none, and that verdict."""
    ranks = tl.arange(0, RANKS)
    head = board_addr + ranks.to(tl.int64) * message_bytes
    verdict = tl.load(i64_at(head + FAULT_BYTES), mask=ranks < num_ranks, other=NO_FAULT)
    guilty = tl.min(tl.where(verdict != NO_FAULT, ranks, num_ranks))
    return guilty, tl.min(tl.where(ranks == guilty, verdict, NO_FAULT))


@triton.jit
def conclude(
    board_addr,
    message_bytes,
    num_ranks,
    base_addr,
    tables_addr,
    summary_addr,
    fault_addr,
    code,
    num_rows,
    guilty,
    accusation,
    RANKS: tl.constexpr,
):
    """Write peer tables, all 0 unless ``code`` is SETTLED, and what was found."""
    ranks = tl.arange(0, RANKS)
    inside = ranks < num_ranks
    head = board_addr + ranks.to(tl.int64) * message_bytes
    base = tl.load(i64_at(base_addr) + ranks, mask=inside, other=0)
    for part in tl.static_range(NUM_PLACES):
        place = tl.load(i64_at(head + (FIRST_PLACE_BYTES + 8 * part)), mask=inside, other=-1)
        table = tl.where(place >= 0, base + place, 0)
        tl.store(i64_at(tables_addr) + part * num_ranks + ranks, tl.where(code == SETTLED, table, 0), mask=inside)
    told = (code != SETTLED) & (fault_addr != 0)
    tl.store(i64_at(summary_addr), code.to(tl.int64))
    tl.store(i64_at(summary_addr) + 1, num_rows)
    tl.store(i64_at(summary_addr) + 2, guilty.to(tl.int64))
    tl.store(i64_at(summary_addr) + 3, accusation)
    tl.store(i64_at(fault_addr), code.to(tl.int64), mask=told)
    tl.store(i64_at(fault_addr) + 1, num_rows, mask=told)
    tl.store(i64_at(fault_addr) + 2, guilty.to(tl.int64), mask=told)
    tl.store(i64_at(fault_addr) + 3, accusation, mask=told)


@kernel
def connect(
    board_addr: tl.int64,
    message_bytes: tl.int64,
    num_ranks: tl.int32,
    base_addr: tl.int64,
    num_rows: tl.int64,
    tables_addr: tl.int64,
    summary_addr: tl.int64,
    fault_addr: tl.int64,
    entry_rank_addr: tl.int64,
    num_entries: tl.int64,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (1)."""
    guilty, accusation = accused(board_addr, message_bytes, num_ranks, RANKS)
    code = tl.where(guilty < num_ranks, BAD_EXPERT, SETTLED)
    conclude(
        *(board_addr, message_bytes, num_ranks, base_addr, tables_addr, summary_addr, fault_addr),
        *(code, num_rows, guilty, accusation, RANKS),
    )
    none = tl.full([BLOCK], -1, tl.int32)
    for begin in range(0, tl.where(code == SETTLED, 0, num_entries), BLOCK):
        entry = tl.cast(begin, tl.int64) + tl.arange(0, BLOCK)
        tl.store(i32_at(entry_rank_addr) + entry, none, mask=entry < num_entries)
