"""BF16 rows to LogFMT-10 wire rows, group by group."""

from __future__ import annotations

import numpy as np

from anyep.kernels.cpu.codec import larger_16, load_lanes_i16, magnitude_16, store_lanes_i8
from anyep.kernels.cpu.logfmt_codec import (
    QUARTER,
    encode_log,
    half_of_least,
    high_bits,
    log_min_of,
    log_range_of,
    low_byte,
    magnitude_less_one,
    offset_of,
    smaller_16,
    step_of,
    steps_per_one_of,
    unit_of,
    widen_bits,
)
from anyep.kernels.cpu.scales import groups_of
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import LINE, copy_bytes, fill_bytes, load_i32, prefetch, stack_block, store_i32
from anyep.machine.vectors import broadcast, largest, smallest
from anyep.numerics.logfmt import CHANNELS, CODE_BYTES, LEAST_AMAX_BITS, ONE_BITS, RAW_BYTES, WHOLE

REST_BYTES = RAW_BYTES - CODE_BYTES
"""Bytes of a raw group that have no room among the codes."""
_WHOLE = np.float32(WHOLE)
_AHEAD = 2048
_group_on_stack = stack_block(RAW_BYTES)


@inlined
def codes_offset(hidden: int) -> int:
    """Return where the codes of a wire row begin."""
    return (4 * groups_of(hidden) + LINE - 1) // LINE * LINE


@inlined
def rest_offset(hidden: int) -> int:
    """Return where the rests of raw groups begin."""
    return codes_offset(hidden) + groups_of(hidden) * CODE_BYTES


@inlined
def row_bytes_of(hidden: int) -> int:
    return codes_offset(hidden) + groups_of(hidden) * RAW_BYTES


@inlined
def header_of(x_addr: int) -> int:
    """Return the header of 128 BF16 numbers: their amax and amin, or 0 where they cannot be coded."""
    first = load_lanes_i16(x_addr)
    top, bottom = magnitude_16(first), magnitude_less_one(first)
    for offset in range(2 * QUARTER, RAW_BYTES, 2 * QUARTER):
        numbers = load_lanes_i16(x_addr + offset)
        top = larger_16(top, magnitude_16(numbers))
        bottom = smaller_16(bottom, magnitude_less_one(numbers))
    amax, amin = largest(widen_bits(top)), smallest(widen_bits(bottom)) + 1
    is_coded = amax >= LEAST_AMAX_BITS and amax < ONE_BITS and amin < amax
    return amax | (amin << 16) if is_coded else 0


@inlined
def encode_group(x_addr: int, header: int, codes_addr: int) -> None:
    """Write the 160 bytes of 128 BF16 numbers."""
    amax = header & 0xFFFF
    log_min = log_min_of(amax, header >> 16)
    log_range = log_range_of(amax, log_min)
    least, unit = broadcast(log_min), broadcast(unit_of(amax))
    per_one, offset = broadcast(steps_per_one_of(log_range)), broadcast(offset_of(step_of(log_range)))
    first, half = broadcast(np.float32(amax >> 7) + _WHOLE), half_of_least(least, unit)
    codes0 = encode_log(load_lanes_i16(x_addr), least, per_one, offset, first, half)
    store_lanes_i8(codes_addr, low_byte(codes0))
    codes1 = encode_log(load_lanes_i16(x_addr + 2 * QUARTER), least, per_one, offset, first, half)
    store_lanes_i8(codes_addr + QUARTER, low_byte(codes1))
    codes2 = encode_log(load_lanes_i16(x_addr + 4 * QUARTER), least, per_one, offset, first, half)
    store_lanes_i8(codes_addr + 2 * QUARTER, low_byte(codes2))
    codes3 = encode_log(load_lanes_i16(x_addr + 6 * QUARTER), least, per_one, offset, first, half)
    store_lanes_i8(codes_addr + 3 * QUARTER, low_byte(codes3))
    store_lanes_i8(codes_addr + 4 * QUARTER, high_bits(codes0, codes1, codes2, codes3))


@inlined
def encode_row(x_addr: int, hidden: int, wire_addr: int, padded: int) -> None:
    """Encode one row; ``padded`` is room for the last group, if it is short."""
    codes, rest = wire_addr + codes_offset(hidden), wire_addr + rest_offset(hidden)
    for group in range(groups_of(hidden)):
        x, count = x_addr + group * RAW_BYTES, min(CHANNELS, hidden - group * CHANNELS)
        for ahead in range(0, RAW_BYTES, LINE):
            prefetch(x + ahead + _AHEAD)
        if count < CHANNELS:
            fill_bytes(padded, RAW_BYTES, 0)
            copy_bytes(padded, x, 2 * count)
            x = padded
        header = header_of(x)
        store_i32(wire_addr, group, header)
        if header != 0:
            encode_group(x, header, codes + group * CODE_BYTES)
        else:
            copy_bytes(codes + group * CODE_BYTES, x, CODE_BYTES)
            copy_bytes(rest + group * REST_BYTES, x + CODE_BYTES, REST_BYTES)


@compiled("void(int64, int64, int64, int64, int64, int64)")
def logfmt_encode(x_addr: int, hidden: int, num_bins: int, rows_addr: int, start_addr: int, wire_addr: int) -> None:
    padded = _group_on_stack()
    wire, row_bytes = wire_addr, row_bytes_of(hidden)
    for one in range(num_bins):
        first = load_i32(start_addr, one)
        for row in range(first, first + load_i32(rows_addr, one)):
            encode_row(x_addr + row * 2 * hidden, hidden, wire, padded)
            wire += row_bytes
