"""One work, measured: what is launched directly and in graphs, torch's formulation, and copies, round by round."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass

import torch

from benchmarks.gpu import torch_ops
from benchmarks.gpu.correct import check_combine, check_dispatch
from benchmarks.gpu.stopwatch import GpuStopwatch, HostStopwatch
from benchmarks.gpu.torch_ops import Piece
from benchmarks.gpu.work import Inputs, Ranks, Work

Stopwatch = GpuStopwatch | HostStopwatch
Act = Callable[[], object]
SCALE_BYTES, ROUTING_BYTES = 4, 12


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line: times of all ranks together, and the share of the copy that its bytes reach."""

    work: str
    what: str
    us_median: float
    us_min: float
    us_p90: float
    bytes: int
    """each read once and written once; 0 where only time is meant"""
    floor_us: float | None
    """what a copy takes for as many bytes"""
    copy_share: float | None
    rounds: int


class Contest:
    """Acts that take turns, so that all see the same device."""

    def __init__(self, stopwatch: Stopwatch, rounds: int) -> None:
        self.stopwatch = stopwatch
        self._rounds = rounds
        self._acts: list[tuple[str, str, Callable[[], float], int]] = []

    def add(self, work: str, what: str, act: Act, num_bytes: int = 0) -> None:
        self._acts.append((work, what, lambda: self.stopwatch.us(act), num_bytes))

    def add_host(self, work: str, what: str, act: Act, calls: int) -> None:
        """Time the host instead, by call."""
        self._acts.append((work, what, lambda: self.stopwatch.host_us(act) / calls, 0))

    def run(self, copy: tuple[str, str] = ("copy", "device to device")) -> list[Row]:
        """Return a row an act; shares are of the copy that took part."""
        shuffler = random.Random(0)
        times: dict[int, list[float]] = {number: [] for number in range(len(self._acts))}
        for turn in range(self._rounds + 1):
            for number in shuffler.sample(range(len(self._acts)), len(self._acts)):
                spent = self._acts[number][2]()
                if turn:
                    times[number].append(spent)
        rates = [
            act[3] / statistics.median(times[number])
            for number, act in enumerate(self._acts)
            if (act[0], act[1]) == copy
        ]
        return [self._row(act, times[number], rates[0]) for number, act in enumerate(self._acts)]

    def _row(self, act: tuple[str, str, Callable[[], float], int], us: list[float], bytes_per_us: float) -> Row:
        work, what, _, num_bytes = act
        median = statistics.median(us)
        floor = num_bytes / bytes_per_us if num_bytes else None
        return Row(
            work=work,
            what=what,
            us_median=median,
            us_min=min(us),
            us_p90=statistics.quantiles(us, n=10)[-1] if len(us) > 1 else us[0],
            bytes=num_bytes,
            floor_us=floor,
            copy_share=None if floor is None else floor / median,
            rounds=len(us),
        )


