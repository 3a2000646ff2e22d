"""BF16 rows to LogFMT-10 wire rows.

Legend: B bins; GROUPS groups of 128 channels that one program encodes in one go, as [GROUPS, 4, 32]; BINS: B up to the
next power of two.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels.gpu.codec import CHANNELS
from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.logfmt_codec import CODES, RAW, RAW_IN_CODES, encode_log, header_bytes_of
from anyep.kernels.gpu.memory import i32_at, start_of
from anyep.kernels.gpu.rows import rows_before
from anyep.numerics.logfmt import LEAST_AMAX_BITS, ONE_BITS

_LEAST_AMAX = tl.constexpr(LEAST_AMAX_BITS)
_ONE = tl.constexpr(ONE_BITS)


@triton.jit
def header_of(bits):
    """Return the headers [G] of BF16 groups [G, 4, 32] given as int32 bits: amax and amin, or 0 for raw."""
    size = bits & 0x7FFF
    amax = tl.max(tl.max(size, axis=2), axis=1)
    amin = tl.min(tl.min(tl.where(size == 0, 0x7FFF, size), axis=2), axis=1)
    is_coded = (amax >= _LEAST_AMAX) & (amax < _ONE) & (amin < amax)
    return tl.where(is_coded, amax | (amin << 16), 0)


@triton.jit
def encode_piece(x_addr, hidden, first_group, wire_addr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):
    """Encode GROUPS groups of the row at ``x_addr`` into the wire row at ``wire_addr``."""
    num_groups = (hidden + CHANNELS - 1) // CHANNELS
    group = tl.arange(0, GROUPS)
    quarter, lane = tl.arange(0, 4)[None, :, None], tl.arange(0, 32)[None, None, :]
    in_group = quarter * 32 + lane
    channel = group[:, None, None] * CHANNELS + in_group
    left = hidden - first_group * CHANNELS
    if ALIGNED:
        left = left // 8 * 8
    start = start_of(x_addr + first_group * CHANNELS * 2, tl.int16, ALIGNED)
    numbers = tl.load(start + channel, mask=channel < left, other=0)
    bits = numbers.to(tl.int32)
    header = header_of(bits)
    here = first_group + group < num_groups
    tl.store(i32_at(wire_addr + first_group * 4) + group, header, mask=here)
    codes = encode_log(bits, header)
    codes_addr = wire_addr + header_bytes_of(num_groups) + first_group * CODES
    is_coded = (here & (header != 0))[:, None, None]
    low = start_of(codes_addr, tl.uint8, ALIGNED) + group[:, None, None] * CODES + in_group
    tl.store(low, (codes & 0xFF).to(tl.uint8), mask=is_coded & (in_group >= 0))
    high = tl.sum((codes >> 8) << (quarter * 2), axis=1)
    byte = group[:, None] * CODES + CHANNELS + tl.arange(0, 32)[None, :]
    tl.store(start_of(codes_addr, tl.uint8, ALIGNED) + byte, high.to(tl.uint8), mask=(here & (header != 0))[:, None])
    is_raw = (here & (header == 0))[:, None, None]
    first = start_of(codes_addr, tl.int16, ALIGNED) + group[:, None, None] * (CODES // 2)
    tl.store(first + in_group, numbers, mask=is_raw & (in_group < RAW_IN_CODES))
    rest_addr = wire_addr + header_bytes_of(num_groups) + num_groups * CODES + first_group * (RAW - CODES)
    rest = start_of(rest_addr, tl.int16, ALIGNED) + group[:, None, None] * ((RAW - CODES) // 2)
    tl.store(rest + (in_group - RAW_IN_CODES), numbers, mask=is_raw & (in_group >= RAW_IN_CODES))


@kernel
def logfmt_encode(
    x_addr: tl.int64,
    hidden: tl.int64,
    num_bins: tl.int64,
    rows_addr: tl.int64,
    start_addr: tl.int64,
    wire_addr: tl.int64,
    step: tl.int32,
    BINS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Grid (B, step): each program takes every ``step``-th piece of a bin's rows."""
    bin_ = tl.program_id(0)
    num_groups = (hidden + CHANNELS - 1) // CHANNELS
    num_pieces = ((num_groups + GROUPS - 1) // GROUPS).to(tl.int32)
    wire_bytes = header_bytes_of(num_groups) + num_groups * RAW
    rows = tl.load(i32_at(rows_addr) + bin_)
    start = tl.load(i32_at(start_addr) + bin_).to(tl.int64)
    before = rows_before(rows_addr, bin_, num_bins, BINS)
    aligned = ((x_addr | (hidden * 2) | wire_addr) & 15) == 0
    for piece in range(tl.program_id(1), rows * num_pieces, step):
        row = tl.cast(piece // num_pieces, tl.int64)
        first_group = tl.cast(piece % num_pieces, tl.int64) * GROUPS
        source = x_addr + (start + row) * hidden * 2
        there = wire_addr + (before + row) * wire_bytes
        if aligned:
            encode_piece(source, hidden, first_group, there, True, GROUPS)
        else:
            encode_piece(source, hidden, first_group, there, False, GROUPS)
