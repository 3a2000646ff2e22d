"""BF16, FP16 or FP32 rows to FP8 E4M3: quantised once in registers, written to every place.

Legend: T tokens, W entries a token; GROUPS scale groups of 128 channels that one program quantises; ELEMENT, SCALES,
NATIVE: kernels/gpu/codec.py.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels.gpu.codec import (
    CHANNELS,
    LEAST_AMAX,
    MAGNITUDE,
    UE8M0,
    encode_e4m3,
    factor_of,
    load_numbers,
    scale_of,
)
from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.memory import base_of, bytes_at, i32_at, start_of
from anyep.kernels.gpu.rows import named_bases


@triton.jit
def quantise_piece(
    x_addr,
    hidden,
    first_group,
    width,
    ranks_addr,
    rows_addr,
    peer_q_addr,
    peer_scales_addr,
    ELEMENT: tl.constexpr,
    SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Quantise GROUPS groups of the row at ``x_addr`` and write codes and scales to every place of its entries."""
    group = tl.arange(0, GROUPS)
    channel = group[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    first = first_group * CHANNELS
    left = hidden - first
    if ALIGNED:
        left = left // 16 * 16
    x = load_numbers(x_addr + first * (4 if ELEMENT == 2 else 2), channel, channel < left, ELEMENT, ALIGNED)
    amax = tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1)
    least = tl.full([GROUPS], LEAST_AMAX, tl.float32).to(tl.int32, bitcast=True)
    amax = tl.where(amax > least, amax, least)
    scale = scale_of(amax, SCALES)
    codes = encode_e4m3(x * factor_of(amax, scale, SCALES)[:, None], NATIVE)
    num_groups = (hidden + CHANNELS - 1) // CHANNELS
    num_scales = num_groups
    if SCALES == UE8M0:
        num_scales = (num_groups + 3) // 4 * 4
        scale = tl.where(first_group + group < num_groups, scale >> 23, 0)  # NaN and Inf are 0xff, what is missing 0
    for column in range(width):
        rank = tl.load(i32_at(ranks_addr) + column)
        row = tl.load(i32_at(rows_addr) + column).to(tl.int64)
        base = base_of(peer_q_addr, rank)
        there = start_of(base + row * hidden + first, tl.uint8, ALIGNED)
        tl.store(there + channel, codes, mask=channel < tl.where(base != 0, left, 0))
        base = base_of(peer_scales_addr, rank)
        inside = first_group + group < tl.where(base != 0, num_scales, 0)
        if SCALES == UE8M0:
            place = bytes_at(base + row * num_scales + first_group) + group
            tl.store(place, scale.to(tl.uint8), mask=inside)
        else:
            place = i32_at(base + (row * num_scales + first_group) * 4) + group
            tl.store(place, scale, mask=inside)


@triton.jit
def quantise_token(
    token,
    first_group,
    x_addr,
    hidden,
    width,
    entry_rank_addr,
    entry_row_addr,
    peer_q_addr,
    peer_scales_addr,
    ELEMENT: tl.constexpr,
    SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Quantise GROUPS groups of a token, unless nobody wants it."""
    ranks_addr, rows_addr = entry_rank_addr + token * width * 4, entry_row_addr + token * width * 4
    bases = named_bases(width, ranks_addr, peer_q_addr, PLACES)
    row_addr = x_addr + token * hidden * (4 if ELEMENT == 2 else 2)
    if tl.max(tl.where(bases != 0, 1, 0)) != 0:
        if ((x_addr | hidden | tl.max(bases & 15)) & 15) == 0:
            quantise_piece(
                *(row_addr, hidden, first_group, width, ranks_addr, rows_addr, peer_q_addr, peer_scales_addr),
                *(ELEMENT, SCALES, NATIVE, True, GROUPS),
            )
        else:
            quantise_piece(
                *(row_addr, hidden, first_group, width, ranks_addr, rows_addr, peer_q_addr, peer_scales_addr),
                *(ELEMENT, SCALES, NATIVE, False, GROUPS),
            )


@kernel
def quantise_scatter(
    x_addr: tl.int64,
    hidden: tl.int64,
    first_token: tl.int64,
    last_token: tl.int64,
    step: tl.int64,
    width: tl.int64,
    entry_rank_addr: tl.int64,
    entry_row_addr: tl.int64,
    peer_q_addr: tl.int64,
    peer_scales_addr: tl.int64,
    ELEMENT: tl.constexpr,
    SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
    PLACES: tl.constexpr,
    BOUNDED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Grid (step, pieces of GROUPS groups): BOUNDED programs take every ``step``-th token, others one each."""
    first_group = tl.program_id(1).to(tl.int64) * GROUPS
    token = first_token + tl.program_id(0)
    if BOUNDED:
        for number in tl.range(token, last_token, step, disable_licm=True):
            quantise_token(
                *(tl.cast(number, tl.int64), first_group, x_addr, hidden, width),
                *(entry_rank_addr, entry_row_addr, peer_q_addr, peer_scales_addr),
                *(ELEMENT, SCALES, NATIVE, PLACES, GROUPS),
            )
    else:
        quantise_token(
            *(token, first_group, x_addr, hidden, width),
            *(entry_rank_addr, entry_row_addr, peer_q_addr, peer_scales_addr),
            *(ELEMENT, SCALES, NATIVE, PLACES, GROUPS),
        )
