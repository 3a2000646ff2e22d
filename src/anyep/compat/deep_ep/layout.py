"""``get_dispatch_layout``: how many tokens go where."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

from anyep.compat.deep_ep.checks import host_assert
from anyep.compat.deep_ep.domains import Domain
from anyep.compat.deep_ep.indices import check_topk_idx, widened


class Layout(NamedTuple):
    """Counts of this rank's tokens."""

    num_tokens_per_rank: torch.Tensor
    """int32 [R]: tokens, each counted once a rank"""
    num_tokens_per_rdma_rank: torch.Tensor | None
    """int32 [hosts], each counted once a host; None on one host"""
    num_tokens_per_expert: torch.Tensor
    """int32 [E]: (token, column) pairs"""
    is_token_in_rank: torch.Tensor
    """bool [T, R]"""


@cache
def loops() -> ModuleType:
    """Import the compiled loops."""
    from anyep.machine.compiler import compiling

    with compiling():
        from anyep.compat import deep_ep_loops
    return deep_ep_loops


def count(topk_idx: torch.Tensor, num_experts: int, domain: Domain) -> Layout:
    """Count where ``topk_idx`` [T, K] sends tokens. RuntimeError for bad arguments and experts that do not exist."""
    idx = widened(check_topk_idx(topk_idx))
    ranks = domain.num_ranks
    _check_experts(num_experts, ranks)
    per_rank, per_expert = made(ranks), made(num_experts)
    per_host = made(domain.num_hosts) if domain.crosses_hosts else None
    inside = torch.empty((idx.size(0), ranks), dtype=torch.bool, device="cpu")
    bad = loops().count_layout(
        *(idx.data_ptr(), idx.itemsize, *idx.shape, num_experts, ranks, domain.per_host, per_rank.data_ptr()),
        *(0 if per_host is None else per_host.data_ptr(), per_expert.data_ptr(), inside.data_ptr()),
    )
    host_assert(bad < 0, f"topk_idx has an expert outside -1 to {num_experts - 1} at flat index {bad}")
    return Layout(per_rank, per_host, per_expert, inside)


def count_on_device(topk_idx: torch.Tensor, num_experts: int, domain: Domain) -> Layout:
    """Count the same where ``topk_idx`` lies, without waiting; a dispatch refuses experts that do not exist."""
    idx, ranks = check_topk_idx(topk_idx).long(), domain.num_ranks
    _check_experts(num_experts, ranks)
    exists = (idx >= 0) & (idx < num_experts)
    owner_TK = torch.where(exists, idx // (num_experts // ranks), ranks)
    inside = idx.new_zeros((idx.size(0), ranks + 1), dtype=torch.bool).scatter_(1, owner_TK, True)[:, :ranks]
    inside = inside.contiguous()
    per_expert = idx.new_zeros(num_experts + 1, dtype=torch.int32)
    flat = torch.where(exists, idx, num_experts).flatten()
    per_expert.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    per_host = None
    if domain.crosses_hosts:
        hosts = [inside[:, first : first + domain.per_host] for first in range(0, ranks, domain.per_host)]
        per_host = torch.stack([host.any(1).sum(0, dtype=torch.int32) for host in hosts])
    return Layout(inside.sum(0, dtype=torch.int32), per_host, per_expert[:num_experts].clone(), inside)


def _check_experts(num_experts: int, ranks: int) -> None:
    host_assert(
        num_experts > 0 and num_experts % ranks == 0, f"num_experts={num_experts} must be a multiple of R={ranks}"
    )


def made(*shape: int) -> torch.Tensor:
    """Return an int32 tensor with any content."""
    return torch.empty(shape, dtype=torch.int32, device="cpu")
