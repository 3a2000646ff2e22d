"""Ranks that a low-latency program has masked: neither sent to nor waited for, their tokens count 0."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from anyep.compat.deep_ep.checks import check_dense, host_assert


class Masks:
    """Which ranks are masked; without ``enabled`` (``enable_shrink``) nothing can be."""

    def __init__(self, num_ranks: int, rank: int, *, enabled: bool) -> None:
        self._rank = rank
        self.num_ranks = num_ranks
        self.enabled = enabled
        self._masked_R = torch.zeros(num_ranks, dtype=torch.int32, device="cpu")

    @property
    def ranks(self) -> list[int]:
        return self._masked_R.nonzero().flatten().tolist()

    def update(self, rank: int, masked: bool) -> None:
        """Mask a rank, or take it in again. RuntimeError without enable_shrink, or for no other rank of the group."""
        self._check()
        host_assert(0 <= rank < len(self._masked_R), f"there is no rank {rank} among {len(self._masked_R)}")
        host_assert(rank != self._rank or not masked, f"rank {rank} cannot mask itself")
        self._masked_R[rank] = int(masked)

    @contextmanager
    def undone_if_refused(self) -> Iterator[None]:
        """Leave the masks as they were where the buffers below refuse to go on with others."""
        before = self._masked_R.clone()
        try:
            yield
        except BaseException:
            self._masked_R.copy_(before)
            raise

    def query(self, status: object, culprits: Collection[int] = ()) -> None:
        """Write 1 for masked ranks and ``culprits``, and 0 for others, to int32 [R]."""
        self._check()
        written = check_dense("mask_status", status, torch.int32, [len(self._masked_R)], "[R]").copy_(self._masked_R)
        written[list(culprits)] = 1

    def add(self, ranks: Collection[int]) -> None:
        """Mask ranks that a call went on without."""
        self._masked_R[list(ranks)] = 1

    def clean(self) -> None:
        """Take in every rank."""
        self._check()
        self._masked_R.zero_()

    def without(self, topk_idx: torch.Tensor, local_experts: int) -> torch.Tensor:
        """Return ``topk_idx`` with -1 for experts of masked ranks."""
        if not self.enabled or not self.ranks:
            return topk_idx
        owner = topk_idx.div(local_experts, rounding_mode="floor")
        return topk_idx.masked_fill(torch.isin(owner, torch.tensor(self.ranks, device=topk_idx.device)), -1)

    def _check(self) -> None:
        host_assert(self.enabled, "Shrink mode must be enabled: make the Buffer with enable_shrink=True")
