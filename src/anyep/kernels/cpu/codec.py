"""Numbers in 32 lanes: storage types to fp32 and back, FP8 E4M3 in and out. Bit for bit what numerics/ defines.

Rounding is to nearest even; every NaN result is the canonical one. Nothing here depends on the processor's own
conversions, which flush subnormals (AVX-512 BF16) or keep a NaN's payload (F16C).
"""

from __future__ import annotations

from typing import Any

from anyep.kernels.spec import Element
from anyep.machine.compiler import inlined
from anyep.machine.intrinsics import LINE, bits_as_float, load_i32, prefetch
from anyep.machine.vectors import (
    F32,
    I8,
    I16,
    I32,
    Lanes,
    broadcast,
    lane_function,
    vector_loader,
    vector_part_loader,
    vector_part_storer,
    vector_storer,
)

BF16, FP16, FP32 = (int(element) for element in Element)

_MAGNITUDE = 0x7FFFFFFF
_INF = 0x7F800000
_F32_BIAS = 127


def _exponent(power: int) -> int:
    """Return the bits of the fp32 number 2 ** power."""
    return (_F32_BIAS + power) << 23


@lane_function(F32, I16)
def widen_bf16(x: Lanes) -> Lanes:
    return (x.widen() << 16).as_float()


@lane_function(I16, F32)
def round_bf16(x: Lanes) -> Lanes:
    bits = x.bits()
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    return x.is_nan().choose(0x7FC0, rounded).narrow(I16)


@lane_function(F32, I16)
def widen_fp16(x: Lanes) -> Lanes:
    bits = x.widen()
    magnitude = (bits & 0x7FFF) << 13
    normal = magnitude + (112 << 23)
    subnormal = ((magnitude + _exponent(-14)).as_float() - 2.0**-14).bits()
    endless = magnitude + (224 << 23)
    finite = (magnitude < (1 << 23)).choose(subnormal, normal)
    return ((magnitude > (0x7BFF << 13)).choose(endless, finite) | ((bits & 0x8000) << 16)).as_float()


@lane_function(I16, F32)
def round_fp16(x: Lanes) -> Lanes:
    bits = x.bits()
    magnitude = (bits & _MAGNITUDE).at_most(_exponent(16))  # 65536 and more round to Inf
    normal = (magnitude + ((magnitude >> 13) & 1) + 0xFFF - (112 << 23)) >> 13
    subnormal = (magnitude.as_float() + 0.5).bits() - _exponent(-1)  # the last bit of 0.5 is 2 ** -24, fp16's smallest
    rounded = (magnitude < _exponent(-14)).choose(subnormal, normal) | ((bits >> 16) & 0x8000)
    return x.is_nan().choose(0x7E00, rounded).narrow(I16)


@lane_function(F32, I32)
def widen_fp32(x: Lanes) -> Lanes:
    return x.as_float()


@lane_function(I32, F32)
def round_fp32(x: Lanes) -> Lanes:
    return x.is_nan().choose(0x7FC00000, x.bits())


@lane_function(F32, F32, F32)
def add(x: Lanes, y: Lanes) -> Lanes:
    return x + y


@lane_function(F32, F32, F32)
def multiply(x: Lanes, y: Lanes) -> Lanes:
    return x * y


@lane_function(I32, F32)
def magnitude(x: Lanes) -> Lanes:
    """|x| as bits, which order like the numbers; NaN is above Inf."""
    return x.bits() & _MAGNITUDE


@lane_function(I32, I32, I32)
def larger(x: Lanes, y: Lanes) -> Lanes:
    return x.at_least(y)


@lane_function(I16, I16)
def magnitude_16(x: Lanes) -> Lanes:
    """|x| of bf16 or fp16 as bits."""
    return x & 0x7FFF


@lane_function(I16, I16, I16)
def larger_16(x: Lanes, y: Lanes) -> Lanes:
    return x.at_least(y)


@lane_function(I8, F32, F32)
def encode_e4m3(x: Lanes, factor: Lanes) -> Lanes:
    """FP8 of ``x * factor``, which must be at most 464 (what rounds to 448): no clamping here.

    Adding M = 2 ** (e + 20) to a number of exponent e >= -6 rounds it to a multiple of E4M3's ulp there, 2 ** (e - 3),
    and the low bits of the sum count the ulps: 8 to 16, or 0 to 8 at e = -6, subnormals included. The code is
    8 * (e + 6) + count. Only its low 8 bits are kept, so that M's own exponent serves as 8 * e: (M >> 20) is
    8 * e + 1176, which is 104 too much modulo 256, and M carries 152 = -104 more ulps to make up for it (an even
    number: ties stay ties to even).
    """
    y = (x * factor).bits()
    code = _code_of((y & _MAGNITUDE).as_float())
    return (code | ((y >> 24) & 0x80)).narrow(I8)


