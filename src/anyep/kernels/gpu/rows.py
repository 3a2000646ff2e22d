"""Rows as bytes: scattered, copied, filled, gathered for the way and spread after it.

Counts lie in device memory and no grid depends on them: a stretch whose length only the device knows is shared by a
fixed number of programs, each of which takes every ``step``-th piece.

Legend: T tokens, W entries a token, S sources, P peers, B bins.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.memory import (
    base_of,
    bytes_at,
    copy_stretch,
    fill_stretch,
    i32_at,
    i64_at,
    load_indices,
    words_at,
)


@triton.jit
def spread_piece(
    source,
    row_bytes,
    begin,
    width,
    ranks_addr,
    rows_addr,
    peer_addr,
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Write one piece of a row, from byte ``begin`` on, to every place that the row's entries name."""
    if ALIGNED:
        words = tl.arange(0, PIECE // 4)
        last = (row_bytes - begin) // 16 * 4
        moved = tl.load(words_at(source + begin) + words, mask=words < last)
        for column in range(width):
            rank = tl.load(i32_at(ranks_addr) + column)
            base = base_of(peer_addr, rank)
            there = base + tl.load(i32_at(rows_addr) + column).to(tl.int64) * row_bytes + begin
            tl.store(words_at(there) + words, moved, mask=words < tl.where(base != 0, last, 0))
    else:
        places = tl.arange(0, PIECE)
        last = row_bytes - begin
        single = tl.load(bytes_at(source + begin) + places, mask=places < last)
        for column in range(width):
            rank = tl.load(i32_at(ranks_addr) + column)
            base = base_of(peer_addr, rank)
            there = base + tl.load(i32_at(rows_addr) + column).to(tl.int64) * row_bytes + begin
            tl.store(bytes_at(there) + places, single, mask=places < tl.where(base != 0, last, 0))


@triton.jit
def named_bases(width, ranks_addr, peer_addr, PLACES: tl.constexpr):
    """Return int64 [PLACES]: the base of every entry of a token, 0 where there is no row to write."""
    columns = tl.arange(0, PLACES)
    ranks = tl.load(i32_at(ranks_addr) + columns, mask=columns < width, other=-1)
    return tl.load(i64_at(peer_addr) + ranks, mask=ranks >= 0, other=0)


@triton.jit
def scatter_token(
    token,
    begin,
    x_addr,
    row_bytes,
    width,
    entry_rank_addr,
    entry_row_addr,
    peer_addr,
    PLACES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Write one piece of a token's row to all its places, unless it has none."""
    source = x_addr + token * row_bytes
    ranks_addr, rows_addr = entry_rank_addr + token * width * 4, entry_row_addr + token * width * 4
    bases = named_bases(width, ranks_addr, peer_addr, PLACES)
    if tl.max(tl.where(bases != 0, 1, 0)) != 0:
        if ((x_addr | row_bytes | tl.max(bases & 15)) & 15) == 0:
            spread_piece(source, row_bytes, begin, width, ranks_addr, rows_addr, peer_addr, True, PIECE)
        else:
            spread_piece(source, row_bytes, begin, width, ranks_addr, rows_addr, peer_addr, False, PIECE)


@kernel
def scatter(
    x_addr: tl.int64,
    row_bytes: tl.int64,
    first_token: tl.int64,
    last_token: tl.int64,
    step: tl.int64,
    width: tl.int64,
    entry_rank_addr: tl.int64,
    entry_row_addr: tl.int64,
    peer_addr: tl.int64,
    PLACES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Grid (step, pieces of a row): each program takes every ``step``-th token."""
    begin = tl.program_id(1).to(tl.int64) * PIECE
    for number in tl.range(first_token + tl.program_id(0), last_token, step, disable_licm=True):
        scatter_token(
            *(tl.cast(number, tl.int64), begin, x_addr, row_bytes, width),
            *(entry_rank_addr, entry_row_addr, peer_addr, PLACES, PIECE),
        )


@kernel
def copy(source_addr: tl.int64, destination_addr: tl.int64, num_bytes: tl.int64, step: tl.int64, PIECE: tl.constexpr):
    """Grid (step)."""
    copy_stretch(source_addr, destination_addr, num_bytes, tl.program_id(0).to(tl.int64), step, PIECE)


@kernel
def fill_rows(
    base_addr: tl.int64,
    row_bytes: tl.int64,
    gap_begin_addr: tl.int64,
    gap_end_addr: tl.int64,
    byte: tl.int64,
    step: tl.int64,
    PIECE: tl.constexpr,
):
    """Grid (gaps, step)."""
    begin = tl.load(i32_at(gap_begin_addr) + tl.program_id(0)).to(tl.int64)
    end = tl.load(i32_at(gap_end_addr) + tl.program_id(0)).to(tl.int64)
    first = tl.program_id(1).to(tl.int64)
    fill_stretch(base_addr + begin * row_bytes, (end - begin) * row_bytes, byte, first, step, PIECE)


@kernel
def unpack(
    row_bytes: tl.int64,
    rows_addr: tl.int64,
    start_addr: tl.int64,
    packed_addr: tl.int64,
    base_addr: tl.int64,
    step: tl.int64,
    PIECE: tl.constexpr,
):
    """Grid (S, step)."""
    source = tl.program_id(0)
    packed = tl.load(i64_at(packed_addr) + source)
    num_bytes = tl.load(i32_at(rows_addr) + source).to(tl.int64) * row_bytes
    place = base_addr + tl.load(i32_at(start_addr) + source).to(tl.int64) * row_bytes
    copy_stretch(packed, place, tl.where(packed != 0, num_bytes, 0), tl.program_id(1).to(tl.int64), step, PIECE)


@triton.jit
def rows_before(rows_addr, bin_, num_bins, BINS: tl.constexpr):
    """Return how many rows the bins before ``bin_`` have; the bins are int32 [num_bins] at most BINS of them."""
    bins = tl.arange(0, BINS)
    counts = tl.load(i32_at(rows_addr) + bins, mask=(bins < num_bins) & (bins < bin_), other=0)
    return tl.sum(counts.to(tl.int64))


@kernel
def pack(
    row_bytes: tl.int64,
    num_bins: tl.int64,
    rows_addr: tl.int64,
    start_addr: tl.int64,
    base_addr: tl.int64,
    packed_addr: tl.int64,
    step: tl.int64,
    BINS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Grid (P, B, step)."""
    peer, bin_ = tl.program_id(0).to(tl.int64), tl.program_id(1)
    flat = peer * num_bins + bin_
    packed = tl.load(i64_at(packed_addr) + peer)
    num_bytes = tl.load(i32_at(rows_addr) + flat).to(tl.int64) * row_bytes
    source = base_addr + tl.load(i32_at(start_addr) + flat).to(tl.int64) * row_bytes
    there = packed + rows_before(rows_addr + peer * num_bins * 4, bin_, num_bins, BINS) * row_bytes
    copy_stretch(source, there, tl.where(packed != 0, num_bytes, 0), tl.program_id(2).to(tl.int64), step, PIECE)


@kernel
def check_numbers(
    index_addr: tl.int64,
    num_rows: tl.int64,
    most: tl.int64,
    verdict_addr: tl.int64,
    IDX_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of numbers). int64 ``verdict`` takes the first position of a number outside [0, most), if any."""
    positions = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = positions < num_rows
    numbers = load_indices(index_addr, positions, inside, IDX_BYTES)
    wrong = inside & ((numbers < 0) | (numbers >= most))
    first = tl.min(tl.where(wrong, positions, num_rows))
    tl.atomic_min(i64_at(verdict_addr), first, mask=first < num_rows)


@kernel
def gather(
    row_bytes: tl.int64,
    index_addr: tl.int64,
    rows_per_rank: tl.int64,
    peer_addr: tl.int64,
    out_addr: tl.int64,
    step: tl.int64,
    IDX_BYTES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Grid (rows, step). Every number is right: somebody has checked."""
    position = tl.program_id(0).to(tl.int64)
    if IDX_BYTES == 8:
        number = tl.load(i64_at(index_addr) + position)
    else:
        number = tl.load(i32_at(index_addr) + position).to(tl.int64)
    rank = number // rows_per_rank
    source = tl.load(i64_at(peer_addr) + rank) + (number - rank * rows_per_rank) * row_bytes
    copy_stretch(source, out_addr + position * row_bytes, row_bytes, tl.program_id(1).to(tl.int64), step, PIECE)
