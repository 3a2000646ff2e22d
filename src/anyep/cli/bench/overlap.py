"""How much of an exchange hides behind computation of the same length: ``wait=False``, matrix products, ``wait()``.

Half of the computation runs between dispatch's two halves, half between combine's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.cli.bench.plan import Workload
from anyep.cli.bench.rounds import Operation, durations_us
from anyep.cli.bench.stage import OVERLAP, Checks, RankResult, Side, Stage
from anyep.exchange.handle import Received
from anyep.transport.rendezvous import find_rendezvous

_COMPUTE, _COMMUNICATE, _OVERLAPPED = "compute", "communicate", "overlapped"
TRIAL_ROUNDS = 5
_ROWS, _CHANNELS = 32, 256
"""A unit of computation takes about 0.1 ms of one core, in its own caches."""


@dataclass(frozen=True, kw_only=True)
class OverlapRow:
    """One layout of one workload, all ranks together."""

    ranks: int
    workload: Workload
    layout: str
    compute_us: NDArray[np.float64]
    communicate_us: NDArray[np.float64]
    overlapped_us: NDArray[np.float64]
    verified: bool

    @property
    def hidden_share(self) -> float:
        """1 - (both - computation alone) / exchange alone, of medians over the same rounds.

        1: all is hidden. 0: nothing is. Below 0: doing both together takes longer than one after the other.
        """
        both, compute, communicate = map(np.median, (self.overlapped_us, self.compute_us, self.communicate_us))
        return float(1 - (both - compute) / communicate)


class Computation:
    """Matrix products on memory of their own."""

    def __init__(self) -> None:
        self._x = torch.ones(_ROWS, _CHANNELS)
        self._weights = torch.full((_CHANNELS, _CHANNELS), 1 / _CHANNELS)
        self._out = torch.empty(_ROWS, _CHANNELS)
        self.units = 1

    def half(self) -> None:
        for _ in range(self.units):
            torch.mm(self._x, self._weights, out=self._out)

    def whole(self) -> None:
        self.half()
        self.half()


def overlap(stage: Stage, side: Side, checks: Checks, layout: str) -> RankResult:
    """Time computation, exchange, and both together. ``checks`` know the right bytes already."""
    compute = Computation()
    communicate = Operation(name=_COMMUNICATE, run=side.together()[0].run)
    operations = [
        Operation(name=_COMPUTE, run=compute.whole),
        communicate,
        Operation(name=_OVERLAPPED, run=_overlapped(side, compute)),
    ]
    compute.units = _units(stage, side, operations[:2])
    mismatch = checks.both_of(_overlapped(side, compute))
    rounds = stage.plan.rounds_of(stage.workload, alone=True)
    spans = stage.contest(side, operations, f"overlap, {layout}", rounds=rounds)
    mismatch = checks.both_of(_overlapped(side, compute)) or mismatch
    mismatches = {_OVERLAPPED: mismatch} if mismatch else {}
    return stage.result(side, f"{OVERLAP} {layout}", operations, spans, mismatches=mismatches)


def _overlapped(side: Side, compute: Computation) -> Callable[[], Received]:
    def run() -> Received:
        dispatching = side.start_dispatch()
        compute.half()
        received = dispatching.wait()
        combining = side.start_combine(received.handle)
        compute.half()
        combining.wait()
        return received

    return run


def _units(stage: Stage, side: Side, operations: list[Operation]) -> int:
    """Return how many units make a half of what lasts as long as the exchange, the same on all ranks. Collective."""
    spans = stage.contest(side, operations, "how long to compute", rounds=TRIAL_ROUNDS)
    compute_ns, communicate_ns = np.median(spans[..., 1] - spans[..., 0], axis=0)
    wanted = json.dumps(float(communicate_ns / compute_ns)).encode()
    told = [float(json.loads(text)) for text in find_rendezvous(stage.group).allgather(wanted)]
    return max(1, round(median(told)))


def overlap_row(ranks: tuple[RankResult, ...]) -> OverlapRow:
    """Put together what every rank saw."""
    us = dict(zip(ranks[0].names, durations_us([rank.spans for rank in ranks]).T, strict=True))
    return OverlapRow(
        ranks=len(ranks),
        workload=ranks[0].workload,
        layout=ranks[0].contest.removeprefix(OVERLAP).strip(),
        compute_us=us[_COMPUTE],
        communicate_us=us[_COMMUNICATE],
        overlapped_us=us[_OVERLAPPED],
        verified=not any(rank.mismatches for rank in ranks),
    )


def overlap_json(row: OverlapRow) -> dict[str, Any]:
    """Return a row as documented in docs/benchmark.md."""
    workload = row.workload
    medians = {
        "compute_us_median": row.compute_us,
        "communicate_us_median": row.communicate_us,
        "overlapped_us_median": row.overlapped_us,
    }
    return {
        "workload": workload.name,
        "layout": row.layout,
        "ranks": row.ranks,
        "tokens": workload.tokens,
        "hidden": workload.hidden,
        "topk": workload.topk,
        "experts": workload.experts,
        "wire": workload.wire,
        "routing": workload.routing,
        **{name: round(float(np.median(values)), 1) for name, values in medians.items()},
        "hidden_share": round(row.hidden_share, 3),
        "verified": row.verified,
        "rounds": len(row.compute_us),
    }