def _code_of(size: Lanes) -> Lanes:
    """The code of numbers that are not negative, in the low 8 bits of each lane; above them lies anything."""
    m = (size.bits().at_least(_exponent(-6)) & _INF) + ((20 << 23) + 152)
    return (size + m.as_float()).bits() + (m >> 20)


@lane_function(I8, I16, F32)
def encode_bf16(x: Lanes, factor: Lanes) -> Lanes:
    """The same from the bits of bf16 numbers, a third faster: signs are moved, and codes packed, 32 at a time.

    A bf16 number is the upper half of an fp32 one: of two neighbours in 32 bits the one is shifted up, the other there.
    """
    pairs = (x & 0x7FFF).pairs()
    first, second = (half.as_float() * factor.first_half() for half in (pairs << 16, pairs & 0x7FFF0000))
    codes = ((_code_of(first) & 0xFFFF) | (_code_of(second) << 16)).unpaired()
    return (codes | ((x >> 8) & 0x80)).narrow(I8)


@lane_function(I8, F32)
def encode_beside_infinity(x: Lanes) -> Lanes:
    """FP8 of x * 0 where a group holds Inf and no NaN: finite numbers are zeros of their sign, Inf is NaN."""
    bits = x.bits()
    zero = (bits >> 24) & 0x80
    return ((bits & _MAGNITUDE) > (_INF - 1)).choose(0x7F, zero).narrow(I8)


@lane_function(F32, I8)
def decode_e4m3(codes: Lanes) -> Lanes:
    bits = codes.widen()
    magnitude = (bits & 0x7F) << 20
    normal = magnitude + (120 << 23)
    subnormal = ((magnitude + _exponent(-6)).as_float() - 2.0**-6).bits()
    finite = (magnitude < (1 << 23)).choose(subnormal, normal)
    return ((magnitude > (0x7E << 20)).choose(0x7FC00000, finite) | ((bits & 0x80) << 24)).as_float()


load_lanes_i8, load_part_i8 = vector_loader(I8), vector_part_loader(I8)
load_lanes_i16, load_part_i16 = vector_loader(I16), vector_part_loader(I16)
load_lanes_i32, load_part_i32 = vector_loader(I32), vector_part_loader(I32)
store_lanes_i8, store_part_i8 = vector_storer(I8), vector_part_storer(I8)
store_lanes_i16, store_part_i16 = vector_storer(I16), vector_part_storer(I16)
store_lanes_i32, store_part_i32 = vector_storer(I32), vector_part_storer(I32)
stream_lanes_i16 = vector_storer(I16, nontemporal=True)
stream_lanes_i32 = vector_storer(I32, nontemporal=True)


@inlined
def bytes_of(element: int) -> int:
    return 4 if element == FP32 else 2


@inlined
def prefetch_lanes(element: int, address: int) -> None:
    """Ask for 32 numbers: the processor's own prefetcher stops at each page."""
    prefetch(address)
    if element == FP32:
        prefetch(address + LINE)


@inlined
def load(element: int, address: int) -> Any:
    """Return 32 numbers as fp32."""
    if element == BF16:
        return widen_bf16(load_lanes_i16(address))
    if element == FP16:
        return widen_fp16(load_lanes_i16(address))
    return widen_fp32(load_lanes_i32(address))


@inlined
def load_part(element: int, address: int, count: int) -> Any:
    """Return ``count`` < 32 numbers as fp32, and zeros."""
    if element == BF16:
        return widen_bf16(load_part_i16(address, count))
    if element == FP16:
        return widen_fp16(load_part_i16(address, count))
    return widen_fp32(load_part_i32(address, count))


@inlined
def load_number(base: int, index: int) -> Any:
    """Return one fp32 number in every lane."""
    return broadcast(bits_as_float(load_i32(base, index)))


@inlined
def store(element: int, address: int, x: Any, past_caches: int) -> None:
    """Round 32 numbers and write them; past the caches only where the address is a multiple of 64."""
    if element == FP32:
        if past_caches:
            stream_lanes_i32(address, round_fp32(x))
        else:
            store_lanes_i32(address, round_fp32(x))
        return
    rounded = round_bf16(x) if element == BF16 else round_fp16(x)
    if past_caches:
        stream_lanes_i16(address, rounded)
    else:
        store_lanes_i16(address, rounded)


@inlined
def store_part(element: int, address: int, x: Any, count: int) -> None:
    """Round and write the first ``count`` < 32 numbers."""
    if element == FP32:
        store_part_i32(address, round_fp32(x), count)
    elif element == BF16:
        store_part_i16(address, round_bf16(x), count)
    else:
        store_part_i16(address, round_fp16(x), count)
