"""FP8 E4M3 rows and their scales to BF16, FP16 or FP32. Legend: kernels/gpu/encode.py."""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels.gpu.codec import CHANNELS, NAN, UE8M0, decode_e4m3, store_numbers
from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.memory import bytes_at, i32_at, start_of


@triton.jit
def load_scales(address, group, inside, SCALES: tl.constexpr):
    """Return the fp32 scales of groups; a byte 0 is 2 ** -127, 0xff is NaN."""
    if SCALES == UE8M0:
        exponent = tl.load(bytes_at(address) + group, mask=inside, other=0).to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        return tl.where(exponent == 0xFF, NAN, bits).to(tl.float32, bitcast=True)
    return tl.load(i32_at(address) + group, mask=inside, other=0).to(tl.float32, bitcast=True)


@triton.jit
def dequantise_piece(
    q_addr,
    scales_addr,
    left,
    num_groups,
    out_addr,
    ELEMENT: tl.constexpr,
    SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group = tl.arange(0, GROUPS)
    channel = group[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    if ALIGNED:
        left = left // 16 * 16
    inside = channel < left
    codes = tl.load(start_of(q_addr, tl.uint8, ALIGNED) + channel, mask=inside, other=0)
    scale = load_scales(scales_addr, group, group < num_groups, SCALES)
    store_numbers(out_addr, channel, decode_e4m3(codes, NATIVE) * scale[:, None], inside, ELEMENT, ALIGNED)


@kernel
def dequantise(
    q_addr: tl.int64,
    scales_addr: tl.int64,
    hidden: tl.int64,
    out_addr: tl.int64,
    ELEMENT: tl.constexpr,
    SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Grid (rows, pieces of GROUPS groups)."""
    row = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1).to(tl.int64) * GROUPS
    first = row * hidden + first_group * CHANNELS
    num_groups = (hidden + CHANNELS - 1) // CHANNELS
    if SCALES == UE8M0:
        scales = scales_addr + row * ((num_groups + 3) // 4 * 4) + first_group
    else:
        scales = scales_addr + (row * num_groups + first_group) * 4
    out = out_addr + first * (4 if ELEMENT == 2 else 2)
    left = hidden - first_group * CHANNELS
    groups_left = num_groups - first_group
    if ((q_addr | hidden | out_addr) & 15) == 0:
        dequantise_piece(q_addr + first, scales, left, groups_left, out, ELEMENT, SCALES, NATIVE, True, GROUPS)
    else:
        dequantise_piece(q_addr + first, scales, left, groups_left, out, ELEMENT, SCALES, NATIVE, False, GROUPS)
