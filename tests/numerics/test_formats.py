"""How many scales a row has, and of which type."""

from __future__ import annotations

import pytest
import torch

from anyep.numerics.formats import Element, ScaleFormat, num_scale_groups


@pytest.mark.parametrize(("hidden", "groups"), [(1, 1), (128, 1), (129, 2), (7168, 56), (1030, 9)])
def test_a_short_group_counts(hidden, groups):
    assert num_scale_groups(hidden) == groups
    assert ScaleFormat.FP32.columns(hidden) == groups
    assert ScaleFormat.UE8M0.columns(hidden) == -(-groups // 4)


def test_types():
    assert [element.dtype for element in Element] == [torch.bfloat16, torch.float16, torch.float32]
    assert [element.num_bytes for element in Element] == [element.dtype.itemsize for element in Element]
    assert [form.dtype for form in ScaleFormat] == [torch.float32, torch.float32, torch.int32]
