"""Ranks with inputs of their own, and what a V2 dispatch and combine of them must bring: slow, plain, apart from AnyEP.

Legend: R ranks, T tokens, H hidden, K top-k, E experts, L local experts, S ranks a host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch

import anyep
from anyep.compat.deep_ep import ElasticBuffer
from anyep.exchange import receive, setup
from tests.exchange.rounds import poison_arenas

MIB2 = 2 << 20


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill all memory that nobody has written with 0xFF, so that what must be defined has to be."""
    original, real_empty = (setup.open_transport, receive.fresh), torch.empty

    def poisoned_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = real_empty(*args, **kwargs)
        if tensor.numel() and tensor.is_contiguous() and not tensor.is_meta:
            tensor.view(-1).view(torch.uint8).fill_(0xFF)
        return tensor

    poison_arenas()
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    yield
    setup.open_transport, receive.fresh = original


@dataclass(frozen=True, kw_only=True)
class World:
    """Inputs of all ranks, a function of ``seed``."""

    num_tokens: tuple[int, ...] = (5, 0, 7, 3)
    hidden: int = 24
    num_topk: int = 4
    num_experts: int = 8
    max_tokens: int = 9
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_local(self) -> int:
        return self.num_experts // self.num_ranks

    @cached_property
    def inputs(self) -> list[Inputs]:
        return [self._inputs(rank) for rank in range(self.num_ranks)]

    def _inputs(self, rank: int) -> Inputs:
        generator = torch.Generator().manual_seed(1000 * self.seed + rank)
        T, K, E = self.num_tokens[rank], self.num_topk, self.num_experts
        idx = torch.rand(T, max(E, K), generator=generator).argsort(dim=1)[:, :K].contiguous()
        idx[(torch.rand(T, K, generator=generator) < 0.2) | (idx >= E)] = -1
        return Inputs(
            x=torch.randn(T, self.hidden, generator=generator).bfloat16(),
            idx=idx,
            weights=torch.rand(T, K, generator=generator) + 0.5,
            bias=tuple(torch.randn(T, self.hidden, generator=generator).bfloat16() for _ in range(2)),
        )

    def run(self, rank_main: Callable[[ElasticBuffer, Inputs], Any], **options: Any) -> list[Any]:
        """Run ``rank_main(buffer, inputs)`` on every rank."""
        settings = {"num_bytes": MIB2, "num_max_tokens_per_rank": self.max_tokens, "num_cpu_timeout_secs": 30}

        def thread_main(member: Any) -> Any:
            buffer = ElasticBuffer(member, **(settings | options))
            return rank_main(buffer, self.inputs[member.rank])

        return anyep.local_group(self.num_ranks).run(thread_main)

    def owner(self, expert: int) -> int:
        return expert // self.num_local if expert >= 0 else -1

    def arrivals(self, rank: int) -> list[tuple[int, int]]:
        """Return (source rank, token) of every token that has an expert at ``rank``, in this order."""
        return [
            (source, token)
            for source, inputs in enumerate(self.inputs)
            for token, experts in enumerate(inputs.idx.tolist())
            if rank in [self.owner(expert) for expert in experts]
        ]

    def local_idx(self, rank: int, source: int, token: int) -> list[int]:
        experts = self.inputs[source].idx[token].tolist()
        return [expert - rank * self.num_local if self.owner(expert) == rank else -1 for expert in experts]

    def counts(self, rank: int) -> list[int]:
        """Return how many (token, column) pairs each local expert gets."""
        columns = [local for arrival in self.arrivals(rank) for local in self.local_idx(rank, *arrival)]
        return [columns.count(local) for local in range(self.num_local)]

    def expanded(self, rank: int, alignment: int) -> tuple[list[tuple[int, int, int] | None], dict[Any, int]]:
        """Return (source, token, column) of each expanded row, None for padding, and the row of each."""
        rows: list[tuple[int, int, int] | None] = []
        for local in range(self.num_local):
            for source, token in self.arrivals(rank):
                columns = self.local_idx(rank, source, token)
                rows += [(source, token, k) for k, expert in enumerate(columns) if expert == local]
            rows += [None] * (-len(rows) % alignment)
        return rows, {row: place for place, row in enumerate(rows) if row is not None}

    def masters(self, source: int, token: int) -> dict[int, int]:
        """Return the last column of each rank that gets the token."""
        owners = [self.owner(expert) for expert in self.inputs[source].idx[token].tolist()]
        return {rank: k for k, rank in enumerate(owners) if rank >= 0}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    x: torch.Tensor
    idx: torch.Tensor
    weights: torch.Tensor
    bias: tuple[torch.Tensor, ...]


def rounded_sum(terms: list[torch.Tensor]) -> torch.Tensor:
    """Return the fp32 sum from left to right, rounded to bfloat16."""
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    return total.bfloat16()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(bits(first), bits(second))
