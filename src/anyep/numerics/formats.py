"""Element types and scale formats: the words in which rows are described, and how many scales a row has.

Legend: H hidden, G scale groups (ceil(H / 128)).
"""

from __future__ import annotations

from enum import IntEnum

import torch

CHANNELS_PER_SCALE = 128
"""DeepSeek-V3 (arXiv 2412.19437, section 3.3) scales activations in tiles of 1 x 128."""


class Element(IntEnum):
    """Element types that arithmetic reads and writes."""

    BF16 = 0
    FP16 = 1
    FP32 = 2

    @property
    def num_bytes(self) -> int:
        return 4 if self is Element.FP32 else 2

    @property
    def dtype(self) -> torch.dtype:
        return (torch.bfloat16, torch.float16, torch.float32)[self]


class ScaleFormat(IntEnum):
    """How the scales of 128 channels are made and stored."""

    FP32 = 0
    """scale = amax / 448, stored as fp32 [rows, G]"""
    POWER_OF_TWO = 1
    """scale = 2 ** ceil(log2(amax / 448)), stored as fp32 [rows, G]"""
    UE8M0 = 2
    """the power of two's biased exponent, 4 to an int32 [rows, ceil(G / 4)], first group in the low byte, rest 0"""

    @property
    def dtype(self) -> torch.dtype:
        return torch.int32 if self is ScaleFormat.UE8M0 else torch.float32

    def columns(self, hidden: int) -> int:
        """Return how many numbers of :attr:`dtype` stand beside a row of ``hidden`` channels."""
        groups = num_scale_groups(hidden)
        return -(-groups // 4) if self is ScaleFormat.UE8M0 else groups


def num_scale_groups(hidden: int) -> int:
    """Return G: a row of ``hidden`` channels has ceil(hidden / 128) scales; the last group may be shorter.

    >>> num_scale_groups(7168), num_scale_groups(129), num_scale_groups(1)
    (56, 2, 1)
    """
    return -(-hidden // CHANNELS_PER_SCALE)
