"""Random programs: what every rank calls, in one order, and how each rank waits for it in its own."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import cached_property

import pytest
import torch
from hypothesis import strategies as st

import anyep
from anyep.layout.hosts import HostMap
from anyep.numerics.logfmt import decode_logfmt, encode_logfmt
from anyep.testing.oracle_sums import expected_sum
from tests.exchange.cases import EAGER_BYTES, LAYOUTS, WIRES, Case
from tests.exchange.rounds import ReceivedCopy, assert_same, check_received

MOST_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call that all ranks make: "dispatch", "again" (cached), "combine", "barrier" or "quarrel" (they differ)."""

    kind: str
    case: Case
    """the batch that goes out, or came and goes back"""
    of: int = -1
    """number of the dispatch whose handle is taken"""
    reduce: str = "rank"
    wire: str | None = None


@dataclass(frozen=True, kw_only=True)
class Program:
    """Steps, and a seed for what each rank decides alone: which calls it waits for, when, and which it drops."""

    base: Case
    steps: tuple[Step, ...]
    max_in_flight: int
    seed: int

    @cached_property
    def taken_up(self) -> set[int]:
        """Dispatches whose handle is used later."""
        return {step.of for step in self.steps}


@dataclass(kw_only=True)
class Diary:
    """What one rank gave and got, by step."""

    received: dict[int, ReceivedCopy] = field(default_factory=dict)
    given: dict[int, torch.Tensor] = field(default_factory=dict)
    combined: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    refused: list[int] = field(default_factory=list)


class Player:
    """One rank on its way through a program."""

    def __init__(self, program: Program, ep: anyep.Buffer) -> None:
        self._program = program
        self._ep = ep
        self._random = random.Random(program.seed * 64 + ep.rank)
        self._pending: dict[int, anyep.Pending] = {}
        self._kept: dict[int, anyep.Received] = {}
        self._handles: dict[int, anyep.Handle] = {}
        self._diary = Diary()

    def play(self) -> Diary:
        eagerness = self._random.choice([0.1, 0.4, 0.8])
        for number, step in enumerate(self._program.steps):
            if step.of in self._pending:
                self._land(step.of)
            if step.kind == "barrier":
                self._ep.barrier()
            elif self._random.random() < 0.35:
                self._note(number, lambda number=number: self._call(number, wait=True))
            else:
                while len(self._pending) >= self._program.max_in_flight:
                    self._let_go()
                self._pending[number] = self._call(number, wait=False)
            while self._pending and self._random.random() < eagerness:
                self._let_go()
        while self._pending and self._random.random() < 0.95:  # else the buffer's end finds some in flight
            self._let_go()
        for number, received in self._kept.items():
            self._diary.received[number] = ReceivedCopy.of(received)
        return self._diary

    def _let_go(self) -> None:
        """Wait for any result, or drop one that nobody needs."""
        number = self._random.choice(list(self._pending))
        if number not in self._program.taken_up and self._random.random() < 0.2:
            del self._pending[number]
        else:
            if self._random.random() < 0.2:
                self._pending[number].done()
            self._land(number)

    def _land(self, number: int) -> None:
        self._note(number, self._pending.pop(number).wait)

    def _call(self, number: int, *, wait: bool) -> object:
        step, ep = self._program.steps[number], self._ep
        batch = step.case.batches[ep.rank]
        if step.kind == "again":
            return ep.dispatch(batch.x, None, batch.topk_weights, handle=self._handles[step.of], wait=wait)
        if step.kind == "combine":
            return self._combine(number, wait=wait)
        layout = step.case.layout
        if step.kind == "quarrel" and ep.rank == number % ep.num_ranks:
            layout = "expert" if layout == "compact" else "compact"
        return ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights, layout=layout, wait=wait)

    def _combine(self, number: int, *, wait: bool) -> object:
        step, handle = self._program.steps[number], self._handles[self._program.steps[number].of]
        dtype = torch.bfloat16 if step.case.wire == "fp8" else step.case.batches[0].x.dtype
        shape = (*handle.shape, step.case.hidden)
        y = self._ep.empty_output(handle) if self._random.random() < 0.5 else torch.empty(shape, dtype=dtype)
        generator = torch.Generator().manual_seed(step.case.seed + 31 * self._ep.rank + number)
        y.copy_(torch.randn(shape, generator=generator))
        self._diary.given[number] = y.clone()
        weights = None
        if step.case.layout != "padded" and step.case.with_weights:
            weights = torch.rand((handle.num_rows, step.case.num_topk), generator=generator)
            self._diary.given[-number] = weights
        bias = step.case.batches[self._ep.rank].bias or None
        return self._ep.combine(
            y, handle, topk_weights=weights, bias=bias, reduce=step.reduce, wire=step.wire, wait=wait
        )

    def _note(self, number: int, outcome) -> None:
        """Write down what came; batches of some dispatches only at the end, when much has happened since."""
        step = self._program.steps[number]
        if step.kind == "quarrel":
            with pytest.raises(ValueError, match="layout is"):
                outcome()
            self._diary.refused.append(number)
        elif step.kind == "combine":
            result = outcome()
            pair = (result.x, result.topk_weights) if isinstance(result, anyep.Combined) else (result, None)
            self._diary.combined[number] = pair
        else:
            received = outcome()
            self._handles[number] = received.handle
            if self._random.random() < 0.4:
                self._kept[number] = received
            else:
                self._diary.received[number] = ReceivedCopy.of(received)


