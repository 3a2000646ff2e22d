"""Tensors as kernels see them."""

from __future__ import annotations

import torch


def i32(values):
    return torch.tensor(values, dtype=torch.int32)


def table(*tensors):
    """The peer table of these tensors, one a rank."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


def poisoned(*shape, dtype):
    """A tensor whose bytes are all 0xff: NaN in every float type, -1 in every integer type."""
    empty = torch.empty(shape, dtype=dtype)
    empty.view(torch.uint8).fill_(0xFF)
    return empty
