"""Rounding once, to nearest even, and one NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anyep.numerics.rounding import round_to


def test_bf16_is_the_upper_half_rounded_to_even():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    x = bits.view(np.float32)
    rounded = round_to(torch.from_numpy(x.copy()), torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    wide = bits.astype(np.uint64)
    expected = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(rounded, np.where(np.isnan(x), 0x7FC0, expected))


def test_fp16_is_what_numpy_rounds_to():
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(100_000) * 10.0 ** rng.uniform(-9, 6, 100_000)).astype(np.float32)
    x = np.concatenate([x, np.array([65519.996, 65520, -65520, 2**-25, 2**-24, 6e-8], np.float32)])
    rounded = round_to(torch.from_numpy(x), torch.float16).view(torch.int16).numpy()
    with np.errstate(over="ignore"):
        assert np.array_equal(rounded, x.astype(np.float16).view(np.int16))


@pytest.mark.parametrize(
    ("dtype", "bits", "nan"),
    [
        (torch.bfloat16, torch.int16, 0x7FC0),
        (torch.float16, torch.int16, 0x7E00),
        (torch.float32, torch.int32, 0x7FC00000),
    ],
)
@pytest.mark.parametrize("size", [1, 64])
def test_every_nan_becomes_the_canonical_one(dtype, bits, nan, size):
    payloads = torch.tensor([0x7F800001, -1, 0x7FFFFFFF, -0x400000], dtype=torch.int32).repeat(size)
    assert set(round_to(payloads.view(torch.float32), dtype).view(bits).tolist()) == {nan}
