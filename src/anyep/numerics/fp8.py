"""FP8 E4M3 with one scale for 128 channels: the definition of every bit, in torch, at torch's speed.

Legend: N rows, H hidden, G scale groups (ceil(H / 128)).
"""

from __future__ import annotations

import torch

from anyep.numerics.formats import CHANNELS_PER_SCALE, ScaleFormat, num_scale_groups
from anyep.numerics.rounding import round_to
from anyep.numerics.scales import E4M3_MAX, MIN_AMAX, multiplier, pack_ue8m0, scale_of, unpack_ue8m0

_NAN_CODE = 0x7F


def encode_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Return fp32 ``x`` as float8_e4m3fn: nearest even, saturating at +-448, NaN as 0x7f.

    torch's own cast makes NaN of what is too large.

    >>> encode_e4m3(torch.tensor([1.0, 17.0, 1000.0, -0.0])).view(torch.uint8).tolist()  # 17 lies between 16 and 18
    [56, 88, 126, 128]
    """
    codes = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(torch.isnan(x), torch.full_like(codes, _NAN_CODE), codes).view(torch.float8_e4m3fn)


def quantise_fp8(x: torch.Tensor, scale_format: ScaleFormat = ScaleFormat.FP32) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``x`` [N, H] (bf16, fp16 or fp32) to (q float8_e4m3fn [N, H], scales).

    scales are fp32 [N, G], or int32 [N, ceil(G / 4)] for UE8M0. Per group amax = max(|x|, 1e-4), q = x * (448 / amax)
    rounded to nearest even, scale = amax / 448; the power-of-two formats round the scale up to 2 ** n and divide by it.
    A group with a NaN is all NaN; Inf makes the scale Inf, itself NaN and finite values zeros of their sign.
    """
    groups = _grouped(x.to(torch.float32))
    amax = groups.abs().amax(dim=2).clamp_min(MIN_AMAX)
    q = encode_e4m3(groups * multiplier(amax, scale_format).unsqueeze(2)).view(torch.uint8)
    q = q.flatten(1)[:, : x.shape[1]].contiguous().view(torch.float8_e4m3fn)
    scales = scale_of(amax, scale_format)
    return q, pack_ue8m0(scales) if scale_format is ScaleFormat.UE8M0 else scales


def dequantise_fp8(
    q: torch.Tensor,
    scales: torch.Tensor,
    scale_format: ScaleFormat = ScaleFormat.FP32,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return [N, H] of ``dtype``: fp32(q) * scale, rounded once; the inverse of :func:`quantise_fp8` up to rounding."""
    hidden = q.shape[1]
    if scale_format is ScaleFormat.UE8M0:
        scales = unpack_ue8m0(scales, num_scale_groups(hidden))
    products = _grouped(q.to(torch.float32)) * scales.unsqueeze(2)
    return round_to(products.flatten(1)[:, :hidden].contiguous(), dtype)


def _grouped(x: torch.Tensor) -> torch.Tensor:
    """View [N, H] as [N, G, 128], the last group filled up with zeros, which change no amax."""
    rows, hidden = x.shape
    padded = torch.nn.functional.pad(x, (0, num_scale_groups(hidden) * CHANNELS_PER_SCALE - hidden))
    return padded.view(rows, num_scale_groups(hidden), CHANNELS_PER_SCALE)
