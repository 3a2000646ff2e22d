"""``anyep bench``: options to a plan, the plan to results, results to tables and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from anyep.cli.bench.plan import PEERS, TRACE, WIRES, Plan, Workload, default_sizes, name_of
from anyep.cli.machine_facts import available_memory_bytes, describe_machine
from anyep.errors import CapacityError, Unavailable

if TYPE_CHECKING:
    from rich.console import Console

    from anyep.cli.bench.rank import RankResult, Report

_DRAWN = ("balanced", "zipf")
_DEFAULT_RANKS, _DEFAULT_TOPK, _DEFAULT_EXPERTS = 8, 8, 256
_WIDTH = 132
"""Columns of the output where it goes to a file."""


def _names(choices: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """Return a callback that splits a list at commas and checks each name."""

    def split(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
        for name in names:
            if name not in choices:
                raise click.BadParameter(f"{name!r} is not one of {', '.join(choices)}", context, parameter)
        return names

    return split


@click.command()
@click.option("--ranks", type=click.IntRange(1, 1024), help="Rank processes.  [default: 8, or the job's]")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    multiple=True,
    help="Tokens of each rank; may be repeated.  [default: 4096, 128]",
)
@click.option("--hidden", type=click.IntRange(1), default=7168, show_default=True, help="Channels of a token.")
@click.option("--topk", type=click.IntRange(1), help="Experts of a token.  [default: the trace's, 8]")
@click.option("--experts", type=click.IntRange(1), help="Experts of all ranks.  [default: the trace's, 256]")
@click.option("--wire", callback=_names(WIRES), default="fp8", show_default=True, help="bf16, fp16, fp32, fp8; a list.")
@click.option(
    "--routing", default=TRACE, show_default=True, metavar="balanced|zipf|FILE", help="Drawn, or a routing trace."
)
@click.option(
    "--compare", callback=_names(PEERS), default="", metavar="gloo,mpich", help="Pair with these, in the same run."
)
@click.option("--rounds", type=click.IntRange(1), help="Timed rounds.  [default: 11 for large batches, 41 for small]")
@click.option("--transport", type=click.Choice(["shm", "inprocess"]), default="shm", show_default=True)
@click.option(
    "--timeout", type=click.FloatRange(1, 3600), default=60.0, show_default=True, help="Seconds for a silent rank."
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Also write this."
)
def bench(
    ranks: int | None,
    tokens: tuple[int, ...],
    hidden: int,
    topk: int | None,
    experts: int | None,
    wire: tuple[str, ...],
    routing: str,
    compare: tuple[str, ...],
    rounds: int | None,
    transport: str,
    timeout: float,
    json_file: Path | None,
) -> None:
    """Move tokens between ranks, check every byte, and say how fast it was.

    Sizes are made smaller, and it says so, where this machine's memory needs it. Works inside a torchrun job too. Exit
    code 1: a byte was wrong, or the machine cannot do it.
    """
    from anyep.cli.bench.launch import job_ranks

    if transport == "inprocess" and compare:
        raise click.UsageError("--compare needs rank processes; leave out --transport inprocess")
    job = job_ranks() if transport == "shm" else None
    num_ranks = ranks or job or _DEFAULT_RANKS
    topk, experts = _check_routing(routing, topk, experts)
    if compare and not set(wire) <= {"bf16", "fp8"}:
        raise click.UsageError(f"--compare goes with --wire bf16 or fp8: the others move BF16; got {', '.join(wire)}")
    if compare and experts % num_ranks:
        raise click.UsageError(f"--compare needs --experts that --ranks divides, got {experts} and {num_ranks}")
    sizes = [(name_of(n), n) for n in tokens] or list(default_sizes())
    plan = Plan(
        ranks=num_ranks,
        workloads=tuple(
            Workload(name=name, tokens=n, hidden=hidden, topk=topk, experts=experts, wire=one_wire, routing=routing)
            for one_wire in wire
            for name, n in sizes
        ),
        peers=compare,
        transport=transport,
        rounds=rounds,
        timeout_s=timeout,
    )
    code = _in_job(plan, ranks, json_file) if job is not None else _alone(plan, json_file)
    if code:
        raise click.exceptions.Exit(code)


def _check_routing(routing: str, topk: int | None, experts: int | None) -> tuple[int, int]:
    """Return top-k and experts, from the trace where the user left them open. UsageError where they contradict it."""
    if routing in _DRAWN:
        topk, experts = topk or _DEFAULT_TOPK, experts or _DEFAULT_EXPERTS
        if topk > experts:
            raise click.UsageError(f"--topk {topk} is more than --experts {experts}: a token's experts are distinct")
        return topk, experts
    from anyep.cli.bench.routing import open_trace

    try:
        trace = open_trace(routing)
        topk, experts = topk or trace.num_topk, experts or trace.num_experts
        trace.batches(1, 1, num_experts=experts, num_topk=topk)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"--routing {routing}: {error}") from error
    return topk, experts


def _alone(plan: Plan, json_file: Path | None) -> int:
    """Start the ranks, print, and return the exit code."""
    from anyep.cli.bench.launch import run_processes, run_threads
    from anyep.cli.bench.peers import find_mpiexec
    from anyep.cli.bench.sizing import fit

    if "mpich" in plan.peers:
        find_mpiexec()
    console = _console()
    plan, notes = fit(plan, available_memory_bytes())
    _say(console, notes)
    launch = run_threads if plan.transport == "inprocess" else run_processes
    with _progress(console, plan) as report:
        results = launch(plan, report)
    return _publish(plan, notes, results, console, json_file)


def _in_job(plan: Plan, ranks: int | None, json_file: Path | None) -> int:
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
        console = _console()
        plan, notes = _agreed(plan, dist.get_world_size())
        if first:
            _say(console, notes)
        with _progress(console, plan) if first else nullcontext(lambda step: None) as report:
            results = run_in_job(plan, report)
        if first:
            return _publish(plan, notes, results, console, json_file)
        return int(any(result.mismatches for rank in results for result in rank))
    finally:
        dist.destroy_process_group()


def _agreed(plan: Plan, ranks: int) -> tuple[Plan, list[str]]:
    """Let rank 0 look at the memory, and all ranks take its sizes."""
    from dataclasses import replace

    import torch.distributed as dist

    from anyep.cli.bench.sizing import fit

    fitted: list[object] = [None]
    if dist.get_rank() == 0:
        try:
            fitted = [fit(replace(plan, ranks=ranks), available_memory_bytes())]
        except CapacityError as error:
            fitted = [error]
    dist.broadcast_object_list(fitted)
    if isinstance(fitted[0], CapacityError):
        raise fitted[0]
    return fitted[0]  # type: ignore[return-value]


def _publish(
    plan: Plan, notes: list[str], results: list[list[RankResult]], console: Console, json_file: Path | None
) -> int:
    from anyep.cli.bench.summary import summarise, to_json
    from anyep.cli.bench.table import print_summary

    summary = summarise(plan, describe_machine(), notes, results)
    print_summary(summary, console)
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(summary), indent=1) + "\n")
    return 1 if summary.mismatches else 0


def _console() -> Console:
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
