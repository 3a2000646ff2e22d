"""LogFMT-10 in 32 lanes: BF16 to codes, codes to fp32, and what a header says. Bit for bit what numerics/ defines."""

from __future__ import annotations

import numpy as np
import torch

from anyep.machine.compiler import inlined
from anyep.machine.intrinsics import float_as_bits, store_i32
from anyep.machine.vectors import F32, I8, I16, I32, Lanes, lane_function
from anyep.numerics.logfmt import (
    BORDER,
    EXP2_COEFFICIENTS,
    LOG2_COEFFICIENTS,
    MAX_CODE,
    MAX_RANGE,
    NEAREST,
    STEPS,
    WHOLE,
    WHOLE_BITS,
    log2_of,
)

QUARTER = 32
"""Codes of a group that are decoded together; the bits of a quarter lie at the same place in all its bytes."""
_LOG2_OF_MANTISSA = log2_of(torch.arange(128, dtype=torch.float32, device="cpu") / 128).numpy()
"""BF16 has 128 mantissas; a header's two logarithms come from here, 32 channels' at a time from the polynomial."""
_MAX_RANGE, _STEPS, _BORDER = np.float32(MAX_RANGE), np.float32(STEPS), np.float32(BORDER)
_WHOLE, _NEAREST, _ONE = np.float32(WHOLE), np.float32(NEAREST), np.float32(1)
_MANTISSA = 0x7FFFFF
_ONE_BITS = 0x3F800000


def _polynomial(x: Lanes, coefficients: tuple[float, ...]) -> Lanes:
    value = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        value = value * x + coefficient
    return value


@lane_function(I16, I16)
def magnitude_less_one(x: Lanes) -> Lanes:
    """|x| of BF16 as bits, less 1: 0xffff for zeros, which are no candidates for the smallest."""
    return (x & 0x7FFF) + 0xFFFF


@lane_function(I16, I16, I16)
def smaller_16(x: Lanes, y: Lanes) -> Lanes:
    return x.at_most(y)


@lane_function(I32, I16)
def widen_bits(x: Lanes) -> Lanes:
    return x.widen()


@lane_function(I32, I16, F32, F32, F32, F32)
def encode_log(x: Lanes, per_one: Lanes, origin: Lanes, zero_border: Lanes, first_exponent: Lanes) -> Lanes:
    """10 bits of a BF16 number: the code, and the sign above it. ``first_exponent`` is that of amax, plus 2 ** 23."""
    bits = x.widen()
    size = (bits & 0x7FFF) << 16
    fraction = ((size & _MANTISSA) | _ONE_BITS).as_float() - 1.0
    exponent = ((size >> 23) | WHOLE_BITS).as_float() - first_exponent
    log = _polynomial(fraction, LOG2_COEFFICIENTS) * fraction + exponent
    count = (log * per_one + origin + WHOLE).bits()
    code = count.at_least(WHOLE_BITS + 1) & MAX_CODE
    return (log < zero_border).choose(0, code) | ((bits & 0x8000) >> 6)


@lane_function(I8, I32)
def low_byte(codes: Lanes) -> Lanes:
    return codes.narrow(I8)


@lane_function(I8, I32, I32, I32, I32)
def high_bits(quarter0: Lanes, quarter1: Lanes, quarter2: Lanes, quarter3: Lanes) -> Lanes:
    pairs = (quarter0 >> 8) | ((quarter1 >> 8) << 2) | ((quarter2 >> 8) << 4) | ((quarter3 >> 8) << 6)
    return pairs.narrow(I8)


@lane_function(F32, I8, I8, I32, F32, F32, F32)
def decode_log(
    low_bytes: Lanes, high_bytes: Lanes, shift: Lanes, step: Lanes, log_zero: Lanes, nearest: Lanes
) -> Lanes:
    """The numbers of a quarter. ``shift`` brings its two bits of the high bytes to bits 8 and 9.

    ``nearest`` is 1.5 * 2 ** 23 and the exponent of the power of two below amax.
    """
    high = high_bytes.widen() << shift
    code = low_bytes.widen() | (high & 0x100)
    power = code.as_number() * step + log_zero
    shifted = power + nearest
    mantissa = _polynomial(power - (shifted - nearest), EXP2_COEFFICIENTS)
    magnitude = mantissa.bits() + (shifted.bits() << 23)
    return ((code < 1).choose(0, magnitude) | ((high << 22) & 0x80000000)).as_float()


@inlined
def log_max_of(amax: int) -> np.float32:
    return _LOG2_OF_MANTISSA[amax & 0x7F]


@inlined
def log_min_of(amax: int, amin: int) -> np.float32:
    """Return the logarithm of code 1, relative to the power of two below amax, from BF16 bits."""
    log_min = _LOG2_OF_MANTISSA[amin & 0x7F] + np.float32((amin >> 7) - (amax >> 7))
    return max(log_min, log_max_of(amax) - _MAX_RANGE)


@inlined
def write_encoding(header: int, scale_addr: int) -> None:
    """Write what :func:`encode_log` needs of a coded group's header, in its order, to fp32 [4]."""
    amax = header & 0xFFFF
    log_min = log_min_of(amax, header >> 16)
    log_range = log_max_of(amax) - log_min
    per_one = _STEPS / log_range
    store_i32(scale_addr, 0, float_as_bits(per_one))
    store_i32(scale_addr, 1, float_as_bits((_ONE - log_range / _STEPS * _BORDER) - log_min * per_one))
    store_i32(scale_addr, 2, float_as_bits(log_min - _ONE))
    store_i32(scale_addr, 3, float_as_bits(np.float32(amax >> 7) + _WHOLE))


@inlined
def write_decoding(header: int, scale_addr: int) -> None:
    """Write what :func:`decode_log` needs of a header, in its order, to fp32 [3]; a raw group's third number is 0."""
    if header == 0:
        store_i32(scale_addr, 2, 0)
        return
    amax = header & 0xFFFF
    log_min = log_min_of(amax, header >> 16)
    step = (log_max_of(amax) - log_min) / _STEPS
    store_i32(scale_addr, 0, float_as_bits(step))
    store_i32(scale_addr, 1, float_as_bits(log_min - step))
    store_i32(scale_addr, 2, float_as_bits(np.float32((amax >> 7) - 127) + _NEAREST))