def add_copy(contest: Contest, num_bytes: int) -> None:
    """Add the yardstick: torch's copy between two tensors."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=contest.stopwatch.device)
    target = torch.empty_like(source)
    contest.add("copy", "device to device", lambda: target.copy_(source), 2 * num_bytes)


def bytes_of(work: Work, pieces: list[list[Piece]]) -> tuple[int, int]:
    """Return the bytes that a dispatch and a combine read once and write once, all ranks together."""
    rows = sum(len(piece.row) for own in pieces for piece in own)
    tokens = work.ranks * work.tokens
    row_bytes = work.hidden + work.hidden // 128 * SCALE_BYTES
    routing = 4 if work.layout == "padded" else ROUTING_BYTES * work.topk
    return 2 * work.hidden * tokens + (row_bytes + routing) * rows, 2 * work.hidden * (rows + tokens)


class Measured:
    """A work that was found right and may be timed."""

    def __init__(self, contest: Contest, work: Work, name: str, stack: ExitStack, **options: object) -> None:
        """``stack`` closes its buffers."""
        self.work, self.name = work, name
        self._settle = contest.stopwatch.settle
        self.inputs = Inputs.draw(work, contest.stopwatch.device)
        self.pieces = torch_ops.pieces_of(work, self.inputs)
        most = max(sum(len(piece.row) for piece in own) for own in self.pieces)
        fixed = {} if work.layout == "padded" else {"static_rows": most}
        self.ranks = stack.enter_context(closing(Ranks(work, **fixed, **options)))
        self.concurrent = None
        if contest.stopwatch.has_streams:
            self.concurrent = stack.enter_context(closing(Ranks(work, **fixed, **options, concurrent=True)))
        self.counting = None if work.layout == "padded" else stack.enter_context(closing(Ranks(work, **options)))
        self._check()
        self._add(contest)

    def _check(self) -> None:
        """Compare with torch's formulation, and keep what combine works on."""
        work = self.work
        if self.counting is not None:
            counted = self.counting.dispatch(self.inputs)
            self._settle()
            check_dispatch(work, self.inputs, self.pieces, counted)
        self.received = self.ranks.dispatch(self.inputs)
        self._settle()
        self.outputs = [torch.randn(one.x.shape, device=one.x.device).bfloat16() for one in self.received]
        expected = self._torch_combine()
        for ranks in [self.ranks, *([self.concurrent] if self.concurrent else [])]:
            received = ranks.dispatch(self.inputs)
            self._settle()
            check_dispatch(work, self.inputs, self.pieces, received)
            sums = ranks.combine(self.outputs, received)
            self._settle()
            check_combine(expected, sums, self.name)

    def _torch_combine(self) -> list[torch.Tensor]:
        padded = self.work.layout == "padded"
        return torch_ops.combine(self.work, self.inputs, self.pieces, self.outputs, by_column=padded)

    def _add(self, contest: Contest) -> None:
        stopwatch, work, ranks = contest.stopwatch, self.work, self.ranks
        sent, summed = bytes_of(work, self.pieces)
        replay_dispatch, received = stopwatch.graph(lambda: ranks.dispatch(self.inputs))
        replay_combine, sums = stopwatch.graph(lambda: ranks.combine(self.outputs, self.received))
        replay_dispatch()
        replay_combine()
        self._settle()
        check_dispatch(work, self.inputs, self.pieces, received)
        check_combine(self._torch_combine(), sums, f"{self.name}, replayed")
        contest.add(self.name, "dispatch, graph", replay_dispatch, sent)
        contest.add(self.name, "combine, graph", replay_combine, summed)
        contest.add(self.name, "dispatch, launched", lambda: ranks.dispatch(self.inputs), sent)
        contest.add(self.name, "combine, launched", lambda: ranks.combine(self.outputs, self.received), summed)
        contest.add_host(self.name, "dispatch, host by call", lambda: ranks.dispatch(self.inputs), work.ranks)
        contest.add_host(
            self.name, "combine, host by call", lambda: ranks.combine(self.outputs, self.received), work.ranks
        )
        if self.counting is not None:
            counting = self.counting
            contest.add(self.name, "dispatch, host waits for counts", lambda: counting.dispatch(self.inputs), sent)
        if self.concurrent is not None:
            self._add_concurrent(contest, self.concurrent, sent, summed)
        rows = [(torch.zeros_like(one.x.view(torch.uint8).view(-1, work.hidden)), one) for one in self.received]
        out = [(x, torch.zeros(len(x), work.hidden // 128, device=x.device)) for x, _ in rows]
        contest.add(self.name, "dispatch, torch", lambda: torch_ops.dispatch(self.inputs, self.pieces, out), sent)
        contest.add(self.name, "combine, torch", self._torch_combine, summed)

    def _add_concurrent(self, contest: Contest, ranks: Ranks, sent: int, summed: int) -> None:
        received = ranks.dispatch(self.inputs)
        contest.add(self.name, "dispatch, concurrent", lambda: ranks.dispatch(self.inputs), sent)
        contest.add(self.name, "combine, concurrent", lambda: ranks.combine(self.outputs, received), summed)


def as_json(rows: list[Row]) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]
