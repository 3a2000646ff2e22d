"""``anyep bench``: options to plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anyep.cli.bench.asked import DRAWN, HOSTS_TRANSPORTS, ONE_HOST, Asked
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
from anyep.cli.bench.plan import PEERS, TRACE, WIRES

_LINKS = (1000.0, None)


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
    "--routing", default=TRACE, show_default=True, metavar="|".join([*DRAWN, "FILE"]), help="Drawn, or a routing trace."
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
    type=click.Choice([*ONE_HOST, *HOSTS_TRANSPORTS]),
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
def bench(*, json_file: Path | None, picture: Path | None, link: tuple[float | None, ...], **options: Any) -> None:
    """Move tokens, check every byte, say how fast it was.

    Sizes are made smaller, and it says so, where this machine's memory needs it. Works inside a torchrun job too. Exit
    code 1: a byte was wrong, or the machine cannot do it.
    """
    from anyep.cli.bench.launch import job_ranks

    asked = Asked(**options, draws=picture is not None, has_links=bool(link)).checked(job_ranks())
    outputs = Outputs(json=json_file, picture=picture)
    outputs.check()
    if asked.hosts:
        code = _run_hosts(asked, link or _LINKS, json_file)
    elif asked.in_job:
        code = run_as_rank(asked.plan(), asked.ranks, outputs)
    else:
        code = run_alone(asked.plan(), asked.latency_plans(), outputs)
    if code:
        raise click.exceptions.Exit(code)


def _run_hosts(asked: Asked, links: tuple[float | None, ...], json_file: Path | None) -> int:
    from anyep.cli.bench.carry_out import open_console
    from anyep.cli.bench.hosts.carry_out import run_hosts
    from anyep.cli.bench.hosts.plan import HostsPlan

    plans = [HostsPlan(base=asked.plan(), ranks_per_host=asked.hosts, link_mbit=link) for link in links]
    return run_hosts(plans, open_console(), json_file)
