"""From what all ranks on all hosts saw to rows of a table, and to JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from anyep.cli.bench.hosts.plan import HostsPlan, least_bytes
from anyep.cli.bench.hosts.rank import PAIRED, HostResult
from anyep.cli.bench.plan import Workload
from anyep.cli.bench.rounds import durations_us
from anyep.cli.bench.routing import make_exchange
from anyep.cli.bench.summary import Durations, spread
from anyep.testing.hosts import LinkBytes


@dataclass(frozen=True, kw_only=True)
class CrossingRow:
    """One operation of one workload between hosts, all ranks together."""

    plan: HostsPlan
    workload: Workload
    op: str
    us: Durations
    crossed: tuple[LinkBytes, ...]
    """of each host's interface, in one operation"""
    least_bytes: int
    """that all hosts together have to send"""
    their_ratios: Durations | None
    """of a comparison: its time over ours, round by round"""
    verified: bool

    @property
    def sent_bytes(self) -> int:
        return sum(link.sent for link in self.crossed)

    @property
    def over_least(self) -> float:
        return self.sent_bytes / self.least_bytes if self.least_bytes else float("nan")

    @property
    def gbit_s(self) -> list[float]:
        """Return how much each host sent, then how much each received, of the median time."""
        ways = [link.sent for link in self.crossed] + [link.received for link in self.crossed]
        return [8 * way / float(np.median(self.us)) / 1e3 for way in ways]

    @property
    def link_shares(self) -> list[float] | None:
        """Return the same as shares of the links; None where they have no limit."""
        limit = self.plan.link_mbit
        return None if limit is None else [way / (limit / 1e3) for way in self.gbit_s]


@dataclass(frozen=True, kw_only=True)
class HostsSummary:
    """Everything the table and the JSON show."""

    machine: dict[str, object]
    notes: list[str]
    rows: list[CrossingRow]
    between: dict[str, str]
    """link -> transport"""
    mismatches: list[str]
    failures: list[str]
    """links that gave no result, and why"""


def summarise_hosts(
    machine: dict[str, object],
    notes: list[str],
    launches: list[tuple[HostsPlan, list[list[HostResult]]]],
    failures: list[str],
) -> HostsSummary:
    """Put together what the ranks of each plan, in rank order, returned."""
    contests = [(plan, ranks) for plan, results in launches for ranks in zip(*results, strict=True)]
    return HostsSummary(
        machine=machine,
        notes=notes,
        rows=[row for plan, ranks in contests for row in _rows(plan, ranks)],
        between={plan.link: ranks[0].between for plan, ranks in contests},
        mismatches=[
            f"{rank.workload.name} {rank.workload.wire}, {plan.link}, {op}: {text}"
            for plan, ranks in contests
            for rank in ranks
            for op, text in rank.mismatches.items()
        ],
        failures=failures,
    )


def _rows(plan: HostsPlan, ranks: tuple[HostResult, ...]) -> list[CrossingRow]:
    workload, names = ranks[0].workload, ranks[0].names
    us = durations_us([rank.spans for rank in ranks])
    exchange, ours_us = make_exchange(workload, plan.base.ranks), us[:, names.index(PAIRED)]
    first_ranks = [ranks[members[0]] for members in plan.hosts.members]
    return [
        CrossingRow(
            plan=plan,
            workload=workload,
            op=op,
            us=us[:, position],
            crossed=tuple(rank.crossed[op] for rank in first_ranks),
            least_bytes=least_bytes(workload, exchange, plan.hosts, op),
            their_ratios=us[:, position] / ours_us if position > names.index(PAIRED) else None,
            verified=all(op not in rank.mismatches for rank in ranks),
        )
        for position, op in enumerate(names)
    ]


def hosts_json(summary: HostsSummary) -> dict[str, Any]:
    """Return the result as documented in docs/benchmark.md."""
    return {
        "machine": summary.machine,
        "notes": summary.notes,
        "transports": summary.between,
        "hosts": [_row_json(row) for row in summary.rows],
        "mismatches": summary.mismatches,
        "partial": bool(summary.failures),
        "failures": summary.failures,
    }


def _row_json(row: CrossingRow) -> dict[str, Any]:
    workload, shares = row.workload, row.link_shares
    return {
        "workload": workload.name,
        "op": row.op,
        "ranks_per_host": list(row.plan.ranks_per_host),
        "link_mbit": row.plan.link_mbit,
        "tokens": workload.tokens,
        "hidden": workload.hidden,
        "topk": workload.topk,
        "experts": workload.experts,
        "wire": workload.wire,
        "routing": workload.routing,
        **spread("us", row.us, 1),
        "sent_bytes": [link.sent for link in row.crossed],
        "received_bytes": [link.received for link in row.crossed],
        "least_bytes": row.least_bytes,
        "over_least": round(row.over_least, 4),
        "gbit_s": [round(way, 4) for way in row.gbit_s],
        "link_shares": None if shares is None else [round(share, 4) for share in shares],
        **({} if row.their_ratios is None else spread("ratio", row.their_ratios, 3)),
        "verified": row.verified,
        "rounds": len(row.us),
    }
