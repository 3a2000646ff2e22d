"""Numerical helpers that scripts written against DeepEP import: FP8 by 128 channels, rounding up, a distance."""

from __future__ import annotations

import torch

from anyep.numerics.formats import ScaleFormat
from anyep.numerics.fp8 import dequantise_fp8, quantise_fp8


def ceil_div(x: int, y: int) -> int:
    """Return x / y rounded up.

    >>> ceil_div(7, 4)
    2
    """
    return -(-x // y)


def align(x: int, y: int) -> int:
    """Return the least multiple of ``y`` that is not less than ``x``.

    >>> align(7, 4)
    8
    """
    return ceil_div(x, y) * y


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return 1 - 2 <x, y> / (<x, x> + <y, y>): 0 for equal tensors, computed in float64 on values shifted by 1."""
    a, b = x.double() + 1, y.double() + 1
    return float(1 - 2 * (a * b).sum() / (a * a + b * b).sum())


def per_token_cast_to_fp8(x: torch.Tensor, round_scale: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x`` [T, H] as E4M3 and fp32 scales [T, ceil(H / 128)]; ``round_scale``: powers of two."""
    return quantise_fp8(x, ScaleFormat.POWER_OF_TWO if round_scale else ScaleFormat.FP32)


def per_token_cast_back(x_fp8: torch.Tensor, x_scales: torch.Tensor) -> torch.Tensor:
    """Return BF16 [..., H] of E4M3 with fp32 scales, or with int32 scales that hold four UE8M0 exponents each."""
    packed = x_scales.dtype == torch.int32
    rows, scales = x_fp8.reshape(-1, x_fp8.shape[-1]), x_scales.reshape(-1, x_scales.shape[-1]).contiguous()
    back = dequantise_fp8(rows, scales, ScaleFormat.UE8M0 if packed else ScaleFormat.FP32)
    return back.view(x_fp8.shape)
