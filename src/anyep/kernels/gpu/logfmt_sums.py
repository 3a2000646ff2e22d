"""LogFMT-10 wire rows of several ranks to one BF16 sum a token: decoded in registers, never rounded in between.

Legend: T tokens, W entries a token; GROUPS groups of 128 channels that one program sums, as [GROUPS, 4, 32];
PLACES: W up to the next power of two.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels.gpu.codec import BF16, CHANNELS, load_numbers, nothing, store_numbers
from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.logfmt_codec import CODES, RAW, RAW_IN_CODES, decode_log, header_bytes_of
from anyep.kernels.gpu.memory import i32_at, i64_at, start_of
from anyep.kernels.gpu.sums import entry_at, order_of


@triton.jit
def decode_piece(wire_addr, num_groups, first_group, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):
    """Return fp32 [GROUPS, 4, 32] of the wire row at ``wire_addr``."""
    group = tl.arange(0, GROUPS)
    quarter, lane = tl.arange(0, 4)[None, :, None], tl.arange(0, 32)[None, None, :]
    in_group = quarter * 32 + lane
    here = first_group + group < num_groups
    header = tl.load(i32_at(wire_addr + first_group * 4) + group, mask=here, other=0)
    codes_addr = wire_addr + header_bytes_of(num_groups) + first_group * CODES
    is_coded = (here & (header != 0))[:, None, None] & (in_group >= 0)
    base = group[:, None, None] * CODES
    low = tl.load(start_of(codes_addr, tl.uint8, ALIGNED) + base + in_group, mask=is_coded, other=0)
    high = tl.load(
        start_of(codes_addr, tl.uint8, ALIGNED) + base + CHANNELS + lane + quarter * 0, mask=is_coded, other=0
    )
    decoded = decode_log(low.to(tl.int32) | ((high.to(tl.int32) >> (quarter * 2)) & 3) << 8, header)
    is_raw = (here & (header == 0))[:, None, None]
    first = tl.load(
        start_of(codes_addr, tl.bfloat16, ALIGNED) + group[:, None, None] * (CODES // 2) + in_group,
        mask=is_raw & (in_group < RAW_IN_CODES),
        other=0.0,
    )
    rest_addr = wire_addr + header_bytes_of(num_groups) + num_groups * CODES + first_group * (RAW - CODES)
    rest = tl.load(
        start_of(rest_addr, tl.bfloat16, ALIGNED)
        + group[:, None, None] * ((RAW - CODES) // 2)
        + (in_group - RAW_IN_CODES),
        mask=is_raw & (in_group >= RAW_IN_CODES),
        other=0.0,
    )
    raw = tl.where(in_group < RAW_IN_CODES, first.to(tl.float32), rest.to(tl.float32))
    return tl.where((header != 0)[:, None, None], decoded, raw)


@triton.jit
def sum_decoded(
    hidden,
    token,
    first_group,
    width,
    by_rank,
    ranks_addr,
    rows_addr,
    peer_addr,
    weights_addr,
    bias0_addr,
    bias1_addr,
    out_addr,
    ALIGNED: tl.constexpr,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    num_groups = (hidden + CHANNELS - 1) // CHANNELS
    wire_bytes = header_bytes_of(num_groups) + num_groups * RAW
    in_group = tl.arange(0, 4)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    channel = tl.arange(0, GROUPS)[:, None, None] * CHANNELS + in_group
    left = hidden - first_group * CHANNELS
    if ALIGNED:
        left = left // 8 * 8
    here = (token * hidden + first_group * CHANNELS) * 2
    total = nothing([GROUPS, 4, 32])
    if bias0_addr != 0:
        total = total + load_numbers(bias0_addr + here, channel, channel < left, BF16, ALIGNED)
    if bias1_addr != 0:
        total = total + load_numbers(bias1_addr + here, channel, channel < left, BF16, ALIGNED)
    columns = tl.arange(0, PLACES)
    named = tl.load(i32_at(ranks_addr) + columns, mask=columns < width, other=-1) >= 0
    order = tl.where(named, columns, PLACES)
    if by_rank != 0:
        order = order_of(ranks_addr, width, PLACES)
    for place in range(width):
        column = tl.max(tl.where(order == place, columns, -1)).to(tl.int64)
        if column >= 0:
            row, weight = entry_at(ranks_addr, rows_addr, peer_addr, weights_addr, wire_bytes, column, width)
            numbers = decode_piece(row, num_groups, first_group, ALIGNED, GROUPS)
            total = total + numbers * weight.to(tl.float32, bitcast=True)
    num_terms = tl.sum(tl.where(named, 1, 0)) + tl.where((bias0_addr | bias1_addr) != 0, 1, 0)
    if num_terms == 0:
        total = tl.zeros([GROUPS, 4, 32], tl.float32)
    store_numbers(out_addr + here, channel, total, channel < left, BF16, ALIGNED)


@triton.jit
def sum_token(
    token,
    first_group,
    hidden,
    width,
    by_rank,
    entry_rank_addr,
    entry_row_addr,
    peer_addr,
    weights_addr,
    bias0_addr,
    bias1_addr,
    out_addr,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Sum GROUPS groups of a token."""
    ranks_addr, rows_addr = entry_rank_addr + token * width * 4, entry_row_addr + token * width * 4
    token_weights_addr = tl.where(weights_addr == 0, 0, weights_addr + token * width * 4)
    columns = tl.arange(0, PLACES)
    ranks = tl.load(i32_at(ranks_addr) + columns, mask=columns < width, other=-1)
    bases = tl.load(i64_at(peer_addr) + ranks, mask=ranks >= 0, other=0)
    if (((hidden * 2) | bias0_addr | bias1_addr | out_addr | tl.max(bases & 15)) & 15) == 0:
        sum_decoded(
            *(hidden, token, first_group, width, by_rank, ranks_addr, rows_addr, peer_addr, token_weights_addr),
            *(bias0_addr, bias1_addr, out_addr, True, PLACES, GROUPS),
        )
    else:
        sum_decoded(
            *(hidden, token, first_group, width, by_rank, ranks_addr, rows_addr, peer_addr, token_weights_addr),
            *(bias0_addr, bias1_addr, out_addr, False, PLACES, GROUPS),
        )


@kernel
def reduce_logfmt(
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
    PLACES: tl.constexpr,
    BOUNDED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Grid (step, pieces of GROUPS groups): BOUNDED programs take every ``step``-th token, others one each."""
    first_group = tl.program_id(1).to(tl.int64) * GROUPS
    token = first_token + tl.program_id(0)
    if BOUNDED:
        for number in tl.range(token, last_token, step, disable_licm=True):
            sum_token(
                *(tl.cast(number, tl.int64), first_group, hidden, width, by_rank),
                *(entry_rank_addr, entry_row_addr, peer_addr, weights_addr),
                *(bias0_addr, bias1_addr, out_addr),
                *(PLACES, GROUPS),
            )
    else:
        sum_token(
            *(token, first_group, hidden, width, by_rank),
            *(entry_rank_addr, entry_row_addr, peer_addr, weights_addr),
            *(bias0_addr, bias1_addr, out_addr),
            *(PLACES, GROUPS),
        )
