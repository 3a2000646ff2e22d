"""Acts that take turns on one device, and their times. One that fails is named, and the others go on."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from anyep.kernels.spec_device import DeviceKernels
from benchmarks.gpu.stopwatch import GpuStopwatch, HostStopwatch

Stopwatch = GpuStopwatch | HostStopwatch
Act = Callable[[], object]
COPY = ("copy", "device to device")
LAUNCH = ("launch", "100 kernels, graph")
_TICKS = 100


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
    launches: int
    """kernels that follow one another in it; 0 where nobody counted"""
    launch_us: float | None
    """what as many kernels take that do nothing, in a graph"""
    rounds: int


class _Act(NamedTuple):
    work: str
    what: str
    spent: Callable[[], float]
    num_bytes: int
    launches: int


class Contest:
    """Acts that take turns, so that all see the same device."""

    def __init__(self, stopwatch: Stopwatch, rounds: int) -> None:
        self.stopwatch = stopwatch
        self.problems: list[str] = []
        """what went wrong, and in what"""
        self._rounds = rounds
        self._acts: list[_Act] = []

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Note an error in ``what`` and go on. Raises what the device says where it does not answer any more."""
        before = len(self.problems)
        with self._noting(what):
            yield
        if len(self.problems) == before:
            print(f"{what}: right", flush=True)

    def add(self, work: str, what: str, act: Act, num_bytes: int = 0, launches: int = 0) -> None:
        self._acts.append(_Act(work, what, lambda: self.stopwatch.us(act), num_bytes, launches))

    def add_host(self, work: str, what: str, act: Act, calls: int) -> None:
        """Time the host instead, by call."""
        self._acts.append(_Act(work, what, lambda: self.stopwatch.host_us(act) / calls, 0, 0))

    def run(self) -> list[Row]:
        """Return a row an act; shares are of the copy that took part. An act that fails has no row."""
        shuffler = random.Random(0)
        times: dict[int, list[float]] = {number: [] for number in range(len(self._acts))}
        for turn in range(self._rounds + 1):
            for number in shuffler.sample(sorted(times), len(times)):
                act = self._acts[number]
                before = len(self.problems)
                with self._noting(f"{act.work}, {act.what}, round {turn}"):
                    us = act.spent()
                if len(self.problems) > before:
                    del times[number]
                elif turn:
                    times[number].append(us)
        medians = {number: statistics.median(us) for number, us in times.items() if us}
        copy_us = self._yardstick(medians, COPY)
        launch_us = self._yardstick(medians, LAUNCH)
        return [] if copy_us is None else [self._row(number, times[number], copy_us, launch_us) for number in medians]

    def _yardstick(self, medians: dict[int, float], name: tuple[str, str]) -> float | None:
        """Return what a byte, or a launch, of a yardstick took; None where it did not take part."""
        for number, us in medians.items():
            act = self._acts[number]
            if (act.work, act.what) == name:
                return us / (act.num_bytes or act.launches)
        return None

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.problems.append(f"{what}: {type(error).__name__}: {error}")
            print(self.problems[-1], flush=True)
            self.stopwatch.settle()

    def _row(self, number: int, us: list[float], us_a_byte: float, us_a_launch: float | None) -> Row:
        act = self._acts[number]
        median = statistics.median(us)
        floor = act.num_bytes * us_a_byte if act.num_bytes else None
        return Row(
            work=act.work,
            what=act.what,
            us_median=median,
            us_min=min(us),
            us_p90=statistics.quantiles(us, n=10)[-1] if len(us) > 1 else us[0],
            bytes=act.num_bytes,
            floor_us=floor,
            copy_share=None if floor is None else floor / median,
            launches=act.launches,
            launch_us=None if us_a_launch is None or not act.launches else us_a_launch * act.launches,
            rounds=len(us),
        )


def add_copy(contest: Contest, num_bytes: int) -> None:
    """Add the yardstick: torch's copy between two tensors."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=contest.stopwatch.device)
    target = torch.empty_like(source)
    contest.add(*COPY, lambda: target.copy_(source), 2 * num_bytes)


def add_launches(contest: Contest, kernels: DeviceKernels) -> None:
    """Add the other yardstick: kernels that do next to nothing, one behind the other in a graph."""
    words = torch.zeros(2, dtype=torch.int64, device=contest.stopwatch.device)
    clock, epoch = words.data_ptr(), words.data_ptr() + 8

    def tick() -> torch.Tensor:
        for _ in range(_TICKS):
            kernels.tick(clock, epoch)
        return words

    with contest.noting("launches in a graph"):
        replay, _ = contest.stopwatch.graph(tick)
        contest.add(*LAUNCH, replay, launches=_TICKS)


def as_json(rows: list[Row]) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]
