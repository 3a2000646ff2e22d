"""Rows of several ranks to one sum a token: fp32, a fixed order, rounded once.

Terms come four at a time, so that four loads of every thread are on their way before the first is added.

Legend: T tokens, W entries a token; BLOCK channels that one program sums; PLACES: W up to the next power of two.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels.gpu.codec import load_numbers, nothing, store_numbers
from anyep.kernels.gpu.jit import kernel_of_registers
from anyep.kernels.gpu.memory import i32_at, i64_at


@triton.jit
def entry_at(ranks_addr, rows_addr, peer_addr, weights_addr, row_bytes, column, width):
    """Return the address of an entry's row, 0 for none, and the bits of its weight, 1 without weights."""
    inside = column < width
    rank = tl.load(i32_at(ranks_addr) + column, mask=inside, other=-1)
    row = tl.load(i32_at(rows_addr) + column, mask=inside, other=0).to(tl.int64)
    base = tl.load(i64_at(peer_addr) + rank, mask=rank >= 0, other=0)
    weighted = tl.where(weights_addr == 0, column * 0 + width, column)
    weight = tl.load(i32_at(weights_addr) + weighted, mask=weighted < width, other=0x3F800000)
    return tl.where(rank >= 0, base + row * row_bytes, 0), weight


@triton.jit
def order_of(ranks_addr, width, PLACES: tl.constexpr):
    """Return int32 [PLACES]: an entry's place in ascending rank and then column order; W and more without rank."""
    here, other = tl.arange(0, PLACES)[:, None], tl.arange(0, PLACES)[None, :]
    rank = tl.load(i32_at(ranks_addr) + here, mask=here < width, other=-1)
    rival = tl.load(i32_at(ranks_addr) + other, mask=other < width, other=-1)
    before = (rival >= 0) & ((rival < rank) | ((rival == rank) & (other < here)))
    place = tl.sum(tl.where(before, 1, 0), axis=1)
    return tl.where(tl.max(rank, axis=1) >= 0, place, PLACES)


