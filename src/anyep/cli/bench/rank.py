"""What one rank does for every workload: check each operation, time it, check again, then meet the peers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from anyep.cli.bench.compact_checks import CompactChecks
from anyep.cli.bench.copy_speed import COPY, CopyProbe
from anyep.cli.bench.ours import DTYPES, Ours
from anyep.cli.bench.overlap import TRIAL_ROUNDS, overlap
from anyep.cli.bench.padded import Padded
from anyep.cli.bench.padded_checks import PaddedChecks
from anyep.cli.bench.peers import open_peer
from anyep.cli.bench.plan import Plan, Workload
from anyep.cli.bench.rounds import Operation
from anyep.cli.bench.routing import make_exchange
from anyep.cli.bench.stage import LATENCY, OURS, PADDED, WARM_UP, Checks, RankResult, Report, Side, Stage, count_hops
from anyep.cli.bench.sweep import sweep
from anyep.cli.bench.tape import Tape
from anyep.cli.bench.verify import check_peer


def num_steps(plan: Plan) -> int:
    """Return how many steps a rank reports."""
    latency = sum(
        2 * (2 + WARM_UP + plan.rounds_of(workload, alone=True) + _steps_in_a_row(plan, workload))
        for workload in plan.latency
    )
    sweep = sum(2 + WARM_UP + plan.sweep_rounds_of(workload) for workload in plan.sweep)
    return sum(_steps(plan, workload) for workload in plan.workloads) + latency + sweep


def _steps(plan: Plan, workload: Workload) -> int:
    own = 2 + WARM_UP + plan.rounds_of(workload, alone=True)
    against = 1 + WARM_UP + plan.rounds_of(workload) + _steps_in_a_row(plan, workload)
    both = TRIAL_ROUNDS + 2 * WARM_UP + plan.rounds_of(workload, alone=True)
    overlaps = workload.is_small + workload.padded
    return (1 + workload.padded) * (own + len(plan.peers) * against) + overlaps * both + 1


def _steps_in_a_row(plan: Plan, workload: Workload) -> int:
    return WARM_UP + plan.turns_in_a_row_of(workload) if workload.is_small else 0


def run_rank(group: object, plan: Plan, report: Report, communicator: Any = None) -> list[RankResult]:
    """Carry out the plan. Collective; ``communicator`` is the mpi4py one where MPICH takes part."""
    results = []
    for workload in plan.workloads:
        results += _Contests(_stage(group, plan, workload, report), CopyProbe(), communicator).run()
    for workload in plan.latency:
        results += _latency(_stage(group, plan, workload, report))
    for workload in plan.sweep:
        results.append(sweep(_stage(group, plan, workload, report)))
    return results


def _stage(group: object, plan: Plan, workload: Workload, report: Report) -> Stage:
    exchange = make_exchange(workload, plan.ranks)
    return Stage(group=group, plan=plan, workload=workload, exchange=exchange, report=report)


@contextmanager
def _compact(stage: Stage) -> Iterator[tuple[Side, Checks]]:
    plan, workload, exchange = stage.plan, stage.workload, stage.exchange
    tape = Tape(workload.hidden, DTYPES[workload.wire])
    with Ours(stage.group, workload, exchange, tape, transport=plan.transport, timeout_s=plan.timeout_s) as ours:
        yield ours, CompactChecks(ours, exchange, workload.wire)


@contextmanager
def _padded(stage: Stage) -> Iterator[tuple[Side, Checks]]:
    """Its blocks are large: the buffer lives for its contests only."""
    plan, workload, exchange = stage.plan, stage.workload, stage.exchange
    with Padded(stage.group, workload, exchange, transport=plan.transport, timeout_s=plan.timeout_s) as padded:
        yield padded, PaddedChecks(padded, exchange, workload.wire)


def _latency(stage: Stage) -> list[RankResult]:
    """Time small batches with nothing between them that would clear the caches."""
    results = []
    for opened in (_compact, _padded):
        with opened(stage) as (side, checks):
            results.append(_own(stage, side, checks, LATENCY, before=[], in_a_row=True))
    return results


def _own(
    stage: Stage, side: Side, checks: Checks, name: str, before: list[Operation], in_a_row: bool = False
) -> RankResult:
    """Time all of a side's operations; ``before``: others of the same rounds."""
    stage.say("checking every byte")
    mismatches = checks.first()
    operations = [*before, *side.operations()]
    spans = stage.contest(side, operations, "timing", rounds=stage.plan.rounds_of(stage.workload, alone=True))
    row_spans = stage.contest_in_a_row(side, operations, "timing") if in_a_row else None
    stage.say("checking every byte again")
    mismatches = {**checks.again(), **mismatches}
    hops = count_hops(side)
    return stage.result(side, name, operations, spans, mismatches=mismatches, hops=hops, row_spans=row_spans)


@dataclass(frozen=True)
class _Contests:
    """All contests of one workload on one rank."""

    stage: Stage
    probe: CopyProbe
    communicator: Any

    def run(self) -> list[RankResult]:
        self.stage.say("set up")
        results = []
        with _compact(self.stage) as (side, checks):
            results.append(self._own(side, checks, OURS))
            if self.stage.workload.is_small:
                results.append(overlap(self.stage, side, checks, "compact"))
            del checks  # its copies are as large as the batch; a comparison needs that memory
            results += [self._against(side, name) for name in self.stage.plan.peers]
        if self.stage.workload.padded:
            with _padded(self.stage) as (side, checks):
                results.append(self._own(side, checks, PADDED))
                results.append(overlap(self.stage, side, checks, "padded"))
                results += [self._against(side, name) for name in self.stage.plan.peers]
        return results

    def _own(self, side: Side, checks: Checks, name: str) -> RankResult:
        return _own(self.stage, side, checks, name, before=[Operation(name=COPY, run=self.probe.run)])

    def _against(self, side: Side, name: str) -> RankResult:
        self.stage.say(f"checking {name}")
        peer, layout = open_peer(name, self.communicator, side, self.stage.workload, self.stage.exchange)
        try:
            difference = check_peer(peer, layout, side.ep.rank, side.tape)
            turn = Operation(name=name, run=lambda: peer.combine(peer.dispatch()))
            operations = [*side.together(), turn]
            spans = self.stage.contest(
                side, operations, f"against {name}", rounds=self.stage.plan.rounds_of(self.stage.workload)
            )
            row_spans = self.stage.contest_in_a_row(side, operations, f"against {name}")
        finally:
            peer.close()
        mismatches = {name: difference} if difference else {}
        return self.stage.result(side, name, operations, spans, mismatches=mismatches, row_spans=row_spans)
