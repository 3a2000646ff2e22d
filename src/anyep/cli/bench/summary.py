"""From spans of all ranks to rows of a table, and to JSON."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyep.cli.bench.copy_speed import COPY, COPY_BYTES
from anyep.cli.bench.crossover import SweepRow, overflow_notes, sweep_json, sweep_row
from anyep.cli.bench.latency import LatencyRow, latency_json, latency_rows
from anyep.cli.bench.ours import DTYPES
from anyep.cli.bench.overlap import OverlapRow, overlap_json, overlap_row
from anyep.cli.bench.padded import LOGFMT
from anyep.cli.bench.plan import PEERS, WIRE_BYTES, Plan, Workload
from anyep.cli.bench.rounds import Spans, durations_us
from anyep.cli.bench.stage import LATENCY, OURS, OVERLAP, PADDED, SWEEP, RankResult
from anyep.numerics.formats import num_scale_groups
from anyep.numerics.logfmt import logfmt_coded_bytes

_IDX_BYTES, _WEIGHT_BYTES, _SCALE_BYTES, _TOKEN_BYTES = 8, 4, 4, 4

Durations = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class OperationRow:
    """One operation of one workload, all ranks together."""

    workload: Workload
    op: str
    rows: int
    """that travelled, those to the own rank included"""
    logical_bytes: int
    """of one row for every (token, expert) pair, without scales and routing"""
    moved_bytes: int
    """that were written to, or read from, other ranks' and the own arena"""
    us: Durations
    hops: int
    """rounds of messages, one behind the other, that the rank with the most of them awaited"""
    copy_gb_s: float
    verified: bool

    @property
    def gb_s(self) -> float:
        return self.moved_bytes / float(np.median(self.us)) / 1e3

    @property
    def copy_fraction(self) -> float:
        return self.gb_s / self.copy_gb_s


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """A comparison, round by round, with one of our operations."""

    peer: str
    in_a_row: int
    """calls of each side's turn"""
    workload: Workload
    op: str
    ours_us: Durations
    theirs_us: Durations
    verified: bool

    @property
    def ratios(self) -> Durations:
        return self.theirs_us / self.ours_us


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything the tables and the JSON show."""

    plan: Plan
    machine: dict[str, object]
    notes: list[str]
    copy_gb_s: float | None
    """None where no workload was measured, but latency or a sweep only"""
    rows: list[OperationRow]
    pairs: list[Pairing]
    latency: list[LatencyRow]
    sweep: list[SweepRow]
    overlaps: list[OverlapRow]
    mismatches: list[str]


def summarise(plan: Plan, machine: dict[str, object], notes: list[str], *launches: list[list[RankResult]]) -> Summary:
    """Put the ranks' results together; each of ``launches`` holds every rank's list, in rank order."""
    contests = [ranks for results in launches for ranks in zip(*results, strict=True)]
    own = [ranks for ranks in contests if ranks[0].contest in (OURS, PADDED)]
    copies = [_copy_speeds(ranks) for ranks in own]
    sweep = [sweep_row(ranks) for ranks in contests if ranks[0].contest == SWEEP]
    return Summary(
        plan=plan,
        machine=machine,
        notes=[*notes, *overflow_notes(sweep)],
        copy_gb_s=median(speed for speeds in copies for speed in speeds) if copies else None,
        rows=[row for ranks, speeds in zip(own, copies, strict=True) for row in _rows(plan, ranks, median(speeds))],
        pairs=[pair for ranks in contests if ranks[0].contest in PEERS for pair in _pairs_of(ranks)],
        latency=[row for ranks in contests if ranks[0].contest == LATENCY for row in latency_rows(ranks)],
        sweep=sweep,
        overlaps=[overlap_row(ranks) for ranks in contests if ranks[0].contest.startswith(OVERLAP)],
        mismatches=[
            f"{result.workload.name} {result.workload.wire}, {op}: {text}"
            for ranks in contests
            for result in ranks
            for op, text in result.mismatches.items()
        ],
    )


def _copy_speeds(ranks: tuple[RankResult, ...]) -> list[float]:
    us = durations_us([rank.spans for rank in ranks])[:, ranks[0].names.index(COPY)]
    return [len(ranks) * COPY_BYTES / duration / 1e3 for duration in us.tolist()]


def _rows(plan: Plan, ranks: tuple[RankResult, ...], copy_gb_s: float) -> list[OperationRow]:
    workload = ranks[0].workload
    us = durations_us([rank.spans for rank in ranks])
    num_rows = sum(rank.rows for rank in ranks)
    return [
        OperationRow(
            workload=workload,
            op=op,
            rows=num_rows * _trips(op),
            logical_bytes=plan.ranks * workload.tokens * workload.topk * _row_bytes(workload, op, logical=True),
            moved_bytes=num_rows * _row_bytes(workload, op, logical=False),
            us=us[:, position],
            hops=max(rank.hops.get(op, 0) for rank in ranks),
            copy_gb_s=copy_gb_s,
            verified=all(op not in rank.mismatches for rank in ranks),
        )
        for position, op in enumerate(ranks[0].names)
        if op != COPY
    ]


def _pairs_of(ranks: tuple[RankResult, ...]) -> list[Pairing]:
    alone = _pairs(ranks, [rank.spans for rank in ranks], 1)
    rows = [rank.row_spans for rank in ranks if rank.row_spans is not None]
    return alone + (_pairs(ranks, rows, ranks[0].in_a_row) if rows else [])


def _pairs(ranks: tuple[RankResult, ...], spans: list[Spans], in_a_row: int) -> list[Pairing]:
    peer, names = ranks[0].contest, ranks[0].names
    us = durations_us(spans, in_a_row)
    theirs = us[:, names.index(peer)]
    return [
        Pairing(
            peer=peer,
            in_a_row=in_a_row,
            workload=ranks[0].workload,
            op=op,
            ours_us=us[:, position],
            theirs_us=theirs,
            verified=all(peer not in rank.mismatches for rank in ranks),
        )
        for position, op in enumerate(names)
        if op != peer
    ]


def _trips(op: str) -> int:
    return int(op.startswith("dispatch")) + int("combine" in op)


def _row_bytes(workload: Workload, op: str, *, logical: bool) -> int:
    """Bytes of a row on its trips; on the way there scales, and routing or the token's number, lie beside it."""
    there = workload.hidden * WIRE_BYTES[workload.wire]
    back = workload.hidden * DTYPES[workload.wire].itemsize
    if not logical:
        there += _TOKEN_BYTES if "padded" in op else workload.topk * (_IDX_BYTES + _WEIGHT_BYTES)
        there += _SCALE_BYTES * num_scale_groups(workload.hidden) if workload.wire == "fp8" else 0
        back = logfmt_coded_bytes(workload.hidden) if op.endswith(LOGFMT) else back
    return (there if op.startswith("dispatch") else 0) + (back if "combine" in op else 0)


