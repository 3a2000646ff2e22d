"""BF16, FP16 or FP32 rows to FP8 E4M3 and scales, quantised once and written to every destination; and back."""

from __future__ import annotations

import numpy as np

from anyep.kernels.cpu.codec import (
    decode_e4m3,
    encode_beside_infinity,
    encode_e4m3,
    larger,
    load,
    load_i8,
    load_part,
    load_part_i8,
    magnitude,
    multiply,
    store,
    store_i8,
    store_part,
    store_part_i8,
)
from anyep.kernels.cpu.rows import place_of, stream
from anyep.kernels.spec import ScaleFormat
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import (
    bits_as_float,
    copy_bytes,
    float_as_bits,
    load_i32,
    stack_memory,
    store_i8 as store_byte,
    store_i32,
)
from anyep.machine.intrinsics import load_i8 as load_byte
from anyep.machine.vectors import LANES, broadcast_f32, largest
from anyep.numerics.formats import CHANNELS_PER_SCALE
from anyep.numerics.scales import E4M3_MAX, MIN_AMAX

_UE8M0 = int(ScaleFormat.UE8M0)
_FP32_SCALES = int(ScaleFormat.FP32)
_GROUPS = 32
_SEGMENT = _GROUPS * CHANNELS_PER_SCALE
"""Channels quantised at a time: 4 KiB of FP8 stay in the first cache until every destination has them."""
_SCALES_BYTES = 4 * _GROUPS
_INF_BITS = 0x7F800000
_NAN_BITS = 0x7FC00000
_NAN_CODE = 0x7F
_MIN_AMAX_BITS = int(np.float32(MIN_AMAX).view(np.int32))
_MAX = np.float32(E4M3_MAX)
_ONE = np.float32(1)


@inlined
def group_amax(element: int, element_bytes: int, x_addr: int, count: int) -> int:
    """Return the largest magnitude of up to 128 numbers as fp32 bits; above Inf where there is a NaN."""
    peak = magnitude(broadcast_f32(np.float32(0)))
    whole = count // LANES * LANES
    for channel in range(0, whole, LANES):
        peak = larger(peak, magnitude(load(element, x_addr + channel * element_bytes)))
    if whole < count:
        peak = larger(peak, magnitude(load_part(element, x_addr + whole * element_bytes, count - whole)))
    return largest(peak)


@inlined
def scale_bits(amax_bits: int, scale_format: int) -> int:
    """Return the fp32 bits of the scale of a group."""
    if amax_bits > _INF_BITS:
        return _NAN_BITS
    if amax_bits == _INF_BITS:
        return _INF_BITS
    bits = float_as_bits(bits_as_float(amax_bits) / _MAX)
    return bits if scale_format == _FP32_SCALES else (bits + 0x7FFFFF) & _INF_BITS


@inlined
def factor_of(amax_bits: int, scale: int, scale_format: int) -> np.float32:
    if scale_format == _FP32_SCALES:
        return _MAX / bits_as_float(amax_bits)
    return _ONE / bits_as_float(scale)


@inlined
def encode_non_finite(
    element: int, element_bytes: int, x_addr: int, count: int, has_nan: bool, q_addr: int
) -> None:
    for channel in range(0, count, LANES):
        part = min(LANES, count - channel)
        codes = encode_beside_infinity(load_part(element, x_addr + channel * element_bytes, part))
        store_part_i8(q_addr + channel, codes, part)
    if has_nan:
        for channel in range(count):
            store_byte(q_addr, channel, _NAN_CODE)


@inlined
def quantise_group(
    element: int, element_bytes: int, x_addr: int, count: int, scale_format: int, q_addr: int
) -> int:
    """Write up to 128 codes; return the scale's fp32 bits."""
    amax = max(group_amax(element, element_bytes, x_addr, count), _MIN_AMAX_BITS)
    scale = scale_bits(amax, scale_format)
    if amax >= _INF_BITS:
        encode_non_finite(element, element_bytes, x_addr, count, amax > _INF_BITS, q_addr)
        return scale
    factor = broadcast_f32(factor_of(amax, scale, scale_format))
    whole = count // LANES * LANES
    for channel in range(0, whole, LANES):
        store_i8(q_addr + channel, encode_e4m3(load(element, x_addr + channel * element_bytes), factor))
    if whole < count:
        rest = load_part(element, x_addr + whole * element_bytes, count - whole)
        store_part_i8(q_addr + whole, encode_e4m3(rest, factor), count - whole)
    return scale


