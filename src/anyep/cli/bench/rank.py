"""What one rank does for every workload: check each operation, time it, check again, then meet the peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from anyep.cli.bench.copy_speed import COPY, CopyProbe
from anyep.cli.bench.ours import DTYPES, Ours, poison
from anyep.cli.bench.peers import open_peer
from anyep.cli.bench.plan import Plan, Workload
from anyep.cli.bench.rounds import Operation, Spans, contest
from anyep.cli.bench.routing import make_exchange
from anyep.cli.bench.tape import Tape
from anyep.cli.bench.verify import check_combined, check_peer, check_received, check_same, check_same_batch
from anyep.exchange.handle import Received
from anyep.testing.oracle import Exchange

WARM_UP = 3
"""Rounds that are not counted: the allocator and the processor's caches reach their steady state."""
OURS = "anyep"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One unit of progress, with what is being done."""

    text: str


Report = Callable[[Step], None]


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """One contest as one rank saw it."""

    workload: Workload
    contest: str
    """``"anyep"`` for the table of operations, else the peer's name"""
    names: list[str]
    spans: Spans
    """[rounds, names, 2]"""
    rows: int
    """that this rank received"""
    mismatches: dict[str, str] = field(default_factory=dict)
    """operation -> the first difference; empty when every byte was right"""


def num_steps(plan: Plan) -> int:
    """Return how many steps a rank reports."""
    per_contest = [1 + WARM_UP + plan.rounds_of(workload) for workload in plan.workloads]
    return sum(per_contest) * (1 + len(plan.peers)) + 2 * len(plan.workloads)


def run_rank(group: object, plan: Plan, report: Report, communicator: Any = None) -> list[RankResult]:
    """Carry out the plan. Collective; ``communicator`` is the mpi4py one where MPICH takes part."""
    probe = CopyProbe()
    results = []
    for workload in plan.workloads:
        exchange = make_exchange(workload, plan.ranks)
        tape = Tape(workload.hidden, DTYPES[workload.wire])
        report(Step(text=f"{_title(workload)}: set up"))
        contests = _Contests(
            group=group, plan=plan, workload=workload, exchange=exchange, tape=tape, probe=probe, report=report
        )
        results += contests.run(communicator)
    return results


@dataclass(frozen=True, kw_only=True, eq=False)
class _Contests:
    """All contests of one workload on one rank."""

    group: object
    plan: Plan
    workload: Workload
    exchange: Exchange
    tape: Tape
    probe: CopyProbe
    report: Report

    def run(self, communicator: Any) -> list[RankResult]:
        with Ours(
            self.group,
            self.workload,
            self.exchange,
            self.tape,
            transport=self.plan.transport,
            timeout_s=self.plan.timeout_s,
        ) as ours:
            return [self._own(ours), *(self._against(ours, name, communicator) for name in self.plan.peers)]

    def _own(self, ours: Ours) -> RankResult:
        self._say("checking every byte")
        checks = _OwnChecks(ours, self.exchange, self.workload.wire)
        mismatches = checks.first()
        operations = [Operation(name=COPY, run=self.probe.run), *ours.operations()]
        spans = self._contest(ours, operations, "timing")
        self._say("checking every byte again")
        mismatches = {**checks.again(), **mismatches}
        del checks  # its copies are as large as the batch; a comparison needs that memory
        return self._result(ours, OURS, operations, spans, mismatches)

    def _against(self, ours: Ours, name: str, communicator: Any) -> RankResult:
        self._say(f"checking {name}")
        rank = ours.ep.rank
        peer, layout = open_peer(name, communicator, ours, self.workload, self.exchange)
        try:
            difference = check_peer(peer, layout, rank, self.tape)
            turn = Operation(name=name, run=lambda: peer.combine(peer.dispatch()))
            operations = [*ours.together(), turn]
            spans = self._contest(ours, operations, f"against {name}")
        finally:
            peer.close()
        return self._result(ours, name, operations, spans, {name: difference} if difference else {})

    def _contest(self, ours: Ours, operations: list[Operation], text: str) -> Spans:
        return contest(
            operations,
            rounds=self.plan.rounds_of(self.workload),
            warm_up=WARM_UP,
            barrier=ours.ep.barrier,
            after_round=lambda: self._say(text),
        )

    def _result(
        self, ours: Ours, name: str, operations: list[Operation], spans: Spans, mismatches: dict[str, str]
    ) -> RankResult:
        return RankResult(
            workload=self.workload,
            contest=name,
            names=[operation.name for operation in operations],
            spans=spans,
            rows=ours.handle.num_rows,
            mismatches=mismatches,
        )

    def _say(self, text: str) -> None:
        self.report(Step(text=f"{_title(self.workload)}: {text}"))


class _OwnChecks:
    """The first result of each kind is judged by the oracle, byte by byte; all others must be the same bits.

    Memory is poisoned before it is written, so that what an operation forgets to write is seen.
    """

    def __init__(self, ours: Ours, exchange: Exchange, wire: str) -> None:
        self._ours = ours
        self._exchange = exchange
        self._wire = wire
        self._batch: Received | None = None
        self._sum = torch.empty(0)

    def first(self) -> dict[str, str]:
        """Judge by the oracle and return the mismatches by operation."""
        ours, rank = self._ours, self._ours.ep.rank
        poison(ours.dispatch())
        self._batch = _outside(ours.dispatch())
        received = check_received(self._batch, self._exchange, rank, ours.tape, self._wire)
        ours.poison_out()
        self._sum = ours.combine(ours.in_arena).clone()
        combined = check_combined(self._sum, self._exchange, rank, ours.tape)
        judged = {"dispatch": received, "combine": combined}
        return {**self.again(), **{name: text for name, text in judged.items() if text}}

    def again(self) -> dict[str, str]:
        """Compare every operation's result with what :meth:`first` has judged; return the mismatches."""
        ours = self._ours
        found = {
            "dispatch": self._batch_of(ours.dispatch),
            "dispatch_cached": self._batch_of(ours.dispatch_cached),
            "combine": self._sum_of(lambda: ours.combine(ours.in_arena)),
            "combine_copied_in": self._sum_of(lambda: ours.combine(ours.outside)),
            "dispatch_combine": self._both_of(ours.in_arena),
            "dispatch_combine_copied_in": self._both_of(ours.outside),
        }
        return {name: text for name, text in found.items() if text}

    def _batch_of(self, dispatch: Callable[[], Received]) -> str | None:
        poison(self._ours.dispatch())
        assert self._batch is not None
        return check_same_batch(dispatch(), self._batch)

    def _sum_of(self, combine: Callable[[], torch.Tensor]) -> str | None:
        self._ours.poison_out()
        return check_same("combined", combine(), self._sum)

    def _both_of(self, y: torch.Tensor) -> str | None:
        self._ours.poison_out()
        batch = self._batch_of(lambda: self._ours.both(y))
        return batch or check_same("combined", self._ours.out, self._sum)


def _outside(received: Received) -> Received:
    """Copy a batch out of the arena."""

    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.clone()

    return replace(
        received,
        x=received.x.clone(),
        scales=copy(received.scales),
        topk_idx=copy(received.topk_idx),
        topk_weights=copy(received.topk_weights),
    )


def _title(workload: Workload) -> str:
    return f"{workload.name} {workload.wire}"
