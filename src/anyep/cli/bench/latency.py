"""How long a small exchange takes when nothing else runs: one token, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyep.cli.bench.plan import Workload
from anyep.cli.bench.rounds import durations_us
from anyep.cli.bench.stage import RankResult


@dataclass(frozen=True, kw_only=True)
class LatencyRow:
    """One operation of a small workload, all ranks together."""

    ranks: int
    workload: Workload
    op: str
    us: NDArray[np.float64]
    """[rounds]: one call behind a barrier"""
    row_us: NDArray[np.float64]
    """[rounds]: the mean of ``in_a_row`` calls"""
    in_a_row: int
    hops: int
    """rounds of messages, one behind the other, that the rank with the most of them awaited"""
    verified: bool

    @property
    def us_median(self) -> float:
        return float(np.median(self.us))

    @property
    def us_p99(self) -> float:
        return float(np.percentile(self.us, 99))


def latency_rows(ranks: tuple[RankResult, ...]) -> list[LatencyRow]:
    """Return a row an operation from what every rank saw of a contest."""
    first = ranks[0]
    us = durations_us([rank.spans for rank in ranks])
    row_us = durations_us([rank.row_spans for rank in ranks if rank.row_spans is not None], first.in_a_row)
    return [
        LatencyRow(
            ranks=len(ranks),
            workload=first.workload,
            op=op,
            us=us[:, position],
            row_us=row_us[:, position],
            in_a_row=first.in_a_row,
            hops=max(rank.hops.get(op, 0) for rank in ranks),
            verified=all(op not in rank.mismatches for rank in ranks),
        )
        for position, op in enumerate(first.names)
    ]


def latency_json(row: LatencyRow) -> dict[str, Any]:
    """Return a row as documented in docs/benchmark.md."""
    workload = row.workload
    return {
        "op": row.op,
        "ranks": row.ranks,
        "tokens": workload.tokens,
        "hidden": workload.hidden,
        "topk": workload.topk,
        "experts": workload.experts,
        "wire": workload.wire,
        "us_median": round(row.us_median, 1),
        "us_p99": round(row.us_p99, 1),
        "us_min": round(float(row.us.min()), 1),
        "us_max": round(float(row.us.max()), 1),
        "in_a_row": row.in_a_row,
        "in_a_row_us_median": round(float(np.median(row.row_us)), 1),
        "in_a_row_us_min": round(float(row.row_us.min()), 1),
        "in_a_row_us_max": round(float(row.row_us.max()), 1),
        "message_rounds": row.hops,
        "verified": row.verified,
        "rounds": len(row.us),
    }