@triton.jit
def product_of(address, weight, channel, inside_to, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the rounded products of one row's numbers; -0, which changes no sum, for a row that is none."""
    x = load_numbers(address, channel, channel < tl.where(address != 0, inside_to, 0), ELEMENT, ALIGNED)
    return tl.where(address != 0, x * weight.to(tl.float32, bitcast=True), nothing(x.shape))


@triton.jit
def sum_in_columns(
    total,
    ranks_addr,
    rows_addr,
    peer_addr,
    weights_addr,
    row_bytes,
    offset,
    width,
    channel,
    inside_to,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    for column in range(0, width, 4):
        row0, weight0 = entry_at(ranks_addr, rows_addr, peer_addr, weights_addr, row_bytes, column, width)
        row1, weight1 = entry_at(ranks_addr, rows_addr, peer_addr, weights_addr, row_bytes, column + 1, width)
        row2, weight2 = entry_at(ranks_addr, rows_addr, peer_addr, weights_addr, row_bytes, column + 2, width)
        row3, weight3 = entry_at(ranks_addr, rows_addr, peer_addr, weights_addr, row_bytes, column + 3, width)
        term0 = product_of(tl.where(row0 != 0, row0 + offset, 0), weight0, channel, inside_to, ELEMENT, ALIGNED)
        term1 = product_of(tl.where(row1 != 0, row1 + offset, 0), weight1, channel, inside_to, ELEMENT, ALIGNED)
        term2 = product_of(tl.where(row2 != 0, row2 + offset, 0), weight2, channel, inside_to, ELEMENT, ALIGNED)
        term3 = product_of(tl.where(row3 != 0, row3 + offset, 0), weight3, channel, inside_to, ELEMENT, ALIGNED)
        total = total + term0 + term1 + term2 + term3
    return total


@triton.jit
def sum_in_order(
    total,
    order,
    ranks_addr,
    rows_addr,
    peer_addr,
    weights_addr,
    row_bytes,
    offset,
    width,
    channel,
    inside_to,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PLACES: tl.constexpr,
):
    columns = tl.arange(0, PLACES)
    for place in range(width):
        column = tl.max(tl.where(order == place, columns, -1)).to(tl.int64)
        if column >= 0:
            row, weight = entry_at(ranks_addr, rows_addr, peer_addr, weights_addr, row_bytes, column, width)
            total = total + product_of(row + offset, weight, channel, inside_to, ELEMENT, ALIGNED)
    return total


@triton.jit
def sum_piece(
    hidden,
    token,
    first,
    width,
    by_rank,
    ranks_addr,
    rows_addr,
    peer_addr,
    weights_addr,
    bias0_addr,
    bias1_addr,
    out_addr,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum BLOCK channels of a token, from channel ``first`` on."""
    channel = tl.arange(0, BLOCK)
    number_bytes = 4 if ELEMENT == 2 else 2
    row_bytes, offset = hidden * number_bytes, first * number_bytes
    left = hidden - first
    if ALIGNED:
        left = left // (16 // number_bytes) * (16 // number_bytes)
    one = tl.cast(0x3F800000, tl.int32)
    here = token * row_bytes + offset
    total = nothing([BLOCK])
    total = total + product_of(tl.where(bias0_addr != 0, bias0_addr + here, 0), one, channel, left, ELEMENT, ALIGNED)
    total = total + product_of(tl.where(bias1_addr != 0, bias1_addr + here, 0), one, channel, left, ELEMENT, ALIGNED)
    places = tl.arange(0, PLACES)
    named = tl.load(i32_at(ranks_addr) + places, mask=places < width, other=-1) >= 0
    is_in_order = by_rank == 0
    order = places
    if by_rank != 0:
        order = order_of(ranks_addr, width, PLACES)
        num_before = tl.cumsum(tl.where(named, 1, 0)) - 1
        is_in_order = tl.max(tl.where(named, tl.where(order == num_before, 0, 1), 0)) == 0
    if is_in_order:
        total = sum_in_columns(
            *(total, ranks_addr, rows_addr, peer_addr, weights_addr, row_bytes, offset, width, channel, left),
            *(ELEMENT, ALIGNED),
        )
    else:
        total = sum_in_order(
            *(total, order, ranks_addr, rows_addr, peer_addr, weights_addr, row_bytes, offset, width, channel, left),
            *(ELEMENT, ALIGNED, PLACES),
        )
    num_terms = tl.sum(tl.where(named, 1, 0)) + tl.where((bias0_addr | bias1_addr) != 0, 1, 0)
    if num_terms == 0:
        total = tl.zeros([BLOCK], tl.float32)
    store_numbers(out_addr + here, channel, total, channel < left, ELEMENT, ALIGNED)


@kernel_of_registers(120, on="sm_80")
def reduce(
    hidden: tl.int64,
    first_token: tl.int64,
    last_token: tl.int64,
    step: tl.int64,
    width: tl.int64,
    by_rank: tl.int64,
    entry_rank_addr: tl.int64,
    entry_row_addr: tl.int64,
    peer_addr: tl.int64,
    weights_addr: tl.int64,
    bias0_addr: tl.int64,
    bias1_addr: tl.int64,
    out_addr: tl.int64,
    ELEMENT: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (step, pieces of BLOCK channels): each program takes every ``step``-th token."""
    first = tl.program_id(1).to(tl.int64) * BLOCK
    for number in tl.range(first_token + tl.program_id(0), last_token, step, disable_licm=True):
        token = tl.cast(number, tl.int64)
        ranks_addr, rows_addr = entry_rank_addr + token * width * 4, entry_row_addr + token * width * 4
        token_weights_addr = tl.where(weights_addr == 0, 0, weights_addr + token * width * 4)
        columns = tl.arange(0, PLACES)
        ranks = tl.load(i32_at(ranks_addr) + columns, mask=columns < width, other=-1)
        bases = tl.load(i64_at(peer_addr) + ranks, mask=ranks >= 0, other=0)
        row_bytes = hidden * (4 if ELEMENT == 2 else 2)
        if ((row_bytes | bias0_addr | bias1_addr | out_addr | tl.max(bases & 15)) & 15) == 0:
            sum_piece(
                *(hidden, token, first, width, by_rank, ranks_addr, rows_addr, peer_addr, token_weights_addr),
                *(bias0_addr, bias1_addr, out_addr, ELEMENT, True, PLACES, BLOCK),
            )
        else:
            sum_piece(
                *(hidden, token, first, width, by_rank, ranks_addr, rows_addr, peer_addr, token_weights_addr),
                *(bias0_addr, bias1_addr, out_addr, ELEMENT, False, PLACES, BLOCK),
            )
