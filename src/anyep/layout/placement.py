"""Which rank owns which expert, and under which local index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Experts on ranks. A rank's experts are numbered locally in ascending order of their global index."""

    num_ranks: int
    expert_rank_E: IntArray
    """the owner of each expert"""
    expert_local_E: IntArray
    """each expert's index at its owner"""
    experts_per_rank_R: IntArray

    @property
    def num_experts(self) -> int:
        return len(self.expert_rank_E)


def even_placement(num_experts: int, num_ranks: int) -> Placement:
    """Place contiguous ranges of experts; where E is no multiple of R the first ranks own one more.

    >>> even_placement(5, 2).expert_rank_E.tolist()
    [0, 0, 0, 1, 1]
    """
    share, rest = divmod(num_experts, num_ranks)
    experts_per_rank_R = np.full(num_ranks, share, np.int32)
    experts_per_rank_R[:rest] += 1
    return _placement(np.repeat(np.arange(num_ranks, dtype=np.int32), experts_per_rank_R), num_ranks)


def mapped_placement(expert_rank: Sequence[int], num_ranks: int) -> Placement:
    """Place expert ``e`` on rank ``expert_rank[e]``; a rank may own none.

    Raises ValueError for a rank outside [0, R).

    >>> mapped_placement([1, 0, 1], 2).expert_local_E.tolist()
    [0, 0, 1]
    """
    expert_rank_E = np.asarray(expert_rank, np.int32)
    outside = np.flatnonzero((expert_rank_E < 0) | (expert_rank_E >= num_ranks))
    if outside.size:
        expert = int(outside[0])
        raise ValueError(
            f"placement puts expert {expert} on rank {int(expert_rank_E[expert])}; ranks are 0 to {num_ranks - 1}"
        )
    return _placement(expert_rank_E, num_ranks)


def _placement(expert_rank_E: IntArray, num_ranks: int) -> Placement:
    expert_local_E = np.zeros_like(expert_rank_E)
    for rank in range(num_ranks):
        own = expert_rank_E == rank
        expert_local_E[own] = np.arange(np.count_nonzero(own), dtype=np.int32)
    return Placement(
        num_ranks=num_ranks,
        expert_rank_E=np.ascontiguousarray(expert_rank_E),
        expert_local_E=expert_local_E,
        experts_per_rank_R=np.bincount(expert_rank_E, minlength=num_ranks).astype(np.int32),
    )
