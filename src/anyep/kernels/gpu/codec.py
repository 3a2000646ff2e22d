"""Numbers as device functions see them: loaded as fp32, rounded once, every NaN canonical; FP8 E4M3 both ways.

FP8 has two ways: the device's own conversion, or arithmetic on bits where the device has none for E4M3 with NaN and
without Inf (CDNA 3 converts to another FP8). Both give the same bits.

Legend: ELEMENT 0 BF16, 1 FP16, 2 FP32 (:class:`~anyep.numerics.formats.Element`).
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels.gpu.memory import start_of
from anyep.numerics.formats import CHANNELS_PER_SCALE, Element, ScaleFormat
from anyep.numerics.scales import E4M3_MAX, MIN_AMAX

BF16 = tl.constexpr(int(Element.BF16))
FP16 = tl.constexpr(int(Element.FP16))
FP32_SCALES = tl.constexpr(int(ScaleFormat.FP32))
UE8M0 = tl.constexpr(int(ScaleFormat.UE8M0))
CHANNELS = tl.constexpr(CHANNELS_PER_SCALE)
LARGEST = tl.constexpr(E4M3_MAX)
LEAST_AMAX = tl.constexpr(MIN_AMAX)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
MANTISSA = tl.constexpr(0x7FFFFF)
INF = tl.constexpr(0x7F800000)
SIGN = tl.constexpr(-0x80000000)
NAN = tl.constexpr(0x7FC00000)


@triton.jit
def nothing(SHAPE: tl.constexpr):
    """Return fp32 -0, which changes no number when added, zeros of both signs too.

    From its bits: Triton 3.6 takes -0.0 for 0.0.
    """
    return tl.full(SHAPE, SIGN, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def load_numbers(address, channel, inside, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return fp32 numbers; 0 where ``inside`` is false."""
    if ELEMENT == BF16:
        numbers = tl.load(start_of(address, tl.bfloat16, ALIGNED) + channel, mask=inside, other=0.0)
    elif ELEMENT == FP16:
        numbers = tl.load(start_of(address, tl.float16, ALIGNED) + channel, mask=inside, other=0.0)
    else:
        numbers = tl.load(start_of(address, tl.float32, ALIGNED) + channel, mask=inside, other=0.0)
    return numbers.to(tl.float32)


@triton.jit
def store_numbers(address, channel, x, inside, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Round fp32 numbers to nearest even and write them; NaN is canonical."""
    if ELEMENT == BF16:
        bits = tl.where(x != x, 0x7FC0, x.to(tl.bfloat16).to(tl.int16, bitcast=True)).to(tl.int16)
        tl.store(start_of(address, tl.int16, ALIGNED) + channel, bits, mask=inside)
    elif ELEMENT == FP16:
        bits = tl.where(x != x, 0x7E00, x.to(tl.float16).to(tl.int16, bitcast=True)).to(tl.int16)
        tl.store(start_of(address, tl.int16, ALIGNED) + channel, bits, mask=inside)
    else:
        bits = tl.where(x != x, NAN, x.to(tl.int32, bitcast=True))
        tl.store(start_of(address, tl.int32, ALIGNED) + channel, bits, mask=inside)


@triton.jit
def encode_e4m3(x, NATIVE: tl.constexpr):
    """Return the codes (uint8) of fp32 numbers of magnitude at most 464, or NaN.

    By arithmetic: adding M = 2 ** (e + 20) to a number of exponent e >= -6 rounds it to a multiple of E4M3's ulp there,
    and the low bits of the sum count the ulps. kernels/cpu/codec.py says why M carries 152 more of them.
    """
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    size = bits & MAGNITUDE
    least = 121 << 23  # 2 ** -6
    unit = (tl.where(size > least, size, least) & INF) + ((20 << 23) + 152)
    rounded = size.to(tl.float32, bitcast=True) + unit.to(tl.float32, bitcast=True)
    code = ((rounded.to(tl.int32, bitcast=True) + (unit >> 20)) & 0x7F) | ((bits >> 24) & 0x80)
    return tl.where(size > INF, 0x7F, code).to(tl.uint8)


@triton.jit
def decode_e4m3(codes, NATIVE: tl.constexpr):
    """Return the fp32 numbers of codes (uint8); 0x7f and 0xff are NaN."""
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    bits = codes.to(tl.int32)
    size = (bits & 0x7F) << 20
    normal = size + (120 << 23)
    subnormal = (size + (121 << 23)).to(tl.float32, bitcast=True) - 0.015625
    finite = tl.where(size < (1 << 23), subnormal.to(tl.int32, bitcast=True), normal)
    magnitude = tl.where(size > (0x7E << 20), NAN, finite)
    return (magnitude | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(amax, SCALES: tl.constexpr):
    """Return the fp32 scale of groups whose largest magnitude, at least 1e-4, has the bits ``amax``, as bits."""
    ratio = tl.div_rn(amax.to(tl.float32, bitcast=True), tl.full(amax.shape, LARGEST, tl.float32)).to(
        tl.int32, bitcast=True
    )
    if SCALES != FP32_SCALES:
        ratio = (ratio + MANTISSA) & INF
    return tl.where(amax > INF, NAN, tl.where(amax == INF, INF, ratio))


@triton.jit
def factor_of(amax, scale, SCALES: tl.constexpr):
    """Return the fp32 factor that brings a group to at most 448."""
    if SCALES == FP32_SCALES:
        return tl.div_rn(tl.full(amax.shape, LARGEST, tl.float32), amax.to(tl.float32, bitcast=True))
    return tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale.to(tl.float32, bitcast=True))
