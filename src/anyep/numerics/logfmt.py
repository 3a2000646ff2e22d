"""LogFMT-10: BF16 rows as a sign and a 9-bit logarithm a channel, the definition of every bit, in torch.

The format that DeepEP's low-latency combine sends (``use_logfmt``), for outputs of experts: 10 bits a channel instead
of 16. 128 channels are a group; the last one of a row is filled up with zeros. A group whose largest magnitude is amax
and whose smallest one other than 0 is amin is *coded* where 2 ** -90 <= amax < 1 and amin < amax. All others, those
with Inf or NaN or nothing but zeros among them, travel *raw*, as the BF16 that they are.

Code 0 is 0; code c = 1 ... 511 is the magnitude exp2((c - 1) * step + log_min), with log_max = log2(amax), log_min =
max(log2(amin), log_max - 32) and step = (log_max - log_min) / 510. Each magnitude takes the code whose value is nearest
to it, not the one whose logarithm is: the border between codes c and c + 1, log2 of the mean of their values, lies
log2((1 + 2 ** step) / 2) / step = 0.5 + step * ln(2) / 8 above c, up to terms of step ** 3 (4e-7 at the most). What is
below half of the least value, zeros and subnormal numbers always, becomes a 0 of its sign: 2 ** -90 keeps the least
value far above them.

Logarithms count from the power of two below amax, so that they are small where step is small. log2 and exp2 are
polynomials of fp32 products and sums, each rounded, in the order that stands here: the same bits on every processor.
Their errors, 4e-7 and 2e-7, are 7 % of half of the smallest step that BF16 numbers can have (1.1e-5).

Legend: N rows, H hidden, G groups (ceil(H / 128)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anyep.numerics.formats import CHANNELS_PER_SCALE, num_scale_groups

CHANNELS = CHANNELS_PER_SCALE
"""Channels of a group."""
LOG2_COEFFICIENTS = (
    *(1.442667841911316, -0.7205854654312134, 0.4735533893108368, -0.32590192556381226),
    *(0.19429424405097961, -0.07955766469240189, 0.015529897063970566),
)
"""log2(1 + f) = f * (c[0] + f * (c[1] + ...)) for 0 <= f < 1: least largest error, fitted here."""
EXP2_COEFFICIENTS = (
    *(1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341),
    *(0.009671512991189957, 0.001326472731307149),
)
"""2 ** f = c[0] + f * (c[1] + ...) for |f| <= 1/2: least largest relative error with 2 ** 0 = 1."""
MAX_CODE = 511
STEPS = 510.0
MAX_RANGE = 32.0
"""What log_max - log_min is cut to."""
BORDER = 0.08664339780807495
"""ln(2) / 8"""
LEAST_AMAX_BITS = (127 - 90) << 7
"""BF16 bits of 2 ** -90."""
ONE_BITS = 0x3F80
CODE_BYTES = CHANNELS * 10 // 8
"""Bytes of a coded group."""
RAW_BYTES = 2 * CHANNELS
"""Bytes of a raw group."""
WHOLE = float(1 << 23)
"""fp32 numbers from here to twice of it are whole; their low bits count from 0."""
WHOLE_BITS = 0x4B000000
NEAREST = 1.5 * WHOLE
"""Added to a small number and taken away again, it leaves the nearest whole one; its low bits count from 0 too."""
_HEADER_ALIGNMENT = 64


def header_bytes(hidden: int) -> int:
    """Return how many bytes of a wire row its headers take, filled up to whole cache lines."""
    return -(-4 * num_scale_groups(hidden) // _HEADER_ALIGNMENT) * _HEADER_ALIGNMENT


def logfmt_coded_bytes(hidden: int) -> int:
    """Return how many bytes at the beginning of a wire row are all that it has where every group is coded.

    >>> logfmt_coded_bytes(7168), 2 * 7168
    (9216, 14336)
    """
    return header_bytes(hidden) + num_scale_groups(hidden) * CODE_BYTES


def logfmt_row_bytes(hidden: int) -> int:
    """Return the bytes of a wire row, whichever of its groups are coded.

    int32 [G] headers (0: raw; else BF16 amax in the low half and amin in the high half), filled up to whole cache
    lines; [G, 160]: the codes of a coded group, the first 160 bytes of a raw one; [G, 96]: the rest of a raw one.

    >>> logfmt_row_bytes(7168)
    14592
    """
    return header_bytes(hidden) + num_scale_groups(hidden) * RAW_BYTES


@dataclass(frozen=True, kw_only=True, eq=False)
class LogfmtRows:
    """``header`` int32 [N, G], 0 for raw groups; ``groups`` uint8 [N, G, 256], 0 behind the 160 bytes of a coded one.

    Byte i < 128 of a coded group is the low byte of code i; byte 128 + j has bit 8 and then the sign of the codes j,
    32 + j, 64 + j and 96 + j, from its low bits up: 32 lanes at a time come together by shifts alone.
    """

    header: torch.Tensor
    groups: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LogScale:
    """What a group's header says: fp32 [N, G, 1], logarithms relative to 2 ** (exponent - 127), and int32 exponent."""

    log_min: torch.Tensor
    log_range: torch.Tensor
    exponent: torch.Tensor

    @property
    def step(self) -> torch.Tensor:
        return self.log_range / torch.full_like(self.log_range, STEPS)

    @property
    def per_one(self) -> torch.Tensor:
        """Steps in 1."""
        return torch.full_like(self.log_range, STEPS) / self.log_range

    @property
    def log_zero(self) -> torch.Tensor:
        """The logarithm that code 0 would have."""
        return self.log_min - self.step

    @property
    def origin(self) -> torch.Tensor:
        """What is added to steps since logarithm 0, so that the border between two codes lies at a half."""
        return (1.0 - self.step * BORDER) - self.log_min * self.per_one


