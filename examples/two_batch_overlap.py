"""Two micro-batches take turns: while one computes, the tokens of the other travel.

Every layer is attention-like work (A), dispatch (d), expert-like work (E), combine (c). The sequential schedule waits
for each exchange at once. The overlapped one posts it, works on the other micro-batch, and waits then::

    sequential   A0 d0 E0 c0 A1 d1 E1 c1
    overlapped   A0 d0> A1 d1> >d0 E0 c0> >d1 E1 c1> >c0      d0> posts with wait=False, >d0 waits

Both do the same work on rank processes of this host, and must give the same bits::

    python examples/two_batch_overlap.py --ranks 2 --picture timeline.png

What is hidden is what the ranks would have waited: on a machine whose cores all compute, the copying itself still takes
the time it takes.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import click
from rich.console import Console
from rich.table import Table
from timeline import Span, draw, load_figure
from two_batch import SCHEDULES, Report, Sizes, rank_main

from anyep.errors import Unavailable
from anyep.testing.processes import run_processes

COMPUTATION = ("attention", "expert")


@click.command()
@click.option("--ranks", type=click.IntRange(1), default=2, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=128, show_default=True, help="Of a micro-batch.")
@click.option("--hidden", type=click.IntRange(1), default=7168, show_default=True)
@click.option("--width", type=click.IntRange(1), default=64, show_default=True, help="Of an expert.")
@click.option("--experts", type=click.IntRange(1), default=16, show_default=True, help="Of all ranks.")
@click.option("--topk", type=click.IntRange(1), default=4, show_default=True)
@click.option("--layers", type=click.IntRange(1), default=3, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=11, show_default=True)
@click.option("--layout", type=click.Choice(["expert", "padded"]), default="expert", show_default=True)
@click.option("--picture", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Draw the last round.")
def main(
    ranks: int,
    tokens: int,
    hidden: int,
    width: int,
    experts: int,
    topk: int,
    layers: int,
    rounds: int,
    layout: str,
    picture: Path | None,
) -> None:
    """Compare the sequential with the overlapped schedule on the same work. Exit code 1: other bits came out."""
    if experts % ranks or topk > experts:
        raise click.UsageError(f"--experts {experts} must be a multiple of --ranks {ranks}, and at least --topk {topk}")
    if picture is not None:
        try:
            load_figure()
        except Unavailable as error:
            raise click.ClickException(str(error)) from error
    sizes = Sizes(
        tokens=tokens,
        hidden=hidden,
        width=width,
        num_experts=experts,
        num_topk=topk,
        num_layers=layers,
        rounds=rounds,
        layout=layout,
    )
    reports: list[Report] = run_processes(ranks, rank_main, sizes)
    if not all(report.same_bits for report in reports):
        raise click.ClickException("the schedules gave different bits")
    console = Console()
    console.print(durations_table(reports))
    console.print()
    console.print(waiting_table(reports))
    console.print(f"same bits on both schedules; {100 * hidden_share(reports):.0f} % of the communication hidden")
    if picture is not None:
        draw({name: [report.spans[name][-1] for report in reports] for name in SCHEDULES}, picture)
        console.print(f"the last round is drawn in {picture}")


def elapsed_s(reports: list[Report], name: str) -> list[float]:
    """Return each round's time from the first rank's begin to the last rank's end."""
    return [
        max(span.end for spans in ranks for span in spans) - min(span.begin for spans in ranks for span in spans)
        for ranks in zip(*(report.spans[name] for report in reports), strict=True)
    ]


def computing_s(reports: list[Report]) -> list[float]:
    """Return how long a rank computed in each round of the sequential schedule, the mean of all ranks."""
    return [
        sum(_length(spans, COMPUTATION) for spans in ranks) / len(ranks)
        for ranks in zip(*(report.spans["sequential"] for report in reports), strict=True)
    ]


def hidden_share(reports: list[Report]) -> float:
    """(sequential - overlapped) / (sequential - computation), of medians over the rounds: 1 if nothing is left to see.

    What a rank waits for one that computes longer counts as communication, as it does in a real model.
    """
    sequential, overlapped = (median(elapsed_s(reports, name)) for name in SCHEDULES)
    return (sequential - overlapped) / (sequential - median(computing_s(reports)))


def _length(spans: list[Span], kinds: tuple[str, ...]) -> float:
    return sum(span.end - span.begin for span in spans if span.kind in kinds and not span.in_flight)


def durations_table(reports: list[Report]) -> Table:
    """Return the times of both schedules; what ranks spent is the mean of all."""
    table = Table(title="ms a round, medians", title_justify="left", box=None, pad_edge=False)
    table.add_column("schedule")
    for name in ("all", "attention", "expert", "dispatch calls", "combine calls"):
        table.add_column(name, justify="right")
    for name in SCHEDULES:
        spent = [
            median(
                sum(_length(spans, (kind,)) for spans in ranks) / len(ranks)
                for ranks in zip(*(report.spans[name] for report in reports), strict=True)
            )
            for kind in (*COMPUTATION, "dispatch", "combine")
        ]
        table.add_row(name, *(f"{1e3 * seconds:.2f}" for seconds in (median(elapsed_s(reports, name)), *spent)))
    return table


def waiting_table(reports: list[Report]) -> Table:
    """Return how long each rank waited for each, a round."""
    table = Table(title="ms waited a round", title_justify="left", box=None, pad_edge=False)
    table.add_column("schedule")
    table.add_column("rank")
    for rank in range(len(reports)):
        table.add_column(f"for {rank}", justify="right")
    for name in SCHEDULES:
        for rank, report in enumerate(reports):
            rounds = len(report.spans[name])
            table.add_row(name, str(rank), *(f"{1e3 * waited / rounds:.2f}" for waited in report.waited_s[name]))
    return table


if __name__ == "__main__":
    main()
