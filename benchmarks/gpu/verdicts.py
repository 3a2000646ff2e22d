"""What is wanted of each work, and what came: one line for each row of the table in docs/gpu.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.gpu.contest import Row
from benchmarks.gpu.work import Work

COPY_SHARE = 0.80
FLOORS = 2.0
"""Times of the memory floor and the launches together."""
TIMES_TORCH = {"prefill": 5.0, "decode": 10.0}
HOST_US = 60.0
PARTS = ("dispatch", "combine")

Rows = Mapping[tuple[str, str], Row]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One row. ``got`` is None, and ``reached`` too, where it was not measured: what is missing is no success."""

    what: str
    unit: str
    wanted: float
    at_least: bool
    got: float | None

    @property
    def reached(self) -> bool | None:
        if self.got is None:
            return None
        return self.got >= self.wanted if self.at_least else self.got <= self.wanted


def verdicts(rows: list[Row], prefill: Work, decode: Work) -> list[Verdict]:
    """Return all verdicts, also of what was not measured."""
    named = {(row.work, row.what): row for row in rows}
    return [
        *_shares(named, prefill),
        *_floors(named, decode),
        *_torch(named, prefill, decode),
        *_host(named, prefill, decode),
    ]


def _shares(rows: Rows, work: Work) -> Iterator[Verdict]:
    for part in PARTS:
        row = rows.get((work.title, f"{part}, launched"))
        got = None if row is None else row.copy_share
        yield Verdict(what=f"{work.title}, {part}", unit="of the copy", wanted=COPY_SHARE, at_least=True, got=got)


def _floors(rows: Rows, work: Work) -> Iterator[Verdict]:
    for what in ("all sends, graph", "all receives, graph", "combine, graph"):
        row = rows.get((work.title, what))
        got = None
        if row is not None and row.floor_us is not None and row.launch_us is not None:
            got = row.us_median / (row.floor_us + row.launch_us)
        yield Verdict(what=f"{work.title}, {what}", unit="of floor + launches", wanted=FLOORS, at_least=False, got=got)


def _torch(rows: Rows, prefill: Work, decode: Work) -> Iterator[Verdict]:
    """Both at their best: launched, or replayed."""
    for kind, work in (("prefill", prefill), ("decode", decode)):
        for part in PARTS:
            ours = _best(rows, work, f"{part}, launched", f"{part}, graph")
            theirs = _best(rows, work, f"{part}, torch", f"{part}, torch, graph")
            got = None if ours is None or theirs is None else theirs / ours
            what = f"{work.title}, {part} against torch"
            yield Verdict(what=what, unit="times as fast", wanted=TIMES_TORCH[kind], at_least=True, got=got)


def _host(rows: Rows, *works: Work) -> Iterator[Verdict]:
    for work in works:
        for part in PARTS:
            what = f"{part}, host by call"
            row = rows.get((work.title, what))
            got = None if row is None else row.us_median
            yield Verdict(what=f"{work.title}, {what}", unit="us", wanted=HOST_US, at_least=False, got=got)


def _best(rows: Rows, work: Work, *names: str) -> float | None:
    found = [rows[work.title, name].us_median for name in names if (work.title, name) in rows]
    return min(found) if found else None


def lines(told: list[Verdict]) -> str:
    """Return one line a verdict."""
    head = f"{'wanted of':<44}{'':<22}{'wanted':>12}{'came':>12}  verdict"
    return "\n".join([head, *map(_line, told)])


def _line(one: Verdict) -> str:
    bound = f"{'>=' if one.at_least else '<='} {one.wanted:g}"
    came = "" if one.got is None else f"{one.got:.2f}"
    verdict = {None: "not measured", True: "reached", False: "missed"}[one.reached]
    return f"{one.what:<44}{one.unit:<22}{bound:>12}{came:>12}  {verdict}"