def encode_logfmt(x: torch.Tensor) -> LogfmtRows:
    """Encode ``x`` bf16 [N, H].

    >>> rows = encode_logfmt(torch.tensor([[0.5, -0.25, 0.375, 0.0]], dtype=torch.bfloat16))
    >>> hex(rows.header.item()), rows.groups[0, 0, :4].tolist(), rows.groups[0, 0, 128:132].tolist()
    ('0x3e803f00', [255, 1, 43, 0], [1, 2, 1, 0])
    >>> decode_logfmt(rows, 4).mul(1e4).round().tolist()
    [[5000.0, -2500.0, 3748.0, 0.0]]
    """
    groups = _grouped(x)
    bits = groups.view(torch.int16).to(torch.int32)
    size = bits & 0x7FFF
    amax = size.amax(dim=2, keepdim=True)
    amin = torch.where(size == 0, 0x7FFF, size).amin(dim=2, keepdim=True)
    coded = (amax >= LEAST_AMAX_BITS) & (amax < ONE_BITS) & (amin < amax)
    header = torch.where(coded, amax | (amin << 16), 0)
    codes = _codes(size, log_scale(header)) | ((bits >> 15) & 1) << 9
    packed = torch.nn.functional.pad(_pack(codes), (0, RAW_BYTES - CODE_BYTES))
    return LogfmtRows(header=header.squeeze(2), groups=torch.where(coded, packed, groups.view(torch.uint8)))


def decode_logfmt(rows: LogfmtRows, hidden: int) -> torch.Tensor:
    """Return fp32 [N, H]: the inverse of :func:`encode_logfmt` up to half of a step; raw groups exactly."""
    codes = _unpack(rows.groups)
    values = decode_codes(codes & MAX_CODE, log_scale(rows.header.unsqueeze(2))).view(torch.int32)
    values = (values | (codes >> 9) << 31).view(torch.float32)
    raw = rows.groups.view(torch.bfloat16).to(torch.float32)
    decoded = torch.where(rows.header.unsqueeze(2) == 0, raw, values)
    return decoded.flatten(1)[:, :hidden].contiguous()


def log_scale(header: torch.Tensor) -> LogScale:
    """Return the scales of headers int32 [N, G, 1]; those of raw groups mean nothing."""
    amax, amin = header & 0xFFFF, header >> 16
    exponent, mantissa = amax >> 7, amax & 0x7F
    log_max = log2_of(mantissa.to(torch.float32) / 128)
    log_min = log2_of((amin & 0x7F).to(torch.float32) / 128) + ((amin >> 7) - exponent).to(torch.float32)
    log_min = torch.maximum(log_min, log_max - MAX_RANGE)
    return LogScale(log_min=log_min, log_range=log_max - log_min, exponent=exponent)


def decode_codes(codes: torch.Tensor, scale: LogScale) -> torch.Tensor:
    """Return the fp32 magnitudes of codes 0 to 511."""
    power = codes.to(torch.float32) * scale.step + scale.log_zero
    nearest = (scale.exponent - 127).to(torch.float32) + NEAREST
    shifted = power + nearest
    mantissa = exp2_of(power - (shifted - nearest)).view(torch.int32)
    magnitude = (mantissa + (shifted.view(torch.int32) << 23)).view(torch.float32)
    return torch.where(codes == 0, 0.0, magnitude)


def log2_of(fraction: torch.Tensor) -> torch.Tensor:
    """Return log2(1 + fraction) of fp32 numbers in [0, 1)."""
    return _polynomial(fraction, LOG2_COEFFICIENTS) * fraction


def exp2_of(fraction: torch.Tensor) -> torch.Tensor:
    """Return 2 ** fraction of fp32 numbers in [-1/2, 1/2]."""
    return _polynomial(fraction, EXP2_COEFFICIENTS)


def _polynomial(x: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _codes(size: torch.Tensor, scale: LogScale) -> torch.Tensor:
    """Return the codes of magnitudes given as BF16 bits. Sizes of raw groups give anything."""
    log = log2_of((size & 0x7F).to(torch.float32) / 128) + ((size >> 7) - scale.exponent).to(torch.float32)
    count = (log * scale.per_one + scale.origin + WHOLE).view(torch.int32)
    codes = count.clamp_min(WHOLE_BITS + 1) & MAX_CODE
    return torch.where(log < scale.log_min - 1.0, 0, codes)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Return uint8 [N, G, 160] of 10-bit codes [N, G, 128]."""
    quarters = (codes >> 8).view(*codes.shape[:2], 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.int32).view(4, 1)
    high = (quarters << shifts).sum(dim=2, dtype=torch.int32)
    return torch.cat([codes & 0xFF, high], dim=2).to(torch.uint8)


def _unpack(groups: torch.Tensor) -> torch.Tensor:
    """Return the 10-bit codes int32 [N, G, 128]; those of raw groups mean nothing."""
    low, high = groups[..., :CHANNELS].to(torch.int32), groups[..., CHANNELS:CODE_BYTES].to(torch.int32)
    pairs = [(high >> shift) & 3 for shift in (0, 2, 4, 6)]
    return low | torch.cat(pairs, dim=2) << 8


def _grouped(x: torch.Tensor) -> torch.Tensor:
    rows, hidden = x.shape
    padded = torch.nn.functional.pad(x, (0, num_scale_groups(hidden) * CHANNELS - hidden))
    return padded.view(rows, num_scale_groups(hidden), CHANNELS).contiguous()
