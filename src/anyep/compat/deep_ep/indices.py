"""``topk_idx_t``: the dtype of expert indices, 64 bits wide unless ``EP_NUM_TOPK_IDX_BITS`` says otherwise."""

from __future__ import annotations

import torch

from anyep.compat.deep_ep.checks import check_dense
from anyep.config import topk_idx_bits

topk_idx_t: torch.dtype = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[topk_idx_bits()]
WIDE = (torch.int64, torch.int32)
"""What the exchange takes as it is."""


def check_topk_idx(topk_idx: object, num_tokens: int | None = None) -> torch.Tensor:
    """Return ``topk_idx`` [T, K] if it is a contiguous CPU tensor of ``topk_idx_t``; RuntimeError otherwise."""
    return check_dense("topk_idx", topk_idx, topk_idx_t, [num_tokens, None], "[T, K]")


def widened(topk_idx: torch.Tensor) -> torch.Tensor:
    """Return indices as the exchange takes them: narrow ones become int32."""
    return topk_idx if topk_idx.dtype in WIDE else topk_idx.int()
