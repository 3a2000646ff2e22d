"""LogFMT-10 against float64: how far values move, which groups are coded, and that raw groups do not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anyep.numerics.logfmt import (
    CHANNELS,
    MAX_RANGE,
    decode_codes,
    decode_logfmt,
    encode_logfmt,
    exp2_of,
    log2_of,
    log_scale,
    logfmt_coded_bytes,
    logfmt_row_bytes,
)


def _rows(values):
    return torch.as_tensor(values, dtype=torch.float32).reshape(1, -1).bfloat16()


def _normal(rows, hidden, scale):
    return torch.randn((rows, hidden), generator=torch.Generator().manual_seed(hidden)).mul(scale).bfloat16()


def _half_step(header):
    """The relative error of half a step in float64, from the definition's formula."""
    amax = (header << 16).view(torch.float32).double()
    amin = (header & -65536).view(torch.float32).double()
    reach = (amax.log2() - amin.log2()).clamp_max(MAX_RANGE)
    return torch.exp2(reach / 1020) - 1


def test_log2_and_exp2_are_far_better_than_half_a_step():
    fractions = torch.arange(128, dtype=torch.float32) / 128
    half_smallest_step = float(np.log2(255 / 254)) / 1020
    assert (log2_of(fractions).double() - torch.log2(1 + fractions.double())).abs().max() < 0.08 * half_smallest_step
    fractions = torch.linspace(-0.5, 0.5, 100_001)
    error = exp2_of(fractions).double() / torch.exp2(fractions.double()) - 1
    assert error.abs().max() < 0.08 * half_smallest_step * np.log(2)
    assert exp2_of(torch.zeros(1)).item() == 1.0


@pytest.mark.parametrize("scale", [1e-25, 1e-8, 1e-3, 0.05, 0.2])
@pytest.mark.parametrize("hidden", [128, 1024])
def test_every_value_moves_by_half_a_step_at_most(hidden, scale):
    x = _normal(16, hidden, scale)
    rows = encode_logfmt(x)
    coded = rows.header != 0
    assert coded.float().mean() > 0.7
    error = (decode_logfmt(rows, hidden).double() / x.double() - 1).abs().nan_to_num(0.0).unflatten(1, (-1, CHANNELS))
    assert (error.amax(2) <= 1.1 * _half_step(rows.header))[coded].all()
    assert (error.amax(2) == 0)[~coded].all()


@pytest.mark.parametrize("smallest", [1e-12, 1e-3, 0.5])
def test_each_code_is_that_of_the_nearest_value(smallest):
    magnitudes = torch.logspace(np.log10(smallest), np.log10(0.9), CHANNELS - 1)
    x = torch.cat([magnitudes, torch.zeros(1)]).reshape(1, -1).bfloat16()
    rows = encode_logfmt(x)
    values = decode_codes(torch.arange(512, dtype=torch.int32), log_scale(rows.header.unsqueeze(2))).double().flatten()
    distance = (decode_logfmt(rows, CHANNELS).double() - x.double()).abs()
    nearest = (values[:, None] - x.double()).abs().amin(0)
    assert (distance <= nearest + 1e-6 * x.double()).all()


def test_neighbours_are_told_apart():
    x = _rows([1.9921875 / 4, 1.984375 / 4] * 64)
    assert torch.equal(decode_logfmt(encode_logfmt(x), CHANNELS).bfloat16(), x)


def test_a_wide_range_is_cut_and_what_is_small_becomes_the_least_value_or_zero():
    least = 2.0**-33
    x = _rows([0.5, 0.75 * least, -0.75 * least, 0.25 * least, -0.25 * least, 2.0**-120, 1e-40, -0.0] + [0.25] * 120)
    decoded = decode_logfmt(encode_logfmt(x), CHANNELS)[0, :8]
    assert decoded.tolist() == pytest.approx([0.5, least, -least, *[0.0] * 5], rel=3e-6, abs=0)
    assert torch.signbit(decoded).tolist() == [False, False, True, False, True, False, False, True]


@pytest.mark.parametrize(
    "values",
    [
        *([1.0, 0.5], [float("inf"), 0.5], [-float("inf")], [float("nan"), 0.5], [300.0, -2.0]),
        *([0.0], [-0.0, 0.0], [0.5, -0.5], [2.0**-91, 2.0**-92], [1e-40, 1e-39]),
    ],
)
def test_what_does_not_qualify_travels_raw(values):
    x = _rows([values[i % len(values)] for i in range(CHANNELS)])
    rows = encode_logfmt(x)
    assert rows.header.tolist() == [[0]]
    decoded = decode_logfmt(rows, CHANNELS).bfloat16()
    assert torch.equal(decoded.view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize("hidden", [1, 2, 127, 129, 300])
def test_a_short_group_is_filled_up_with_zeros(hidden):
    x = _normal(3, hidden, 0.1)
    rows = encode_logfmt(x)
    longer = torch.nn.functional.pad(x, (0, -hidden % CHANNELS))
    whole = encode_logfmt(longer)
    assert torch.equal(rows.header, whole.header)
    assert torch.equal(rows.groups, whole.groups)
    assert torch.equal(decode_logfmt(rows, hidden), decode_logfmt(whole, longer.shape[1])[:, :hidden])


def test_a_coded_row_is_five_eighths_and_a_header():
    assert logfmt_coded_bytes(7168) == 256 + 7168 * 10 // 8
    assert logfmt_row_bytes(7168) == 256 + 7168 * 2
    assert logfmt_row_bytes(1) == 64 + 256
