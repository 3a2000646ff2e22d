"""``topk_idx_t``: the dtype of expert indices, 64 bits wide unless ``EP_NUM_TOPK_IDX_BITS`` says otherwise."""

from __future__ import annotations

import torch

from anyep.compat.deep_ep.checks import host_assert
from anyep.config import topk_idx_bits

topk_idx_t: torch.dtype = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[topk_idx_bits()]


def check_topk_idx(topk_idx: object, num_tokens: int | None = None) -> torch.Tensor:
    """Return ``topk_idx`` [T, K] if it is a contiguous CPU tensor of ``topk_idx_t``; RuntimeError otherwise."""
    host_assert(isinstance(topk_idx, torch.Tensor), f"topk_idx must be a tensor [T, K], got {type(topk_idx).__name__}")
    assert isinstance(topk_idx, torch.Tensor)
    host_assert(topk_idx.dtype == topk_idx_t, f"topk_idx must be {topk_idx_t}, got {topk_idx.dtype}")
    host_assert(
        topk_idx.dim() == 2 and topk_idx.is_contiguous(),
        f"topk_idx must be contiguous [T, K], got {tuple(topk_idx.shape)} with strides {topk_idx.stride()}",
    )
    if num_tokens is not None:
        host_assert(
            topk_idx.size(0) == num_tokens, f"topk_idx has {topk_idx.size(0)} rows for {num_tokens} tokens of x"
        )
    return topk_idx


def widened(topk_idx: torch.Tensor) -> torch.Tensor:
    """Return indices as the exchange takes them: narrow ones become int32."""
    return topk_idx if topk_idx.itemsize >= 4 else topk_idx.int()