@inlined
def quantise_segment(
    element: int, element_bytes: int, x_addr: int, count: int, scale_format: int, q_addr: int, scales_addr: int
) -> int:
    """Quantise up to 32 groups; return how many bytes of scales they have."""
    num_groups = (count + CHANNELS_PER_SCALE - 1) // CHANNELS_PER_SCALE
    for group in range(num_groups):
        channel = group * CHANNELS_PER_SCALE
        size = min(CHANNELS_PER_SCALE, count - channel)
        x = x_addr + channel * element_bytes
        bits = quantise_group(element, element_bytes, x, size, scale_format, q_addr + channel)
        if scale_format == _UE8M0:
            store_byte(scales_addr, group, min(bits >> 23, 255))
        else:
            store_i32(scales_addr, group, bits)
    if scale_format != _UE8M0:
        return 4 * num_groups
    for group in range(num_groups, (num_groups + 3) // 4 * 4):
        store_byte(scales_addr, group, 0)
    return (num_groups + 3) // 4 * 4


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def quantise_scatter(
    x_addr: int,
    element: int,
    hidden: int,
    scale_format: int,
    first_token: int,
    last_token: int,
    width: int,
    entry_rank_addr: int,
    entry_row_addr: int,
    peer_q_addr: int,
    peer_scales_addr: int,
) -> None:
    q = stack_memory(_SEGMENT)
    scales = stack_memory(_SCALES_BYTES)
    element_bytes = 4 if element == 2 else 2
    num_groups = (hidden + CHANNELS_PER_SCALE - 1) // CHANNELS_PER_SCALE
    scale_bytes = (num_groups + 3) // 4 * 4 if scale_format == _UE8M0 else 4 * num_groups
    bytes_per_group = 1 if scale_format == _UE8M0 else 4
    for token in range(first_token, last_token):
        for begin in range(0, hidden, _SEGMENT):
            count = min(_SEGMENT, hidden - begin)
            x = x_addr + (token * hidden + begin) * element_bytes
            num_scales = quantise_segment(element, element_bytes, x, count, scale_format, q, scales)
            first_scale = begin // CHANNELS_PER_SCALE * bytes_per_group
            for entry in range(token * width, (token + 1) * width):
                place = place_of(peer_q_addr, entry_rank_addr, entry_row_addr, entry, hidden)
                if place != 0:
                    stream(place + begin, q, count)
                    beside = place_of(peer_scales_addr, entry_rank_addr, entry_row_addr, entry, scale_bytes)
                    copy_bytes(beside + first_scale, scales, num_scales)


@inlined
def load_scale(scales_addr: int, group: int, scale_format: int) -> np.float32:
    if scale_format != _UE8M0:
        return bits_as_float(load_i32(scales_addr, group))
    exponent = load_byte(scales_addr, group) & 0xFF
    if exponent == 0xFF:
        return bits_as_float(_NAN_BITS)
    if exponent == 0:
        return bits_as_float(1 << 22)  # 2 ** -127 is subnormal
    return bits_as_float(exponent << 23)


@inlined
def dequantise_group(q_addr: int, count: int, scale, out_addr: int, element: int, past_caches: int) -> None:
    element_bytes = 4 if element == 2 else 2
    whole = count // LANES * LANES
    for channel in range(0, whole, LANES):
        numbers = multiply(decode_e4m3(load_i8(q_addr + channel)), scale)
        store(element, out_addr + channel * element_bytes, numbers, past_caches)
    if whole < count:
        numbers = multiply(decode_e4m3(load_part_i8(q_addr + whole, count - whole)), scale)
        store_part(element, out_addr + whole * element_bytes, numbers, count - whole)


@compiled("void(int64, int64, int64, int64, int64, int64, int64)")
def dequantise(
    q_addr: int,
    scales_addr: int,
    scale_format: int,
    num_rows: int,
    hidden: int,
    out_addr: int,
    element: int,
) -> None:
    element_bytes = 4 if element == 2 else 2
    num_groups = (hidden + CHANNELS_PER_SCALE - 1) // CHANNELS_PER_SCALE
    scale_bytes = (num_groups + 3) // 4 * 4 if scale_format == _UE8M0 else 4 * num_groups
    past_caches = int((out_addr | (hidden * element_bytes)) % 64 == 0)
    for row in range(num_rows):
        for group in range(num_groups):
            scale = broadcast_f32(load_scale(scales_addr + row * scale_bytes, group, scale_format))
            begin = group * CHANNELS_PER_SCALE
            q = q_addr + row * hidden + begin
            out = out_addr + (row * hidden + begin) * element_bytes
            dequantise_group(q, min(CHANNELS_PER_SCALE, hidden - begin), scale, out, element, past_caches)
