"""Scales of 128 channels: from the largest magnitude to the factor and what is stored, and back.

Every division is a true one, tensor by tensor: torch turns ``448.0 / tensor`` into ``reciprocal(tensor) * 448``,
which differs in the last bit.
"""

from __future__ import annotations

import torch

from anyep.numerics.formats import ScaleFormat
from anyep.numerics.rounding import round_to

E4M3_MAX = 448.0
MIN_AMAX = 1e-4
"""Below this magnitude a group is treated as if it held it, so that zeros have a finite factor (DeepEP's constant)."""

_MANTISSA_BITS = 23
_MANTISSA_MASK = (1 << _MANTISSA_BITS) - 1
_EXPONENT_ONES = 0xFF


def multiplier(amax: torch.Tensor, scale_format: ScaleFormat) -> torch.Tensor:
    """Return the fp32 factor that brings a group of largest magnitude ``amax`` (fp32, >= 1e-4) to at most 448.

    448 / amax for FP32, 1 / scale for the powers of two (exact). Inf gives 0, NaN gives NaN.
    """
    if scale_format is ScaleFormat.FP32:
        return torch.full_like(amax, E4M3_MAX) / amax
    return torch.ones_like(amax) / scale_of(amax, scale_format)


def scale_of(amax: torch.Tensor, scale_format: ScaleFormat) -> torch.Tensor:
    """Return the fp32 scale of a group of largest magnitude ``amax`` (fp32, >= 1e-4); Inf stays, NaN is 0x7fc00000.

    >>> scale_of(torch.tensor([448.0, 449.0]), ScaleFormat.POWER_OF_TWO).tolist()
    [1.0, 2.0]
    """
    ratio = amax / torch.full_like(amax, E4M3_MAX)
    if scale_format is ScaleFormat.FP32:
        return round_to(ratio, torch.float32)
    power = (_ceil_log2_biased(ratio) << _MANTISSA_BITS).view(torch.float32)
    return round_to(torch.where(torch.isnan(ratio), ratio, power), torch.float32)


def _ceil_log2_biased(x: torch.Tensor) -> torch.Tensor:
    """Return 127 + ceil(log2(x)) as int32 for positive normal fp32 ``x``, from its bits: log2 itself rounds."""
    return (x.view(torch.int32) + _MANTISSA_MASK) >> _MANTISSA_BITS


def pack_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """Pack fp32 powers of two [rows, G] into int32 [rows, ceil(G / 4)]: biased exponents, first group in the low byte.

    Inf and NaN become 0xff, missing groups of the last word 0.

    >>> [hex(word) for word in pack_ue8m0(torch.tensor([[1.0, 2.0, 0.5, 1.0, 4.0]])).flatten().tolist()]
    ['0x7f7e807f', '0x81']
    """
    rows, groups = scales.shape
    exponents = torch.zeros((rows, -(-groups // 4) * 4), dtype=torch.uint8)
    exponents[:, :groups] = (scales.view(torch.int32) >> _MANTISSA_BITS) & _EXPONENT_ONES
    return exponents.view(torch.int32)


def unpack_ue8m0(packed: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return fp32 scales [rows, num_groups] from int32 [rows, ceil(num_groups / 4)].

    A byte b is 2 ** (b - 127); 0xff is NaN and 0 is 2 ** -127, as the OCP microscaling format defines E8M0.
    """
    exponents = packed.contiguous().view(torch.uint8)[:, :num_groups].to(torch.int32)
    scales = (exponents << _MANTISSA_BITS).view(torch.float32)
    scales = torch.where(exponents == 0, torch.full_like(scales, 2.0**-127), scales)
    return torch.where(exponents == _EXPONENT_ONES, torch.full_like(scales, float("nan")), scales)
