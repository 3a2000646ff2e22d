"""FP8 E4M3 against an independent definition: all 256 values from their fields, and a search for the nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anyep.numerics.formats import Element, ScaleFormat
from anyep.numerics.fp8 import dequantise_fp8, encode_e4m3, quantise_fp8
from anyep.numerics.scales import scale_of

POWERS = (ScaleFormat.POWER_OF_TWO, ScaleFormat.UE8M0)


def _value(code):
    """sign, 4 exponent bits with bias 7, 3 mantissa bits; no Inf, and only 0x7f and 0xff are NaN."""
    exponent, mantissa = code >> 3 & 0xF, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if code & 0x80 else size


VALUES = np.array([_value(code) for code in range(256)])


def _nearest(x):
    """Codes of float64 ``x``: the nearest value, the even code at a tie, saturated."""
    size = np.minimum(np.abs(x), 448.0)
    above = np.searchsorted(VALUES[:127], size)
    below = np.maximum(above - 1, 0)
    up, down = VALUES[above] - size, size - VALUES[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.where(np.isnan(x), 0x7F, code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def _bits(x):
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize])


def test_encoding_finds_the_nearest_value():
    every_bf16 = (torch.arange(65536, dtype=torch.int32) << 16).view(torch.float32)
    ties = torch.from_numpy((VALUES[:126] + VALUES[1:127]) / 2).float()
    beside = torch.nextafter(ties, torch.tensor(float("inf"))), torch.nextafter(ties, torch.tensor(0.0))
    for x in (every_bf16, ties, -ties, *beside):
        assert np.array_equal(_bits(encode_e4m3(x)).numpy(), _nearest(x.double().numpy()))


def test_every_code_decodes_to_its_value():
    codes = torch.arange(256, dtype=torch.uint8)[None].view(torch.float8_e4m3fn)
    for element in Element:
        decoded = dequantise_fp8(codes, torch.ones(1, 2), dtype=element.dtype)
        assert np.array_equal(decoded.double().numpy()[0], VALUES, equal_nan=True)


@pytest.mark.parametrize("element", list(Element))
@pytest.mark.parametrize("hidden", [1, 127, 128, 129, 300])
def test_quantising_follows_the_formula_group_by_group(element, hidden):
    x = torch.randn((9, hidden), generator=torch.Generator().manual_seed(hidden)).mul(40).to(element.dtype)
    q, scales = quantise_fp8(x)
    assert q.shape == x.shape
    assert scales.shape == (9, -(-hidden // 128))
    for group, part in enumerate(
        x.float().numpy().astype(np.float32).reshape(9, -1)[:, i : i + 128] for i in range(0, hidden, 128)
    ):
        amax = np.maximum(np.abs(part).max(axis=1), np.float32(1e-4))
        assert np.array_equal(scales[:, group].numpy(), amax / np.float32(448))
        products = part * (np.float32(448) / amax)[:, None]
        mine = _bits(q)[:, 128 * group : 128 * group + part.shape[1]].numpy()
        assert np.array_equal(mine, _nearest(products.astype(np.float64)))


@pytest.mark.parametrize("scale_format", POWERS)
def test_powers_of_two_are_the_smallest_that_fit(scale_format):
    amax = torch.cat([torch.logspace(-4, 30, 500), 448 * 2.0 ** torch.arange(-20, 90)])
    scale = scale_of(amax, scale_format).double()
    ratio = (amax / torch.full_like(amax, 448.0)).double()
    assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))
    assert (scale >= ratio).all()
    assert (scale / 2 < ratio).all()


def test_packed_exponents_are_the_powers_of_two():
    x = torch.randn((5, 128 * 6 - 3), generator=torch.Generator().manual_seed(0)) * 1000
    q, scales = quantise_fp8(x, ScaleFormat.POWER_OF_TWO)
    packed_q, packed = quantise_fp8(x, ScaleFormat.UE8M0)
    assert torch.equal(_bits(q), _bits(packed_q))
    assert packed.shape == (5, 2)
    exponents = packed.view(torch.uint8)
    assert torch.equal(2.0 ** (exponents[:, :6].float() - 127), scales)
    assert not exponents[:, 6:].any()
    assert torch.equal(
        dequantise_fp8(q, scales, ScaleFormat.POWER_OF_TWO), dequantise_fp8(q, packed, ScaleFormat.UE8M0)
    )


@pytest.mark.parametrize("scale_format", list(ScaleFormat))
def test_nan_poisons_its_group_and_no_other(scale_format):
    x = torch.ones((1, 256), dtype=torch.bfloat16)
    x[0, 5] = -float("nan")
    x[0, 6] = float("inf")
    q, scales = quantise_fp8(x, scale_format)
    assert _bits(q)[0, :128].tolist() == [0x7F] * 128
    first = scales.view(torch.int32)[0, 0].item()
    assert first & 0xFF == 0xFF if scale_format is ScaleFormat.UE8M0 else first == 0x7FC00000
    decoded = dequantise_fp8(q, scales, scale_format)
    assert decoded[0, :128].isnan().all()
    assert torch.allclose(decoded[0, 128:].float(), torch.ones(128))


@pytest.mark.parametrize("scale_format", list(ScaleFormat))
def test_infinity_decodes_to_nothing_finite(scale_format):
    x = torch.tensor([[1.0, -1.0, -float("inf"), 0.0]])
    q, scales = quantise_fp8(x, scale_format)
    assert _bits(q).tolist() == [[0, 0x80, 0x7F, 0]]
    assert not dequantise_fp8(q, scales, scale_format).isfinite().any()


def test_a_group_of_zeros_has_a_finite_scale():
    q, scales = quantise_fp8(torch.zeros(1, 128))
    assert not _bits(q).any()
    assert scales.item() == np.float32(1e-4) / np.float32(448)


def test_the_byte_0_of_ue8m0_is_the_smallest_power_and_255_is_nan():
    q = torch.full((1, 512), 0x7E, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.tensor([0x00 | 0xFF << 8 | 0x7F << 16 | 0x01 << 24], dtype=torch.int32)[None]
    decoded = dequantise_fp8(q, scales, ScaleFormat.UE8M0, torch.float32)[0, ::128].tolist()
    assert decoded[0] == 448 * 2.0**-127
    assert decoded[1] != decoded[1]
    assert decoded[2:] == [448.0, 448 * 2.0**-126]


def test_no_rows():
    q, scales = quantise_fp8(torch.empty((0, 300)))
    assert q.shape == (0, 300)
    assert scales.shape == (0, 3)
    assert dequantise_fp8(q, scales).shape == (0, 300)
