"""Who goes where in a benchmark: drawn, or replayed from a trace. The same on every rank."""

from __future__ import annotations

import torch

from anyep.cli.bench.plan import TRACE, Workload
from anyep.layout.trace_file import RoutingTrace, shipped_trace
from anyep.testing.oracle import Exchange, Routing

_SEED = 2024


def make_exchange(workload: Workload, num_ranks: int) -> Exchange:
    """Return all ranks' routing, with experts on ranks in contiguous ranges."""
    drawn = {"balanced": _balanced, "zipf": _zipf}.get(workload.routing)
    if drawn is None:
        routing = _replayed(open_trace(workload.routing), workload, num_ranks)
    else:
        routing = [_routing(drawn(workload, _generator(rank)), workload, rank) for rank in range(num_ranks)]
    return Exchange(routing=routing, expert_rank=even_owners(workload.experts, num_ranks))


def open_trace(routing: str) -> RoutingTrace:
    """Return the shipped trace, or the one in the file. FileNotFoundError, and ValueError for what is no trace."""
    return shipped_trace() if routing == TRACE else RoutingTrace.load(routing)


def even_owners(num_experts: int, num_ranks: int) -> list[int]:
    """Return the owner of each expert: contiguous ranges, the first ranks own one more where E is no multiple of R."""
    share, rest = divmod(num_experts, num_ranks)
    return [rank for rank in range(num_ranks) for _ in range(share + (rank < rest))]


def _balanced(workload: Workload, generator: torch.Generator) -> torch.Tensor:
    """Scores [T, E] whose top-k are uniform."""
    return torch.rand(workload.tokens, workload.experts, generator=generator)


def _zipf(workload: Workload, generator: torch.Generator) -> torch.Tensor:
    """Scores [T, E] whose top-k are drawn without replacement with odds 1, 1/2, 1/3 ... (Gumbel's trick)."""
    places = torch.randperm(workload.experts, generator=torch.Generator().manual_seed(_SEED))
    uniform = torch.rand(workload.tokens, workload.experts, generator=generator).clamp_min(1e-12)
    return -torch.log(places + 1.0) - torch.log(-torch.log(uniform))


def _routing(scores_TE: torch.Tensor, workload: Workload, rank: int) -> Routing:
    weights = torch.rand(workload.tokens, workload.topk, generator=_generator(rank)) + 0.1
    return Routing(
        topk_idx=scores_TE.topk(workload.topk, dim=1).indices.contiguous(),
        topk_weights=weights / weights.sum(dim=1, keepdim=True),
    )


def _generator(rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(_SEED + 1 + rank)


def _replayed(trace: RoutingTrace, workload: Workload, num_ranks: int) -> list[Routing]:
    batches = trace.batches(num_ranks, workload.tokens, num_experts=workload.experts, num_topk=workload.topk)
    return [Routing(topk_idx=batch.topk_idx, topk_weights=batch.topk_weights) for batch in batches]
