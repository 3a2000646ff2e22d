"""What V1's calls must return, in plain torch over the inputs of all ranks; nothing of the library's own is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import anyep
from anyep.compat import deep_ep

E, K, H = 12, 3, 96


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """One rank's tokens."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def make_inputs(
    num_tokens: list[int], *, hidden: int = H, topk: int = K, experts: int = E, seed: int = 7
) -> list[Inputs]:
    """Return inputs for every rank: distinct experts a token, some -1, one token that goes nowhere."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for tokens in num_tokens:
        idx = torch.stack(
            [torch.randperm(experts, generator=generator)[:topk] for _ in range(tokens)]
            or [torch.empty(0, dtype=torch.int64)]
        ).reshape(tokens, -1 if tokens else topk)
        idx[torch.rand(idx.shape, generator=generator) < 0.15] = -1
        if tokens > 4:
            idx[4] = -1
        x = torch.randn(tokens, hidden, generator=generator).bfloat16()
        made.append(Inputs(x=x, topk_idx=idx, topk_weights=torch.rand(tokens, topk, generator=generator)))
    return made


class Arrival(NamedTuple):
    """Rows that a rank receives in normal mode."""

    source: list[int]
    token: list[int]
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    counts: list[int]


def arrival(inputs: list[Inputs], rank: int, experts: int = E) -> Arrival:
    """Return what ``rank`` receives: by source rank, then by token."""
    local = experts // len(inputs)
    mine = range(rank * local, (rank + 1) * local)
    sources, tokens, indices, weights = [], [], [], []
    counts = [0] * local
    for source, given in enumerate(inputs):
        for token, row in enumerate(given.topk_idx.tolist()):
            if not any(expert in mine for expert in row):
                continue
            sources.append(source)
            tokens.append(token)
            indices.append([expert - rank * local if expert in mine else -1 for expert in row])
            weights.append(
                [float(w) if expert in mine else 0.0 for expert, w in zip(row, given.topk_weights[token], strict=True)]
            )
            for expert in row:
                if expert in mine:
                    counts[expert - rank * local] += 1
    topk = inputs[0].topk_idx.shape[1]
    return Arrival(
        sources,
        tokens,
        torch.tensor(indices, dtype=torch.int64).reshape(-1, topk),
        torch.tensor(weights, dtype=torch.float32).reshape(-1, topk),
        counts,
    )


def rows_of(
    inputs: list[Inputs], rank: int, values: Callable[[Inputs], torch.Tensor], experts: int = E
) -> torch.Tensor:
    """Return ``values`` of the tokens that ``rank`` receives."""
    there = arrival(inputs, rank, experts)
    picked = [values(inputs[s])[t] for s, t in zip(there.source, there.token, strict=True)]
    return torch.stack(picked) if picked else values(inputs[0])[:0]


def summed(
    inputs: list[Inputs],
    outputs: list[torch.Tensor],
    rank: int,
    bias: list[torch.Tensor],
    per_host: int,
    experts: int = E,
    homes: str | None = None,
) -> torch.Tensor:
    """Return combine's result: fp32, ascending ranks, one rounding; with several hosts one more a host.

    ``homes``: each rank's host by letter, where DeepEP's domains do not say it: only other hosts' sums are rounded.
    """
    ranks = len(inputs)
    stages = (
        _stages(rank, homes)
        if homes
        else [(ranks > per_host, range(first, min(first + per_host, ranks))) for first in range(0, ranks, per_host)]
    )
    hidden = outputs[0].shape[1]
    place = [
        {pair: row for row, pair in enumerate(zip(there.source, there.token, strict=True))}
        for there in (arrival(inputs, owner, experts) for owner in range(ranks))
    ]
    out = torch.zeros(inputs[rank].x.shape[0], hidden, dtype=torch.bfloat16)
    for token in range(len(out)):
        total = sum((one[token].float() for one in bias), torch.zeros(hidden))
        for is_rounded, group in stages:
            owners = [o for o in group if (rank, token) in place[o]]
            part = torch.zeros(hidden) if is_rounded else total
            for owner in owners:
                part = part + outputs[owner][place[owner][rank, token]].float()
            total = total + part.bfloat16().float() if is_rounded else part
        out[token] = total.bfloat16()
    return out


def _stages(rank: int, homes: str) -> list[tuple[bool, list[int]]]:
    """(Whether their sum is rounded, ranks) in the order of addition: a host stands where its first rank does."""
    stages = []
    for owner, home in enumerate(homes):
        if home == homes[rank]:
            stages.append((False, [owner]))
        elif home not in homes[:owner]:
            stages.append((True, [other for other, where in enumerate(homes) if where == home]))
    return stages


def on_ranks(num_ranks: int, rank_main: Callable[[deep_ep.Buffer], Any], **options: Any) -> list[Any]:
    """Run ``rank_main(buffer)`` on every rank, a thread each."""

    def main(member: Any) -> Any:
        buffer = deep_ep.Buffer(member, explicitly_destroy=True, **options)
        try:
            return rank_main(buffer)
        finally:
            buffer.destroy()

    return anyep.local_group(num_ranks).run(main)


def send(buffer: deep_ep.Buffer, given: Inputs, x: Any = None, **options: Any) -> tuple[Any, ...]:
    """Dispatch as programs do: layout first."""
    per_rank, per_host, per_expert, inside, _ = buffer.get_dispatch_layout(given.topk_idx, options.pop("experts", E))
    return buffer.dispatch(
        given.x if x is None else x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_host,
        is_token_in_rank=inside,
        num_tokens_per_expert=per_expert,
        **({"topk_idx": given.topk_idx, "topk_weights": given.topk_weights} | options),
    )


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Compare dtype, shape and every byte."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.flatten().clone().view(torch.uint8), right.flatten().clone().view(torch.uint8))
    )
