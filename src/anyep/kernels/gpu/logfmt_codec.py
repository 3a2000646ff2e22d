"""LogFMT-10 as device functions: BF16 to codes, codes to fp32, and what a header says. numerics/logfmt.py defines it.

Groups lie as [GROUPS, 4, 32]: quarters of 32 channels, whose high bits share bytes.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.numerics.logfmt import (
    BORDER,
    CODE_BYTES,
    EXP2_COEFFICIENTS,
    LOG2_COEFFICIENTS,
    MAX_CODE,
    MAX_RANGE,
    NEAREST,
    RAW_BYTES,
    STEPS,
    WHOLE,
    WHOLE_BITS,
)

LOG2_0, LOG2_1, LOG2_2, LOG2_3, LOG2_4, LOG2_5, LOG2_6 = (tl.constexpr(one) for one in LOG2_COEFFICIENTS)
EXP2_0, EXP2_1, EXP2_2, EXP2_3, EXP2_4, EXP2_5 = (tl.constexpr(one) for one in EXP2_COEFFICIENTS)
_BORDER, _MAX_RANGE, _NEAREST = tl.constexpr(BORDER), tl.constexpr(MAX_RANGE), tl.constexpr(NEAREST)
_STEPS, _WHOLE, _WHOLE_BITS = tl.constexpr(STEPS), tl.constexpr(WHOLE), tl.constexpr(WHOLE_BITS)
_MAX_CODE = tl.constexpr(MAX_CODE)
CODES = tl.constexpr(CODE_BYTES)
"""Bytes of a coded group."""
RAW = tl.constexpr(RAW_BYTES)
"""Bytes of a raw group."""
RAW_IN_CODES = tl.constexpr(CODE_BYTES // 2)
"""Channels of a raw group that lie where the codes of a coded one do."""
HARMLESS = tl.constexpr(0x3E803F00)
"""A header whose logarithms differ: stands in for those of raw groups, of which nothing is used."""


@triton.jit
def log2_of(fraction):
    """Return log2(1 + fraction), every product and sum rounded."""
    value = fraction * LOG2_6 + LOG2_5
    value = value * fraction + LOG2_4
    value = value * fraction + LOG2_3
    value = value * fraction + LOG2_2
    value = value * fraction + LOG2_1
    return (value * fraction + LOG2_0) * fraction


@triton.jit
def exp2_of(fraction):
    value = fraction * EXP2_5 + EXP2_4
    value = value * fraction + EXP2_3
    value = value * fraction + EXP2_2
    value = value * fraction + EXP2_1
    return value * fraction + EXP2_0


@triton.jit
def range_of(header):
    """Return the logarithm of code 1, how far it is to the largest, and the exponent of amax."""
    known = tl.where(header == 0, HARMLESS, header)
    amax, amin = known & 0xFFFF, known >> 16
    exponent = amax >> 7
    log_max = log2_of((amax & 0x7F).to(tl.float32) * 0.0078125)
    log_min = log2_of((amin & 0x7F).to(tl.float32) * 0.0078125) + ((amin >> 7) - exponent).to(tl.float32)
    least = log_max - _MAX_RANGE
    log_min = tl.where(log_min > least, log_min, least)
    return log_min, log_max - log_min, exponent


@triton.jit
def encode_log(bits, header):
    """Return the 10 bits of BF16 numbers [G, 4, 32] given as int32 bits, by their groups' headers [G]."""
    log_min, log_range, exponent = range_of(header)
    steps = tl.full(log_range.shape, _STEPS, tl.float32)
    per_one = tl.div_rn(steps, log_range)
    origin = (1.0 - tl.div_rn(log_range, steps) * _BORDER) - log_min * per_one
    size = bits & 0x7FFF
    log = log2_of((size & 0x7F).to(tl.float32) * 0.0078125)
    log = log + ((size >> 7) - exponent[:, None, None]).to(tl.float32)
    count = (log * per_one[:, None, None] + origin[:, None, None] + _WHOLE).to(tl.int32, bitcast=True)
    code = tl.where(count > _WHOLE_BITS + 1, count, _WHOLE_BITS + 1) & _MAX_CODE
    code = tl.where(log < (log_min - 1.0)[:, None, None], 0, code)
    return code | ((bits >> 15) & 1) << 9


@triton.jit
def decode_log(codes, header):
    """Return the fp32 numbers of 10-bit codes [G, 4, 32]."""
    log_min, log_range, exponent = range_of(header)
    step = tl.div_rn(log_range, tl.full(log_range.shape, _STEPS, tl.float32))
    size = codes & _MAX_CODE
    power = size.to(tl.float32) * step[:, None, None] + (log_min - step)[:, None, None]
    nearest = ((exponent - 127).to(tl.float32) + _NEAREST)[:, None, None]
    shifted = power + nearest
    mantissa = exp2_of(power - (shifted - nearest)).to(tl.int32, bitcast=True)
    magnitude = tl.where(size == 0, 0, mantissa + (shifted.to(tl.int32, bitcast=True) << 23))
    return (magnitude | (codes >> 9) << 31).to(tl.float32, bitcast=True)


@triton.jit
def header_bytes_of(num_groups):
    return (num_groups * 4 + 63) // 64 * 64