def to_json(summary: Summary) -> dict[str, Any]:
    """Return the result as documented in docs/benchmark.md."""
    return {
        "machine": summary.machine,
        "copy_gb_s": None if summary.copy_gb_s is None else round(summary.copy_gb_s, 3),
        "notes": summary.notes,
        "rows": [_row_json(summary.plan, row) for row in summary.rows],
        "paired": [_pair_json(summary.plan, pair) for pair in summary.pairs],
        "latency": [{**latency_json(row), "transport": summary.plan.transport} for row in summary.latency],
        "sweep": [{**sweep_json(row), "transport": summary.plan.transport} for row in summary.sweep],
        "overlap": [{**overlap_json(row), "transport": summary.plan.transport} for row in summary.overlaps],
        "mismatches": summary.mismatches,
    }


def _sizes(plan: Plan, workload: Workload) -> dict[str, Any]:
    return {
        "ranks": plan.ranks,
        "tokens": workload.tokens,
        "hidden": workload.hidden,
        "topk": workload.topk,
        "experts": workload.experts,
        "wire": workload.wire,
        "routing": workload.routing,
        "transport": plan.transport,
    }


def spread(name: str, values: Durations, digits: int) -> dict[str, float]:
    """Return median, least and greatest as JSON has them."""
    return {
        f"{name}_median": round(float(np.median(values)), digits),
        f"{name}_min": round(float(values.min()), digits),
        f"{name}_max": round(float(values.max()), digits),
    }


def _row_json(plan: Plan, row: OperationRow) -> dict[str, Any]:
    return {
        "workload": row.workload.name,
        "op": row.op,
        **_sizes(plan, row.workload),
        **spread("us", row.us, 1),
        "us_p99": round(float(np.percentile(row.us, 99)), 1) if row.workload.is_small else None,
        "message_rounds": row.hops,
        "gb_s": round(row.gb_s, 3),
        "copy_fraction": round(row.copy_fraction, 4),
        "verified": row.verified,
        "rows": row.rows,
        "logical_bytes": row.logical_bytes,
        "moved_bytes": row.moved_bytes,
        "rounds": len(row.us),
    }


def _pair_json(plan: Plan, pair: Pairing) -> dict[str, Any]:
    return {
        "peer": pair.peer,
        "workload": pair.workload.name,
        "op": pair.op,
        "in_a_row": pair.in_a_row,
        **_sizes(plan, pair.workload),
        **spread("ratio", pair.ratios, 3),
        "ours_us_median": round(float(np.median(pair.ours_us)), 1),
        "theirs_us_median": round(float(np.median(pair.theirs_us)), 1),
        "verified": pair.verified,
        "rounds": len(pair.ratios),
    }
