"""``anyep bench``: options to plans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import click

from anyep.cli.bench.carry_out import Outputs, run_alone, run_as_rank
from anyep.cli.bench.option_values import (
    check_output,
    parse_cases,
    parse_hosts,
    parse_links,
    parse_names,
    parse_picture,
    parse_sizes,
)
from anyep.cli.bench.plan import DECODE_TOKENS, HOST_TOKENS, PEERS, TRACE, WIRES, Plan, Workload, default_sizes, name_of

_ONE_HOST = ("shm", "inprocess")
_HOSTS_TRANSPORTS = ("auto", "nixl", "gloo")
_LINKS = (1000.0, None)
_DRAWN = ("balanced", "zipf")
_DEFAULT_RANKS, _DEFAULT_TOPK, _DEFAULT_EXPERTS = 8, 8, 256


@click.command()
@click.option("--ranks", type=click.IntRange(1, 1024), help="Rank processes.  [default: 8, or the job's]")
@click.option(
    "--tokens",
    type=click.IntRange(0),
    multiple=True,
    help="Tokens of each rank; may be repeated.  [default: 4096, 128]",
)
@click.option("--hidden", type=click.IntRange(1), default=7168, show_default=True, help="Channels of a token.")
@click.option("--topk", type=click.IntRange(1), help="Experts of a token.  [default: the trace's, 8]")
@click.option("--experts", type=click.IntRange(1), help="Experts of all ranks.  [default: the trace's, 256]")
@click.option(
    "--wire", callback=parse_names(WIRES), default="fp8", show_default=True, help="bf16, fp16, fp32, fp8; a list."
)
@click.option(
    "--routing", default=TRACE, show_default=True, metavar="balanced|zipf|FILE", help="Drawn, or a routing trace."
)
@click.option(
    "--compare", callback=parse_names(PEERS), default="", metavar="gloo,mpich", help="Pair with these, in the same run."
)
@click.option(
    "--latency",
    callback=parse_cases,
    default="",
    metavar="RANKSxTOKENS,...",
    help="Time small batches by themselves, as 2x1,2x0,8x0; workloads too where --tokens says so.",
)
@click.option(
    "--sweep",
    callback=parse_sizes,
    default="",
    metavar="tokens=N,N,...",
    help="Pair the ways that rows can go at each size; workloads too where --tokens says so.",
)
@click.option(
    "--picture",
    callback=parse_picture,
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Draw the sweep: .png, .svg or .pdf.",
)
@click.option(
    "--hosts",
    callback=parse_hosts,
    metavar="HOSTSxRANKS",
    help="Play hosts of so many ranks each with network namespaces (needs root), as 2x4.",
)
@click.option(
    "--link",
    callback=parse_links,
    default="",
    metavar="SPEED,...",
    help="Speeds of the hosts' links, as 1gbit,none; each is measured.  [default: 1gbit,none]",
)
@click.option("--rounds", type=click.IntRange(1), help="Timed rounds.  [default: by the number of tokens]")
@click.option(
    "--transport",
    type=click.Choice([*_ONE_HOST, *_HOSTS_TRANSPORTS]),
    help="shm or inprocess; with --hosts, or in a job of several hosts, auto or an engine.  [default: shm, auto]",
)
@click.option(
    "--timeout", type=click.FloatRange(1, 3600), default=60.0, show_default=True, help="Seconds for a silent rank."
)
@click.option(
    "--json",
    "json_file",
    callback=check_output,
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Also write this.",
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
    latency: tuple[tuple[int, int], ...],
    sweep: tuple[int, ...],
    picture: Path | None,
    hosts: tuple[int, ...],
    link: tuple[float | None, ...],
    rounds: int | None,
    transport: str | None,
    timeout: float,
    json_file: Path | None,
) -> None:
    """Move tokens, check every byte, say how fast it was.

    Sizes are made smaller, and it says so, where this machine's memory needs it. Works inside a torchrun job too. Exit
    code 1: a byte was wrong, or the machine cannot do it.
    """
    from anyep.cli.bench.launch import job_ranks

    in_job = job_ranks() is not None
    transport = _check_transport(transport, hosts, link, in_job=in_job)
    if hosts:
        given = {"--ranks": ranks, "--compare": compare, "--latency": latency, "--sweep": sweep, "--picture": picture}
        if others := [option for option, value in given.items() if value]:
            raise click.UsageError(f"--hosts has ranks and comparisons of its own; leave out {', '.join(others)}")
        ranks, compare = sum(hosts), ("gloo",)
    against, divisor = ("--hosts", "the ranks divide") if hosts else ("--compare", "--ranks divides")
    if transport == "inprocess" and compare:
        raise click.UsageError("--compare needs rank processes; leave out --transport inprocess")
    job = job_ranks() if transport != "inprocess" else None
    if hosts and job is not None:
        raise click.UsageError("--hosts starts ranks of its own; leave it out inside a job")
    num_ranks = ranks or job or _DEFAULT_RANKS
    topk, experts = _check_routing(routing, topk, experts)
    if compare and not set(wire) <= {"bf16", "fp8"}:
        raise click.UsageError(f"{against} goes with --wire bf16 or fp8: the others move BF16; got {', '.join(wire)}")
    if compare and experts % num_ranks:
        raise click.UsageError(f"{against} needs --experts that {divisor}, got {experts} and {num_ranks}")
    if compare and 0 in tokens:
        raise click.UsageError(f"{against} goes with --tokens of at least 1: an empty batch is no exchange to compare")
    if latency and job is not None:
        raise click.UsageError("--latency starts ranks of its own; leave it out inside a job")
    if picture is not None and (not sweep or len(wire) > 1):
        raise click.UsageError("--picture draws a --sweep of one --wire")
    outputs = Outputs(json=json_file, picture=picture)
    outputs.check()

    def workloads(sizes: Iterable[int]) -> tuple[Workload, ...]:
        return tuple(
            Workload(
                name=name_of(n),
                tokens=n,
                hidden=hidden,
                topk=topk,
                experts=experts,
                wire=one_wire,
                routing=routing,
                padded=n <= DECODE_TOKENS and transport in _ONE_HOST,
            )
            for one_wire in wire
            for n in sizes
        )

    plan = Plan(
        ranks=num_ranks,
        workloads=workloads(tokens or (() if latency or sweep else (HOST_TOKENS if hosts else default_sizes()))),
        peers=compare,
        transport=transport,
        rounds=rounds,
        timeout_s=timeout,
        sweep=workloads(sweep),
    )
    if hosts:
        code = _run_hosts(plan, hosts, link, json_file)
        if code:
            raise click.exceptions.Exit(code)
        return
    none = replace(plan, workloads=(), peers=(), sweep=())
    alone = [
        replace(none, ranks=n, latency=workloads(size for ranks, size in latency if ranks == n))
        for n in dict.fromkeys(ranks for ranks, _ in latency)
    ]
    code = run_as_rank(plan, ranks, outputs) if job is not None else run_alone(plan, alone, outputs)
    if code:
        raise click.exceptions.Exit(code)


def _check_transport(
    transport: str | None, hosts: tuple[int, ...], link: tuple[float | None, ...], *, in_job: bool
) -> str:
    """Return the transport, ours where the user left it open. UsageError for one that is not for this.

    A job may span real hosts.
    """
    if link and not hosts:
        raise click.UsageError("--link goes with --hosts")
    possible = _HOSTS_TRANSPORTS if hosts else (*_ONE_HOST, *(_HOSTS_TRANSPORTS if in_job else ()))
    if transport is not None and transport not in possible:
        where = "without --hosts" if hosts else "with --hosts, or inside a job"
        raise click.UsageError(f"--transport {transport} goes {where}; possible: {', '.join(possible)}")
    return transport or possible[0]


def _run_hosts(plan: Plan, hosts: tuple[int, ...], links: tuple[float | None, ...], json_file: Path | None) -> int:
    from anyep.cli.bench.carry_out import open_console
    from anyep.cli.bench.hosts.carry_out import run_hosts
    from anyep.cli.bench.hosts.plan import HostsPlan

    plans = [HostsPlan(base=plan, ranks_per_host=hosts, link_mbit=link) for link in links or _LINKS]
    return run_hosts(plans, open_console(), json_file)


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
