"""What a sweep shows: where the ways that rows can go cross, and whether the automatic choice follows the better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyep.cli.bench.plan import Workload
from anyep.cli.bench.rounds import durations_us
from anyep.cli.bench.stage import RankResult
from anyep.cli.bench.sweep import AUTOMATIC, EAGER, RENDEZVOUS

Durations = NDArray[np.float64]
LABELS = {AUTOMATIC: "automatic", RENDEZVOUS: "always rendezvous", EAGER: "eager as far as slots go"}


@dataclass(frozen=True, kw_only=True)
class WayRow:
    """One way at one size, all ranks together; shares are of the rows of all ranks, 0 to 1."""

    us: Durations
    dispatch_eager_share: float
    combine_eager_share: float
    rule: str
    """rank 0's"""
    verified: bool

    @property
    def us_median(self) -> float:
        return float(np.median(self.us))


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """Dispatch and combine of one size, on every way."""

    ranks: int
    workload: Workload
    ways: dict[str, WayRow]

    @property
    def better(self) -> str:
        """The fixed way with the smaller median."""
        return min((RENDEZVOUS, EAGER), key=lambda name: self.ways[name].us_median)

    @property
    def ratio(self) -> float:
        """How many times as long as on the better fixed way: the median of ratios inside a round."""
        return float(np.median(self.ways[AUTOMATIC].us / self.ways[self.better].us))


def sweep_row(ranks: tuple[RankResult, ...]) -> SweepRow:
    """Put together what every rank saw of one size."""
    us = durations_us([rank.spans for rank in ranks])
    return SweepRow(
        ranks=len(ranks),
        workload=ranks[0].workload,
        ways={name: _way(ranks, name, us[:, position]) for position, name in enumerate(ranks[0].names)},
    )


def _way(ranks: tuple[RankResult, ...], name: str, us: Durations) -> WayRow:
    counted = [rank.ways[name] for rank in ranks]
    dispatched, combined = sum(one.dispatch_eager for one in counted), sum(one.combine_eager for one in counted)
    return WayRow(
        us=us,
        dispatch_eager_share=_share(dispatched, sum(one.dispatch_direct for one in counted)),
        combine_eager_share=_share(combined, sum(one.combine_direct for one in counted)),
        rule=counted[0].rule,
        verified=all(name not in rank.mismatches for rank in ranks),
    )


def _share(eager: int, direct: int) -> float:
    return eager / (eager + direct) if eager + direct else 0.0


def overflow_notes(rows: list[SweepRow]) -> list[str]:
    """Say where what is called eager did not fit the slots."""
    return [
        f"sweep: with {row.workload.tokens} tokens not all rows of the eager way fit the slots: "
        f"{100 * way.dispatch_eager_share:.0f} % came along in dispatch, {100 * way.combine_eager_share:.0f} % in "
        "combine, the others went by rendezvous"
        for row in rows
        if row.workload.tokens
        and (way := row.ways[EAGER])
        and min(way.dispatch_eager_share, way.combine_eager_share) < 1
    ]


def sweep_json(row: SweepRow) -> dict[str, Any]:
    """Return a row as documented in docs/benchmark.md."""
    workload = row.workload
    return {
        "ranks": row.ranks,
        "tokens": workload.tokens,
        "hidden": workload.hidden,
        "topk": workload.topk,
        "experts": workload.experts,
        "wire": workload.wire,
        "routing": workload.routing,
        "ways": {name: _way_json(way) for name, way in row.ways.items()},
        "better": row.better,
        "automatic_ratio": round(row.ratio, 3),
        "rounds": len(row.ways[AUTOMATIC].us),
    }


def _way_json(way: WayRow) -> dict[str, Any]:
    return {
        "us_median": round(way.us_median, 1),
        "us_min": round(float(way.us.min()), 1),
        "us_max": round(float(way.us.max()), 1),
        "dispatch_eager_share": round(way.dispatch_eager_share, 4),
        "combine_eager_share": round(way.combine_eager_share, 4),
        "rule": way.rule,
        "verified": way.verified,
    }
