"""The table between hosts, for people."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table

from anyep.cli.bench.hosts.plan import HostsPlan
from anyep.cli.bench.hosts.summary import CrossingRow, HostsSummary
from anyep.cli.bench.peers import GLOO, GLOO_RANKS
from anyep.cli.bench.plan import Workload
from anyep.cli.bench.table import machine_line, new_table, span_text, verdict

_OPERATIONS = {
    "dispatch": "dispatch",
    "combine": "combine",
    "dispatch_combine": "dispatch + combine",
    GLOO: "gloo, a copy an expert, as Megatron",
    GLOO_RANKS: "gloo, a copy a rank",
}
_NOTES = (
    "wire MB: bytes that all hosts' interfaces sent in one operation, with headers as the kernel counts them (those of "
    "a packet that is cut later once). least: once a token and other host, in the wire format with scales, experts and "
    "weights, and once a row of the experts' output; no headers.",
    "% of link: what the busiest direction of a link carried in the median time, from the first rank's begin to the "
    "last rank's end. times slower: than dispatch + combine, of the same rounds.",
)


def print_hosts(summary: HostsSummary, console: Console) -> None:
    """Print everything; nothing is rounded to look better."""
    console.print()
    console.print(machine_line(summary.machine))
    for link, transport in summary.between.items():
        console.print(f"{link}: {transport}", highlight=False, markup=False)
    for plan, workload in dict.fromkeys((row.plan, row.workload) for row in summary.rows):
        console.print()
        console.print(_crossings(summary.rows, plan, workload))
    for note in (*_NOTES, *summary.notes):
        console.print(f"[dim]{note}[/dim]", highlight=False)
    for failure in summary.failures:
        console.print(f"[bold red]FAILED[/bold red] {failure}", highlight=False)
    for mismatch in summary.mismatches:
        console.print(f"[bold red]MISMATCH[/bold red] {mismatch}", highlight=False)


def _crossings(rows: list[CrossingRow], plan: HostsPlan, workload: Workload) -> Table:
    counts = "+".join(map(str, plan.ranks_per_host))
    table = new_table(
        f"{workload.name}: {counts} ranks, {plan.link}; {workload.tokens} tokens x {workload.hidden}, "
        f"top-{workload.topk} of {workload.experts}, {workload.wire} wire, routing {workload.routing}"
    )
    table.add_column("operation")
    names = ("wire MB", "/ least", "median ms", "min - max", "Gbit/s", "% of link", "times slower", "min - max")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("every byte")
    for row in rows:
        if (row.plan, row.workload) == (plan, workload):
            table.add_row(*_cells(row))
    return table


def _cells(row: CrossingRow) -> tuple[str, ...]:
    shares, ratios = row.link_shares, row.their_ratios
    return (
        _OPERATIONS[row.op],
        f"{row.sent_bytes / 1e6:,.1f}",
        f"{row.over_least:.3f}",
        f"{np.median(row.us) / 1e3:,.1f}",
        span_text(row.us / 1e3, 1),
        f"{max(row.gbit_s):.2f}",
        "" if shares is None else f"{100 * max(shares):.1f}",
        "" if ratios is None else f"{np.median(ratios):.2f}",
        "" if ratios is None else span_text(ratios, 2),
        verdict(row.verified),
    )
