"""BF16 rows to LogFMT-10 wire rows, group by group."""

from __future__ import annotations

from typing import Any

from anyep.kernels.cpu.codec import larger_16, load_lanes_i16, load_number, magnitude_16, store_lanes_i8
from anyep.kernels.cpu.logfmt_codec import (
    QUARTER,
    encode_log,
    high_bits,
    low_byte,
    magnitude_less_one,
    smaller_16,
    widen_bits,
    write_encoding,
)
from anyep.kernels.cpu.scales import groups_of
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import (
    LINE,
    allocate,
    copy_bytes,
    fill_bytes,
    load_i32,
    prefetch,
    release,
    stack_block,
    store_i32,
)
from anyep.machine.vectors import largest, smallest
from anyep.numerics.logfmt import CHANNELS, CODE_BYTES, LEAST_AMAX_BITS, ONE_BITS, RAW_BYTES

REST_BYTES = RAW_BYTES - CODE_BYTES
"""Bytes of a raw group that have no room among the codes."""
_SCALE_BYTES = 16
"""fp32 [4] a group."""
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
def encode_quarter(x_addr: int, quarter: int, scale_addr: int) -> Any:
    """Return the 10 bits of 32 BF16 numbers."""
    return encode_log(
        load_lanes_i16(x_addr + 2 * QUARTER * quarter),
        load_number(scale_addr, 0),
        load_number(scale_addr, 1),
        load_number(scale_addr, 2),
        load_number(scale_addr, 3),
    )


@inlined
def encode_group(x_addr: int, scale_addr: int, codes_addr: int) -> None:
    """Write the 160 bytes of 128 BF16 numbers."""
    codes0, codes1 = encode_quarter(x_addr, 0, scale_addr), encode_quarter(x_addr, 1, scale_addr)
    store_lanes_i8(codes_addr, low_byte(codes0))
    store_lanes_i8(codes_addr + QUARTER, low_byte(codes1))
    codes2, codes3 = encode_quarter(x_addr, 2, scale_addr), encode_quarter(x_addr, 3, scale_addr)
    store_lanes_i8(codes_addr + 2 * QUARTER, low_byte(codes2))
    store_lanes_i8(codes_addr + 3 * QUARTER, low_byte(codes3))
    store_lanes_i8(codes_addr + 4 * QUARTER, high_bits(codes0, codes1, codes2, codes3))


@inlined
def write_headers(x_addr: int, hidden: int, padded: int, wire_addr: int, scales_addr: int) -> None:
    """Look through a row, write its headers, and what encoding needs of them; fill up a short last group."""
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
            write_encoding(header, scales_addr + _SCALE_BYTES * group)


@inlined
def encode_row(x_addr: int, hidden: int, wire_addr: int, padded: int, scales_addr: int) -> None:
    """Encode one row in two passes, so that no group waits for its own header."""
    write_headers(x_addr, hidden, padded, wire_addr, scales_addr)
    codes, rest = wire_addr + codes_offset(hidden), wire_addr + rest_offset(hidden)
    for group in range(groups_of(hidden)):
        x = padded if hidden - group * CHANNELS < CHANNELS else x_addr + group * RAW_BYTES
        if load_i32(wire_addr, group) != 0:
            encode_group(x, scales_addr + _SCALE_BYTES * group, codes + group * CODE_BYTES)
        else:
            copy_bytes(codes + group * CODE_BYTES, x, CODE_BYTES)
            copy_bytes(rest + group * REST_BYTES, x + CODE_BYTES, REST_BYTES)


@compiled("void(int64, int64, int64, int64, int64, int64)")
def logfmt_encode(x_addr: int, hidden: int, num_bins: int, rows_addr: int, start_addr: int, wire_addr: int) -> None:
    padded = _group_on_stack()
    scales = allocate(_SCALE_BYTES * groups_of(hidden))
    wire, row_bytes = wire_addr, row_bytes_of(hidden)
    for one in range(num_bins):
        first = load_i32(start_addr, one)
        for row in range(first, first + load_i32(rows_addr, one)):
            encode_row(x_addr + row * 2 * hidden, hidden, wire, padded, scales)
            wire += row_bytes
    release(scales)
