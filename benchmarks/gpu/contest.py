"""Acts that take turns on one device, and their times. One that fails is named, and the others go on."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from benchmarks.gpu.stopwatch import GpuStopwatch, HostStopwatch

Stopwatch = GpuStopwatch | HostStopwatch
Act = Callable[[], object]


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
        self.problems: list[str] = []
        """what went wrong, and in what"""
        self._rounds = rounds
        self._acts: list[tuple[str, str, Callable[[], float], int]] = []

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Note an error in ``what`` and go on. Raises what the device says where it does not answer any more."""
        before = len(self.problems)
        with self._noting(what):
            yield
        if len(self.problems) == before:
            print(f"{what}: right", flush=True)

    def add(self, work: str, what: str, act: Act, num_bytes: int = 0) -> None:
        self._acts.append((work, what, lambda: self.stopwatch.us(act), num_bytes))

    def add_host(self, work: str, what: str, act: Act, calls: int) -> None:
        """Time the host instead, by call."""
        self._acts.append((work, what, lambda: self.stopwatch.host_us(act) / calls, 0))

    def run(self, copy: tuple[str, str] = ("copy", "device to device")) -> list[Row]:
        """Return a row an act; shares are of the copy that took part. An act that fails has no row."""
        shuffler = random.Random(0)
        times: dict[int, list[float]] = {number: [] for number in range(len(self._acts))}
        for turn in range(self._rounds + 1):
            for number in shuffler.sample(sorted(times), len(times)):
                work, what, spent, _ = self._acts[number]
                before = len(self.problems)
                with self._noting(f"{work}, {what}, round {turn}"):
                    us = spent()
                if len(self.problems) > before:
                    del times[number]
                elif turn:
                    times[number].append(us)
        rates = [
            act[3] / statistics.median(times[number])
            for number, act in enumerate(self._acts)
            if number in times and (act[0], act[1]) == copy
        ]
        return [self._row(self._acts[number], us, rates[0]) for number, us in times.items() if rates]

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.problems.append(f"{what}: {type(error).__name__}: {error}")
            print(self.problems[-1], flush=True)
            self.stopwatch.settle()

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


def as_json(rows: list[Row]) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]