def check_program(program: Program, diaries: list[Diary], hosts: HostMap | None = None) -> None:
    """Compare what every rank got with the oracle, bit for bit."""
    for rank, diary in enumerate(diaries):
        for number, received in diary.received.items():
            check_received(program.steps[number].case, rank, received)
        for number, (x, weights) in diary.combined.items():
            _check_combined(program.steps[number], number, rank, diaries, x, weights, hosts)


def _check_combined(
    step: Step, number: int, rank: int, diaries: list[Diary], x, weights, hosts: HostMap | None
) -> None:
    case = step.case

    def rows(owner: int, row: torch.Tensor) -> torch.Tensor:
        chosen = diaries[owner].given[number].view(-1, case.hidden)[row]
        return chosen if step.wire is None else decode_logfmt(encode_logfmt(chosen), case.hidden)

    batch = case.batches[rank]
    factors = batch.topk_weights if case.layout == "padded" else None
    options = {"reduce": step.reduce, "bias": batch.bias, "factors": factors, "hosts": hosts}
    assert_same("combined", x, expected_sum(case.exchange, rank, rows, dtype=x.dtype, **options))
    if weights is not None:
        back = expected_sum(
            case.exchange,
            rank,
            lambda owner, row: diaries[owner].given[-number][row],
            dtype=torch.float32,
            reduce=step.reduce,
            hosts=hosts,
        )
        assert_same("returned weights", weights, back)


@st.composite
def programs(draw: st.DrawFn, ranks: st.SearchStrategy[int] | None = None) -> Program:
    """Draw a program of 3 to 14 steps; R 1 to 5, T 0 to 24."""
    num_ranks = draw(st.integers(1, 5) if ranks is None else ranks)
    wire = draw(st.sampled_from(WIRES))
    base = Case(
        num_tokens=(MOST_TOKENS,) * num_ranks,
        hidden=draw(st.sampled_from([1, 17, 128, 200])),
        num_topk=draw(st.integers(1, 5)),
        num_experts=draw(st.integers(1, 12)),
        wire=wire,
        scales=draw(st.sampled_from(["fp32", "pow2", "ue8m0"])) if wire == "fp8" else "fp32",
        layout="compact",
        alignment=draw(st.sampled_from([1, 4])),
        idx_dtype=torch.int64,
        with_weights=True,
        num_bias=0,
        reduce="rank",
        skew=1.0,
        placement=None,
        spare_rows=None,
        num_threads=1,
        seed=0,
        eager_bytes=draw(st.sampled_from(EAGER_BYTES)),
        max_tokens=MOST_TOKENS,
    )
    steps: list[Step] = []
    for number in range(draw(st.integers(3, 14))):
        steps.append(draw(_steps(base, steps, number)))
    return Program(
        base=base, steps=tuple(steps), max_in_flight=draw(st.integers(1, 5)), seed=draw(st.integers(0, 1 << 20))
    )


@st.composite
def _steps(draw: st.DrawFn, base: Case, earlier: list[Step], number: int) -> Step:
    known = [i for i, step in enumerate(earlier) if step.kind in ("dispatch", "again")]
    kinds = ["dispatch"] * 4 + (["quarrel"] if base.num_ranks > 1 else []) + ["barrier"]
    kind = draw(st.sampled_from(kinds + ["combine"] * 5 * bool(known) + ["again"] * 2 * bool(known)))
    if kind in ("combine", "again"):
        of = draw(st.sampled_from(known))
        case = earlier[of].case
        if kind == "again" and (case.layout != "padded" or not case.with_weights):  # padded ones stay as they were
            case = replace(case, with_weights=draw(st.booleans()))
        reduce = "rank" if case.layout == "compact" else draw(st.sampled_from(["rank", "expert"]))
        coded = kind == "combine" and case.layout == "padded" and base.wire in ("bf16", "fp8")
        wire = draw(st.sampled_from([None, "logfmt10"])) if coded else None
        return Step(kind=kind, case=case, of=of, reduce=reduce, wire=wire)
    sizes = draw(st.lists(st.sampled_from([0, 1, 3, MOST_TOKENS]), min_size=base.num_ranks, max_size=base.num_ranks))
    case = replace(
        base,
        num_tokens=tuple(sizes),
        layout=draw(st.sampled_from(LAYOUTS)),
        idx_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        with_weights=draw(st.booleans()),
        num_bias=draw(st.integers(0, 2)),
        skew=draw(st.sampled_from([1.0, 20.0])),
        seed=draw(st.integers(0, 1000)) * 16 + number,
    )
    return Step(kind=kind, case=case)
