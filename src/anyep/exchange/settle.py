"""From what all ranks announced to a filled ledger (``exchange/ledger.py``). Importing compiles: setup.py does.

Everybody reads the same numbers, so everybody comes to the same result, and nobody has to be told.
"""

from __future__ import annotations

from typing import Any

from anyep.exchange.ledger import (
    BLOCK_TOO_SMALL,
    CAPACITY,
    COUNTS,
    D_ALIGNMENT,
    D_BLOCK_ROWS,
    D_BY_EXPERT,
    D_EXPERTS,
    D_LOCAL,
    D_RANK,
    D_RANKS,
    D_STATIC_ROWS,
    DIRECT_ROWS,
    EAGER_ROWS,
    F_BATCH_ROWS,
    F_BLOCK_START,
    F_COUNTS,
    F_DENSE_START,
    F_FILLED_ROWS,
    F_GAPS,
    F_PAIR_ROWS,
    F_RANK_ENTRIES,
    F_RECV_ROWS,
    F_RECV_START,
    F_SCRATCH,
    F_SEND_START,
    F_SOURCE_ENTRIES,
    F_SOURCE_ROWS,
    F_SOURCE_TOKENS,
    FAR_ROWS,
    LANDING_TOO_SMALL,
    NEAR,
    SETTLED,
    STATIC_TOO_SMALL,
    WAY,
)
from anyep.machine.atomics import add_i64
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import copy_bytes, fill_bytes, load_i32, store_i32


@compiled("int64(int64[:, :], int64[::1])")
def agree(opened_RW: Any, header: Any) -> int:
    """Return 1 if every rank's header is ``header``, word by word; else 0."""
    for source in range(opened_RW.shape[0]):
        for word in range(header.size):
            if opened_RW[source, word] != header[word]:
                return 0
    return 1


@compiled("int64(int32[::1], int64, int64, int64, int64, int64)")
def keep(memory: Any, first_word: int, source_addr: int, num_bytes: int, count_word: int, count: int) -> int:
    """Copy bytes to word ``first_word`` of ``memory``, write how many, and return the address of its beginning."""
    base: int = memory.ctypes.data
    copy_bytes(base + 4 * first_word, source_addr, num_bytes)
    memory[count_word] = count
    return base


@compiled(
    "void(int64[:, ::1], int64[::1], int64[::1], int64, int64, int64, int64, int64[::1], int64[::1], int64[:, ::1],"
    " int64[::1], int64[::1])"
)
def announce(
    words_RW: Any,
    header: Any,
    places: Any,
    counts_addr: int,
    num_counts: int,
    rows_addr: int,
    limit_rows: int,
    slots_R: Any,
    part_offsets: Any,
    tables_PR: Any,
    far_tokens_R: Any,
    tally: Any,
) -> None:
    """Write the message to every rank, and decide for each whether its rows come along (eager).

    ``far_tokens`` [R]: NEAR for a rank of this host; for any other how many tokens cross to its host, which stands in
    its message instead. No row goes to it from here.

    ``rows`` int32 [R]: rows for each rank; up to ``limit_rows`` are eager. ``counts`` int32 [num_counts] go to all.
    ``tables`` [P, R] become the peer tables of the eager slots (0: not eager), ``tally`` the rows of both ways.
    """
    tally[EAGER_ROWS] = 0
    tally[DIRECT_ROWS] = 0
    tally[FAR_ROWS] = 0
    body = header.size
    for d in range(words_RW.shape[0]):
        rows = load_i32(rows_addr, d)
        near = far_tokens_R[d] == NEAR
        eager = 1 if near and rows <= limit_rows else 0
        for word in range(body):
            words_RW[d, word] = header[word]
        words_RW[d, body + WAY] = eager if near else far_tokens_R[d]
        for word in range(places.size):
            words_RW[d, body + CAPACITY + word] = places[word]
        if num_counts > 0:
            row_addr = words_RW.ctypes.data + d * words_RW.strides[0]
            copy_bytes(row_addr + 8 * (body + COUNTS), counts_addr, 4 * num_counts)
        for part in range(part_offsets.size):
            tables_PR[part, d] = slots_R[d] + part_offsets[part] if eager and rows > 0 else 0
        if not near:
            tally[FAR_ROWS] += rows
        elif eager:
            tally[EAGER_ROWS] += rows
        else:
            tally[DIRECT_ROWS] += rows


@inlined
def field(ledger_addr: int, offsets: Any, number: int) -> int:
    return ledger_addr + offsets[number]


@inlined
def add(base: int, index: int, value: int) -> None:
    store_i32(base, index, load_i32(base, index) + value)


@inlined
def _open_gap(gaps_addr: int, most: int, begin: int, end: int) -> None:
    count = load_i32(gaps_addr, 0)
    store_i32(gaps_addr, 1 + count, begin)
    store_i32(gaps_addr, 1 + most + count, end)
    store_i32(gaps_addr, 0, count + 1)


@inlined
def _settle_compact(counts_addr: int, stride: int, dims: Any, offsets: Any, ledger: int) -> None:
    """One bin a destination, in the order of the sources."""
    rank, ranks = dims[D_RANK], dims[D_RANKS]
    for d in range(ranks):
        total = 0
        for source in range(ranks):
            rows = load_i32(counts_addr + source * stride, d)
            if source == rank:
                store_i32(field(ledger, offsets, F_SEND_START), d, total)
                store_i32(field(ledger, offsets, F_RANK_ENTRIES), d, rows)
            if d == rank:
                store_i32(field(ledger, offsets, F_RECV_ROWS), source, rows)
                store_i32(field(ledger, offsets, F_RECV_START), source, total)
                store_i32(field(ledger, offsets, F_SOURCE_ENTRIES), source, rows)
            total += rows
        store_i32(field(ledger, offsets, F_FILLED_ROWS), d, total)


