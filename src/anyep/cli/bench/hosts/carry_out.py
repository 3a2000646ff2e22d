"""From plans to tables and JSON: makes the hosts of each plan, one after another, and leaves none behind."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from anyep.cli.bench.hosts.plan import HostsPlan
from anyep.cli.bench.hosts.rank import HostResult, run_host_rank
from anyep.cli.bench.hosts.summary import hosts_json, summarise_hosts
from anyep.cli.bench.hosts.table import print_hosts
from anyep.cli.bench.launch import BenchmarkError
from anyep.cli.bench.sizing import fit
from anyep.cli.machine_facts import available_memory_bytes, describe_machine
from anyep.testing.hosts import Hosts, check_hosts
from anyep.testing.processes import RankFailed

_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
"""What torch's C++ says, by its own variable: where no host has a name, it warns on every rank that it finds none."""
_LONGEST_S = 3600.0
"""A rank that stands still is noticed long before, by the others."""


def run_hosts(plans: list[HostsPlan], console: Console, json_file: Path | None) -> int:
    """Measure each plan, print, and return the exit code: 1 too where one failed, and the others' results are partial.

    Raises Unavailable where hosts cannot be played.
    """
    check_hosts()
    load = os.getloadavg()[0]
    notes, launches = [f"the machine's load before the first round was {load:.1f}"], []
    failures = []
    for plan in plans:
        base, said = fit(plan.base, available_memory_bytes())
        notes += said
        console.print(
            f"{plan.base.ranks} ranks on {len(plan.ranks_per_host)} hosts, {plan.link} ...",
            highlight=False,
            markup=False,
        )
        smaller = replace(plan, base=base)
        try:
            launches.append((smaller, _launch(smaller)))
        except BenchmarkError as error:  # what other links gave is not lost
            failures.append(f"{plan.link}: {error}")
    summary = summarise_hosts(describe_machine(), notes, launches, failures)
    print_hosts(summary, console)
    if json_file is not None:
        json_file.write_text(json.dumps(hosts_json(summary), indent=1) + "\n")
    return 1 if summary.mismatches or failures else 0


def _launch(plan: HostsPlan) -> list[list[HostResult]]:
    with (
        tempfile.TemporaryDirectory(prefix="anyep-hosts-") as directory,
        Hosts(len(plan.ranks_per_host), link_mbit=plan.link_mbit) as hosts,
        _only_errors_of_torch(),
        hosts.start(plan.ranks_per_host, run_host_rank, plan, f"{directory}/store") as ranks,
    ):
        try:
            return ranks.results(_LONGEST_S)
        except RankFailed as error:
            raise BenchmarkError(str(error).partition("\n")[0]) from error


@contextmanager
def _only_errors_of_torch() -> Iterator[None]:
    """Let ranks that are started meanwhile inherit a log level, unless one is set."""
    if _LOG_LEVEL in os.environ:
        yield
        return
    os.environ[_LOG_LEVEL] = "ERROR"
    try:
        yield
    finally:
        del os.environ[_LOG_LEVEL]
