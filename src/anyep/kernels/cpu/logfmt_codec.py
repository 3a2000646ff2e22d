"""LogFMT-10 in 32 lanes: BF16 to codes, codes to fp32, and what a header says. Bit for bit what numerics/ defines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from anyep.machine.compiler import inlined
from anyep.machine.intrinsics import bits_as_float
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
_LOG2_OF_MANTISSA = log2_of(torch.arange(128, dtype=torch.float32) / 128).numpy()
"""BF16 has 128 mantissas; a header's two logarithms come from here, 32 channels' at a time from the polynomial."""
_MAX_RANGE, _STEPS, _ONE, _BORDER = (np.float32(number) for number in (MAX_RANGE, STEPS, 1.0, BORDER))
_MANTISSA = 0x7FFFFF
_ONE_BITS = 0x3F800000


def _polynomial(x: Lanes, coefficients: tuple[float, ...]) -> Lanes:
    value = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        value = value * x + coefficient
    return value


def _power_of_two(power: Lanes) -> Lanes:
    shifted = power + NEAREST
    mantissa = _polynomial(power - (shifted - NEAREST), EXP2_COEFFICIENTS)
    return (mantissa.bits() + (shifted.bits() << 23)).as_float()


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


@lane_function(F32, F32, F32)
def half_of_least(log_min: Lanes, unit: Lanes) -> Lanes:
    """Half of the value of code 1: smaller magnitudes become zeros."""
    return _power_of_two(log_min) * unit * 0.5


@lane_function(I32, I16, F32, F32, F32, F32, F32)
def encode_log(
    x: Lanes, log_min: Lanes, steps_per_one: Lanes, offset: Lanes, first_exponent: Lanes, half_least: Lanes
) -> Lanes:
    """10 bits of a BF16 number: the code, and the sign above it. ``first_exponent`` is that of amax, plus 2 ** 23."""
    size = (x & 0x7FFF).widen() << 16
    fraction = ((size & _MANTISSA) | _ONE_BITS).as_float() - 1.0
    exponent = ((size >> 23) | WHOLE_BITS).as_float() - first_exponent
    log = _polynomial(fraction, LOG2_COEFFICIENTS) * fraction + exponent
    count = ((log - log_min) * steps_per_one + offset + WHOLE).bits()
    code = count.at_least(WHOLE_BITS + 1) & MAX_CODE
    return (size < half_least.bits()).choose(0, code) | ((x.widen() >> 15) << 9)


@lane_function(I8, I32)
def low_byte(codes: Lanes) -> Lanes:
    return codes.narrow(I8)


@lane_function(I8, I32, I32, I32, I32)
def high_bits(quarter0: Lanes, quarter1: Lanes, quarter2: Lanes, quarter3: Lanes) -> Lanes:
    pairs = (quarter0 >> 8) | ((quarter1 >> 8) << 2) | ((quarter2 >> 8) << 4) | ((quarter3 >> 8) << 6)
    return pairs.narrow(I8)


def _joiner(quarter: int) -> Callable[..., Any]:
    @lane_function(I32, I8, I8)
    def join(low: Lanes, high: Lanes) -> Lanes:
        return low.widen() | (((high.widen() >> (2 * quarter)) & 3) << 8)

    return join


_join0, _join1, _join2, _join3 = (_joiner(quarter) for quarter in range(4))


@inlined
def join(quarter: int, low: Any, high: Any) -> Any:
    """Return the 10 bits of the codes of a quarter; shifts by constants, which every processor has."""
    if quarter == 0:
        return _join0(low, high)
    if quarter == 1:
        return _join1(low, high)
    if quarter == 2:
        return _join2(low, high)
    return _join3(low, high)


@lane_function(F32, I32, F32, F32, F32)
def decode_log(bits: Lanes, step: Lanes, log_min: Lanes, unit: Lanes) -> Lanes:
    """The numbers of 10 bits each."""
    code = bits & MAX_CODE
    power = ((code | WHOLE_BITS).as_float() - (WHOLE + 1.0)) * step + log_min
    magnitude = (_power_of_two(power) * unit).bits()
    return ((code < 1).choose(0, magnitude) | ((bits & 0x200) << 22)).as_float()


@inlined
def log_min_of(amax: int, amin: int) -> np.float32:
    """Return the logarithm of code 1, relative to the power of two below amax, from BF16 bits."""
    log_min = _LOG2_OF_MANTISSA[amin & 0x7F] + np.float32((amin >> 7) - (amax >> 7))
    return max(log_min, _LOG2_OF_MANTISSA[amax & 0x7F] - _MAX_RANGE)


@inlined
def log_range_of(amax: int, log_min: np.float32) -> np.float32:
    return _LOG2_OF_MANTISSA[amax & 0x7F] - log_min


@inlined
def step_of(log_range: np.float32) -> np.float32:
    return log_range / _STEPS


@inlined
def steps_per_one_of(log_range: np.float32) -> np.float32:
    return _STEPS / log_range


@inlined
def offset_of(step: np.float32) -> np.float32:
    """Return what brings the border between two codes to a half: rounding to whole numbers finds the nearest value."""
    return _ONE - step * _BORDER


@inlined
def unit_of(amax: int) -> np.float32:
    """Return the power of two below amax."""
    return bits_as_float((amax >> 7) << 23)