@inlined
def _settle_experts(
    counts_addr: int, stride: int, dims: Any, offsets: Any, expert_rank: int, expert_local: int, ledger: int
) -> int:
    """Count every local expert; with rows grouped by expert also place every expert's block. Return the largest."""
    rank, ranks, num_local = dims[D_RANK], dims[D_RANKS], dims[D_LOCAL]
    by_expert, block_rows, alignment = dims[D_BY_EXPERT], dims[D_BLOCK_ROWS], dims[D_ALIGNMENT]
    filled = field(ledger, offsets, F_FILLED_ROWS)
    dense = field(ledger, offsets, F_SCRATCH)
    most = 0
    if by_expert:
        fill_bytes(filled, 4 * ranks, 0)
        fill_bytes(dense, 4 * ranks, 0)
        fill_bytes(field(ledger, offsets, F_RANK_ENTRIES), 4 * ranks, 0)
        fill_bytes(field(ledger, offsets, F_SOURCE_ENTRIES), 4 * ranks, 0)
    for expert in range(dims[D_EXPERTS]):
        owner, local = load_i32(expert_rank, expert), load_i32(expert_local, expert)
        start = local * block_rows if block_rows else load_i32(filled, owner)
        total = 0
        for source in range(ranks):
            rows = load_i32(counts_addr + source * stride, ranks + expert)
            if by_expert and source == rank:
                store_i32(field(ledger, offsets, F_SEND_START), expert, start + total)
                add(field(ledger, offsets, F_RANK_ENTRIES), owner, rows)
                if block_rows:
                    store_i32(field(ledger, offsets, F_DENSE_START), expert, load_i32(dense, owner) + total)
            if by_expert and owner == rank:
                store_i32(field(ledger, offsets, F_RECV_ROWS), source * num_local + local, rows)
                store_i32(field(ledger, offsets, F_RECV_START), source * num_local + local, start + total)
                add(field(ledger, offsets, F_SOURCE_ENTRIES), source, rows)
            total += rows
        most = max(most, total)
        if owner == rank:
            store_i32(field(ledger, offsets, F_COUNTS), local, total)
        if by_expert:
            padded = block_rows if block_rows else (total + alignment - 1) // alignment * alignment
            add(filled, owner, padded)
            add(dense, owner, total)
            if owner == rank:
                store_i32(field(ledger, offsets, F_BLOCK_START), local, start)
                if padded > total and not block_rows:
                    _open_gap(field(ledger, offsets, F_GAPS), num_local + 1, start + total, start + padded)
    return most


@compiled("int64(int64[:, :], int64, int64[::1], int64[::1], int64, int64, int64, int64[::1], int64[::1])")
def settle(
    opened_RW: Any,
    body: int,
    dims: Any,
    offsets: Any,
    expert_rank_addr: int,
    expert_local_addr: int,
    ledger_addr: int,
    rows_of_sources: Any,
    rows_of_experts: Any,
) -> int:
    """Fill a ledger from what every rank announced; the same numbers lead every rank to the same result.

    STATIC_TOO_SMALL: a rank would receive more than the fixed number of rows. BLOCK_TOO_SMALL: an expert would receive
    more than a block of the padded layout holds. LANDING_TOO_SMALL: all is settled, and a rank has to offer more
    memory. ``rows_of_sources`` [R] and ``rows_of_experts`` [L] grow by what arrives, unless it is refused.
    """
    rank, ranks = dims[D_RANK], dims[D_RANKS]
    counts_addr = opened_RW.ctypes.data + 8 * (body + COUNTS)
    stride = opened_RW.strides[0]
    gaps = field(ledger_addr, offsets, F_GAPS)
    store_i32(gaps, 0, 0)
    if not dims[D_BY_EXPERT]:
        _settle_compact(counts_addr, stride, dims, offsets, ledger_addr)
    most = _settle_experts(counts_addr, stride, dims, offsets, expert_rank_addr, expert_local_addr, ledger_addr)
    if dims[D_BLOCK_ROWS] > 0 and most > dims[D_BLOCK_ROWS]:
        return BLOCK_TOO_SMALL
    result = SETTLED
    for d in range(ranks):
        rows = load_i32(field(ledger_addr, offsets, F_FILLED_ROWS), d)
        if dims[D_STATIC_ROWS] >= 0:
            if rows > dims[D_STATIC_ROWS]:
                return STATIC_TOO_SMALL
            if d == rank and rows < dims[D_STATIC_ROWS]:
                _open_gap(gaps, dims[D_LOCAL] + 1, rows, dims[D_STATIC_ROWS])
            rows = dims[D_STATIC_ROWS]
        store_i32(field(ledger_addr, offsets, F_BATCH_ROWS), d, rows)
        if rows > opened_RW[d, body + CAPACITY]:
            result = LANDING_TOO_SMALL
    for source in range(ranks):
        told = counts_addr + source * stride
        store_i32(field(ledger_addr, offsets, F_SOURCE_ROWS), source, load_i32(told, rank))
        store_i32(field(ledger_addr, offsets, F_SOURCE_TOKENS), source, load_i32(told, ranks + dims[D_EXPERTS]))
        copy_bytes(field(ledger_addr, offsets, F_PAIR_ROWS) + 4 * source * ranks, told, 4 * ranks)
        arrived = load_i32(field(ledger_addr, offsets, F_SOURCE_ENTRIES), source)
        add_i64(rows_of_sources.ctypes.data + 8 * source, arrived)
    for local in range(dims[D_LOCAL]):
        add_i64(rows_of_experts.ctypes.data + 8 * local, load_i32(field(ledger_addr, offsets, F_COUNTS), local))
    return result
