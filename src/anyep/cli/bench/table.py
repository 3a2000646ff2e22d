"""The tables, for people."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from anyep.cli.bench.crossover import LABELS, SweepRow
from anyep.cli.bench.latency import LatencyRow
from anyep.cli.bench.overlap import OverlapRow
from anyep.cli.bench.plan import Plan, Workload
from anyep.cli.bench.summary import Durations, OperationRow, Pairing, Summary
from anyep.cli.bench.sweep import AUTOMATIC

_OPERATIONS = {
    "dispatch": "dispatch",
    "dispatch_cached": "dispatch, cached handle",
    "combine": "combine",
    "combine_copied_in": "combine, output copied in",
    "dispatch_combine": "dispatch + combine",
    "dispatch_combine_copied_in": "dispatch + combine, copied in",
    "dispatch_padded": "dispatch, padded",
    "combine_padded": "combine, padded",
    "combine_padded_logfmt10": "combine, padded, LogFMT-10",
    "dispatch_combine_padded": "dispatch + combine, padded",
    "dispatch_combine_padded_logfmt10": "dispatch + combine, padded, LogFMT-10",
}
_PEERS = {"gloo": "gloo, as Megatron", "mpich": "MPICH Alltoallv"}
_NOTES = (
    "moved: bytes written into, or read from, the ranks' arenas (rows, scales, routing), the own rank's included. "
    "logical: one row for every (token, expert) pair.",
    "GB/s is moved bytes over the median time, from the first rank's begin to the last rank's end; "
    "% of copy is its share of a copy by all ranks at once, past the caches, in the same rounds. "
    "A copy reads as much as it writes; dispatch reads a row once for several writes, combine writes one for several "
    "reads: both may exceed it.",
    "copied in: the experts' output lay outside the arena and was copied first. padded: one row for every "
    "(token, expert), weights applied at the origin. hops: rounds of messages, one behind the other. "
    "in a row: so many calls of each side follow each other behind one barrier; times are of one call.",
)
_WAYS = {"copied_in": "copied in", "padded": "padded", "logfmt10": "padded, LogFMT-10"}


def print_summary(summary: Summary, console: Console) -> None:
    """Print everything; nothing is rounded to look better."""
    console.print()
    console.print(machine_line(summary.machine, summary.copy_gb_s))
    for workload in dict.fromkeys(row.workload for row in summary.rows):
        console.print()
        console.print(_operations(summary, workload))
    if summary.pairs:
        console.print()
        console.print(_pairings(summary))
    if summary.overlaps:
        console.print()
        console.print(_overlaps(summary.overlaps))
    if summary.latency:
        console.print()
        console.print(_latency(summary.latency))
    if summary.sweep:
        console.print()
        console.print(_sweep(summary.sweep))
    for note in (*(_NOTES if summary.rows else ()), *summary.notes):
        console.print(f"[dim]{note}[/dim]", highlight=False)
    for mismatch in summary.mismatches:
        console.print(f"[bold red]MISMATCH[/bold red] {mismatch}", highlight=False)


def machine_line(machine: dict[str, object], copy_gb_s: float | None = None) -> str:
    """Return where this was measured."""
    copy = "" if copy_gb_s is None else f"; all ranks copy {copy_gb_s:.2f} GB/s"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {_memory(machine)}; torch {machine['torch']}, "
        f"numba {machine['numba']}, anyep {machine['anyep']}{copy}"
    )


def _memory(machine: dict[str, object]) -> str:
    return "unknown memory" if machine["memory_gib"] is None else f"{machine['memory_gib']} GiB"


def _headline(plan: Plan, workload: Workload) -> str:
    return (
        f"{workload.name}: {plan.ranks} ranks x {workload.tokens} tokens x {workload.hidden}, top-{workload.topk} of "
        f"{workload.experts}, {workload.wire} wire, routing {workload.routing}, {plan.transport}"
    )


def _operations(summary: Summary, workload: Workload) -> Table:
    table = new_table(_headline(summary.plan, workload))
    table.add_column("operation")
    tail = ("p99 ms", "hops") if workload.is_small else ()
    for name in ("rows", "logical MB", "moved MB", "median ms", "min - max", *tail, "GB/s", "% of copy"):
        table.add_column(name, justify="right")
    table.add_column("every byte")
    for row in summary.rows:
        if row.workload == workload:
            table.add_row(*_operation_cells(row))
    return table


def _operation_cells(row: OperationRow) -> tuple[str, ...]:
    tail = (f"{np.percentile(row.us, 99) / 1e3:.2f}", f"{row.hops}") if row.workload.is_small else ()
    return (
        _OPERATIONS[row.op],
        f"{row.rows:,}",
        _megabytes(row.logical_bytes),
        _megabytes(row.moved_bytes),
        f"{np.median(row.us) / 1e3:.2f}",
        span_text(row.us / 1e3, 2),
        *tail,
        f"{row.gb_s:.2f}",
        f"{100 * row.copy_fraction:.0f}",
        verdict(row.verified),
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.{0 if num_bytes >= 1e7 else 2}f}"


def _pairings(summary: Summary) -> Table:
    table = new_table("the same exchange, paired round by round in this run")
    for name in ("against", "workload", "anyep"):
        table.add_column(name)
    for name in ("in a row", "anyep ms", "theirs ms", "times faster", "min - max"):
        table.add_column(name, justify="right")
    table.add_column("theirs checked")
    for pair in summary.pairs:
        table.add_row(*_pairing_cells(pair))
    return table


def _pairing_cells(pair: Pairing) -> tuple[str, ...]:
    return (
        _PEERS[pair.peer],
        pair.workload.name,
        f"{pair.workload.wire}, {_way(pair.op)}",
        f"{pair.in_a_row}",
        f"{np.median(pair.ours_us) / 1e3:.2f}",
        f"{np.median(pair.theirs_us) / 1e3:.2f}",
        f"{np.median(pair.ratios):.2f}",
        span_text(pair.ratios, 2),
        verdict(pair.verified),
    )


def _way(op: str) -> str:
    return next((text for end, text in _WAYS.items() if op.endswith(end)), "in the arena")


def _overlaps(rows: list[OverlapRow]) -> Table:
    table = new_table("behind computation: half of it between dispatch's halves (wait=False), half between combine's")
    for name in ("workload", "wire", "layout"):
        table.add_column(name)
    for name in ("computation ms", "exchange ms", "both ms", "hidden"):
        table.add_column(name, justify="right")
    table.add_column("every byte")
    for row in rows:
        table.add_row(
            row.workload.name,
            row.workload.wire,
            row.layout,
            *(f"{np.median(us) / 1e3:.2f}" for us in (row.compute_us, row.communicate_us, row.overlapped_us)),
            f"{100 * row.hidden_share:.0f} %",
            verdict(row.verified),
        )
    table.caption = "hidden: 1 - (both - computation) / exchange; below 0: both took longer than one after the other"
    table.caption_justify = "left"
    return table


def _latency(rows: list[LatencyRow]) -> Table:
    first = rows[0].workload
    table = new_table(
        f"latency: {first.hidden} channels, top-{first.topk} of {first.experts}, {first.wire} wire, "
        "nothing else in between"
    )
    for name in ("ranks", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("operation")
    for name in ("median us", "p99 us", "min - max", "in a row us", "hops"):
        table.add_column(name, justify="right")
    table.add_column("every byte")
    for row in rows:
        table.add_row(
            f"{row.ranks}",
            f"{row.workload.tokens}",
            _OPERATIONS[row.op],
            f"{row.us_median:.0f}",
            f"{row.us_p99:.0f}",
            span_text(row.us, 0),
            f"{np.median(row.row_us):.0f}",
            f"{row.hops}",
            verdict(row.verified),
        )
    return table


def _sweep(rows: list[SweepRow]) -> Table:
    first = rows[0].workload
    table = new_table(
        f"dispatch + combine by size: {rows[0].ranks} ranks x {first.hidden}, top-{first.topk} of {first.experts}, "
        f"routing {first.routing}"
    )
    table.add_column("wire")
    table.add_column("tokens", justify="right")
    for name in (*LABELS.values(), "came along", "better", "automatic / better"):
        table.add_column(f"{name} ms" if name in LABELS.values() else name, justify="right")
    table.add_column("every byte")
    for row in rows:
        chosen = row.ways[AUTOMATIC]
        table.add_row(
            row.workload.wire,
            f"{row.workload.tokens}",
            *(f"{row.ways[name].us_median / 1e3:.2f}" for name in LABELS),
            f"{100 * chosen.dispatch_eager_share:.0f} %, {100 * chosen.combine_eager_share:.0f} %",
            row.better,
            f"{row.ratio:.2f}",
            verdict(all(way.verified for way in row.ways.values())),
        )
    table.caption = "came along: rows of dispatch, and of combine, that the automatic choice sent eagerly"
    table.caption_justify = "left"
    return table


def new_table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def span_text(values: Durations, digits: int) -> str:
    return f"{values.min():.{digits}f} - {values.max():.{digits}f}"


def verdict(verified: bool) -> str:
    return "[green]verified[/green]" if verified else "[bold red]WRONG[/bold red]"
