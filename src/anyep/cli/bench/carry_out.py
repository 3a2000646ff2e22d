"""From a plan to results, and from results to tables and JSON: by itself, or as one rank of a job."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anyep.cli.bench.plan import Plan
from anyep.cli.machine_facts import available_memory_bytes, describe_machine
from anyep.errors import CapacityError, Unavailable

if TYPE_CHECKING:
    from rich.console import Console

    from anyep.cli.bench.stage import RankResult, Report

_WIDTH = 132
"""Columns of the output where it goes to a file."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Files that are written beside the tables."""

    json: Path | None
    picture: Path | None

    def check(self) -> None:
        """Raise Unavailable now where a file could not be made in the end."""
        if self.picture is not None:
            from anyep.cli.bench.picture import load_figure

            load_figure()


def run_alone(plan: Plan, alone: list[Plan], outputs: Outputs) -> int:
    """Start the ranks of ``plan``, then those of each of ``alone``, print, and return the exit code."""
    from anyep.cli.bench.launch import run_processes, run_threads
    from anyep.cli.bench.peers import find_mpiexec
    from anyep.cli.bench.sizing import fit

    if "mpich" in plan.peers:
        find_mpiexec()
    console = open_console()
    launch = run_threads if plan.transport == "inprocess" else run_processes
    notes, fitted, launches = [], [], []
    for one in [plan, *alone]:
        smaller, said = fit(one, available_memory_bytes())
        _say(console, said)
        fitted.append(smaller)
        notes += said
        if smaller.has_work:
            with _progress(console, smaller) as report:
                launches.append(launch(smaller, report))
    return _publish(fitted[0], notes, launches, console, outputs)


def run_as_rank(plan: Plan, ranks: int | None, outputs: Outputs) -> int:
    """Run as one rank of a torchrun job; rank 0 prints, every rank returns the same exit code."""
    from contextlib import nullcontext
    from datetime import timedelta

    import torch.distributed as dist

    from anyep.cli.bench.launch import run_in_job

    if "mpich" in plan.peers:
        raise Unavailable("inside a torchrun job there is no mpiexec to start MPICH's ranks: run anyep bench by itself")
    dist.init_process_group("gloo", timeout=timedelta(seconds=plan.timeout_s))
    try:
        if ranks not in (None, dist.get_world_size()):
            raise click.UsageError(f"--ranks {ranks} in a job of {dist.get_world_size()} ranks; leave it out")
        first = dist.get_rank() == 0
        console = open_console()
        plan, notes = _agreed(plan, dist.get_world_size())
        if first:
            _say(console, notes)
        with _progress(console, plan) if first else nullcontext(lambda step: None) as report:
            results = run_in_job(plan, report)
        if first:
            return _publish(plan, notes, [results], console, outputs)
        return int(any(result.mismatches for rank in results for result in rank))
    finally:
        dist.destroy_process_group()


def _agreed(plan: Plan, ranks: int) -> tuple[Plan, list[str]]:
    """Let rank 0 look at the memory, and all ranks take its sizes."""
    import torch.distributed as dist

    from anyep.cli.bench.sizing import fit

    fitted: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            fitted = [fit(replace(plan, ranks=ranks), available_memory_bytes())]
        except CapacityError as error:
            fitted = [error]
    dist.broadcast_object_list(fitted)
    if isinstance(fitted[0], CapacityError):
        raise fitted[0]
    smaller, notes = fitted[0]
    return smaller, notes


def _publish(
    plan: Plan, notes: list[str], launches: list[list[list[RankResult]]], console: Console, outputs: Outputs
) -> int:
    from anyep.cli.bench.summary import summarise, to_json
    from anyep.cli.bench.table import print_summary

    summary = summarise(plan, describe_machine(), notes, *launches)
    print_summary(summary, console)
    if outputs.json is not None:
        outputs.json.write_text(json.dumps(to_json(summary), indent=1) + "\n")
    if outputs.picture is not None and summary.sweep:
        from anyep.cli.bench.picture import draw

        draw(summary.sweep, outputs.picture)
    return 1 if summary.mismatches else 0


def open_console() -> Console:
    """Return where to print: the terminal, or a file of fixed width."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_WIDTH)


def _say(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.print(f"smaller, to fit this machine's memory: {note}", highlight=False)


@contextmanager
def _progress(console: Console, plan: Plan) -> Iterator[Report]:
    """Show a progress bar on a terminal; each report is one step."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from anyep.cli.bench.rank import num_steps

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting ranks", total=num_steps(plan))
        yield lambda step: bar.update(task, description=step.text, advance=1)
