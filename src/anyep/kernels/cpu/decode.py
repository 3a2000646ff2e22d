"""FP8 E4M3 rows and their scales to BF16, FP16 or FP32."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyep.kernels.cpu.codec import (
    bytes_of,
    decode_e4m3,
    load_lanes_i8,
    load_part_i8,
    multiply,
    store,
    store_part,
)
from anyep.kernels.cpu.scales import UE8M0, groups_of, row_bytes_of
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import LINE, bits_as_float, load_i8, load_i32, prefetch
from anyep.machine.vectors import LANES, broadcast
from anyep.numerics.formats import CHANNELS_PER_SCALE

_NAN = 0x7FC00000
_SMALLEST = 1 << 22
"""Bits of 2 ** -127, a subnormal number: what exponent 0 means in UE8M0."""
_AHEAD = 2048


@inlined
def load_scale(scale_format: int, scales_addr: int, group: int) -> np.float32:
    if scale_format != UE8M0:
        return bits_as_float(load_i32(scales_addr, group))
    exponent = load_i8(scales_addr, group) & 0xFF
    if exponent == 0xFF:
        return bits_as_float(_NAN)
    return bits_as_float(exponent << 23 if exponent > 0 else _SMALLEST)


@inlined
def decode_group(q_addr: int, count: int, scale: Any, element: int, out_addr: int, past_caches: int) -> None:
    """out = round(fp32(q) * scale) for up to 128 codes; ``scale`` stands in every lane."""
    whole = count // LANES * LANES
    for channel in range(0, whole, LANES):
        numbers = multiply(decode_e4m3(load_lanes_i8(q_addr + channel)), scale)
        store(element, out_addr + channel * bytes_of(element), numbers, past_caches)
    if whole < count:
        numbers = multiply(decode_e4m3(load_part_i8(q_addr + whole, count - whole)), scale)
        store_part(element, out_addr + whole * bytes_of(element), numbers, count - whole)


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
    num_groups = groups_of(hidden)
    scale_bytes = row_bytes_of(scale_format, hidden)
    past_caches = int((out_addr | (hidden * bytes_of(element))) % LINE == 0)
    for row in range(num_rows):
        for group in range(num_groups):
            scale = broadcast(load_scale(scale_format, scales_addr + row * scale_bytes, group))
            channel = group * CHANNELS_PER_SCALE
            q = q_addr + row * hidden + channel
            prefetch(q + _AHEAD)
            prefetch(q + _AHEAD + LINE)
            out = out_addr + (row * hidden + channel) * bytes_of(element)
            decode_group(q, min(CHANNELS_PER_SCALE, hidden - channel), scale, element, out, past_caches)
