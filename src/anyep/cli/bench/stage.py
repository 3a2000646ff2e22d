"""What a rank brings to every contest of a workload, and what it takes from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from anyep.buffer import Buffer
from anyep.cli.bench.plan import Plan, Workload
from anyep.cli.bench.rounds import Operation, Spans, contest
from anyep.cli.bench.tape import Tape
from anyep.exchange.event import Pending
from anyep.exchange.handle import Handle, Received
from anyep.testing.oracle import Exchange

WARM_UP = 3
"""Rounds that are not counted: the allocator and the processor's caches reach their steady state."""
OURS, PADDED, LATENCY, SWEEP, OVERLAP = "anyep", "padded", "latency", "sweep", "overlap"
"""Contests of our operations alone; the last with a layout behind it."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One unit of progress, with what is being done."""

    text: str


Report = Callable[[Step], None]


@dataclass(frozen=True, kw_only=True)
class Ways:
    """How a rank's rows went in one dispatch and one combine: along with the announcement, or to their final place."""

    dispatch_eager: int
    dispatch_direct: int
    combine_eager: int
    combine_direct: int
    rule: str
    """up to what size rows go eagerly, and why, as the buffer explains it"""


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """One contest as one rank saw it."""

    workload: Workload
    contest: str
    """one of the names above, or the peer's"""
    names: list[str]
    spans: Spans
    """[rounds, names, 2]"""
    rows: int
    """that this rank received"""
    mismatches: dict[str, str] = field(default_factory=dict)
    """operation -> the first difference; empty when every byte was right"""
    hops: dict[str, int] = field(default_factory=dict)
    """operation -> rounds of messages that this rank awaited in it"""
    ways: dict[str, Ways] = field(default_factory=dict)
    """operation -> how this rank's rows went"""
    in_a_row: int = 0
    """calls of a turn of ``row_spans``"""
    row_spans: Spans | None = None
    """[rounds, names, 2]: the same operations, several calls in a row; None where that was not measured"""


class Side(Protocol):
    """Our side of a contest: a buffer, its batch, and operations on them."""

    ep: Buffer
    x: torch.Tensor
    """[T, H]"""
    out: torch.Tensor
    """[T, H]"""
    tape: Tape

    @property
    def num_rows(self) -> int: ...

    def operations(self) -> list[Operation]: ...

    def together(self) -> list[Operation]: ...

    def start_dispatch(self) -> Pending[Received]: ...

    def start_combine(self, handle: Handle) -> Pending[Any]: ...


class Checks(Protocol):
    """Judges every operation of a side; a mismatch is a sentence under the operation's name."""

    def first(self) -> dict[str, str]: ...

    def again(self) -> dict[str, str]: ...

    def both_of(self, both: Callable[[], Received]) -> str | None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One workload on one rank."""

    group: object
    plan: Plan
    workload: Workload
    exchange: Exchange
    report: Report

    def say(self, text: str) -> None:
        """Report one step."""
        self.report(Step(text=f"{self.workload.name} {self.workload.wire}: {text}"))

    def contest(
        self, side: Side, operations: Sequence[Operation], text: str, *, rounds: int, in_a_row: int = 1
    ) -> Spans:
        """Time ``operations`` round by round."""
        return contest(
            operations,
            rounds=rounds,
            warm_up=WARM_UP,
            barrier=side.ep.barrier,
            after_round=lambda: self.say(text),
            in_a_row=in_a_row,
        )

    def contest_in_a_row(self, side: Side, operations: Sequence[Operation], text: str) -> Spans | None:
        """Time calls of ``operations`` that follow each other; None for a workload that is large."""
        in_a_row = self.plan.in_a_row_of(self.workload)
        if not in_a_row:
            return None
        rounds = self.plan.turns_in_a_row_of(self.workload)
        return self.contest(side, operations, f"{text}, {in_a_row} in a row", rounds=rounds, in_a_row=in_a_row)

    def result(
        self,
        side: Side,
        name: str,
        operations: Sequence[Operation],
        spans: Spans,
        *,
        mismatches: dict[str, str],
        hops: dict[str, int] | None = None,
        ways: dict[str, Ways] | None = None,
        row_spans: Spans | None = None,
    ) -> RankResult:
        return RankResult(
            workload=self.workload,
            contest=name,
            names=[operation.name for operation in operations],
            spans=spans,
            rows=side.num_rows,
            mismatches=mismatches,
            hops=hops or {},
            ways=ways or {},
            in_a_row=self.plan.in_a_row_of(self.workload),
            row_spans=row_spans,
        )


def count_hops(side: Side) -> dict[str, int]:
    """Run each of our operations once more and return how many rounds of messages it awaited. Collective."""
    hops = {}
    for operation in side.operations():
        before = side.ep.stats().message_rounds
        operation.run()
        hops[operation.name] = side.ep.stats().message_rounds - before
    return hops
