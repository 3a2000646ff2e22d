"""Starts the ranks: as processes, under mpiexec, as threads, or inside a job that torchrun has started."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from anyep.cli.bench.peers import find_mpiexec
from anyep.cli.bench.plan import Plan
from anyep.cli.bench.rank import run_rank
from anyep.cli.bench.stage import RankResult, Report, Step
from anyep.cli.machine_facts import available_cores
from anyep.errors import AnyEPError
from anyep.machine.processes import die_with_parent, hold_signals, lay_out_alike

_POLL_S = 0.2
_GRACE_S = 3.0
"""How long other ranks may take to report after the first failure: the culprit's own message may come last."""


class BenchmarkError(AnyEPError):
    """A rank ended with an error; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A rank's last word when all went well."""

    rank: int
    results: list[RankResult]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A rank's last word otherwise."""

    rank: int
    kind: str
    text: str
    follows: bool
    """it may have come from another rank's failure"""


def job_ranks() -> int | None:
    """Return the ranks of the job in which torchrun, or something like it, has started this process; None: in none."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def run_threads(plan: Plan, report: Report) -> list[list[RankResult]]:
    """Run ranks as threads of this process."""
    from anyep.transport.inprocess import Member, local_group

    def body(member: Member) -> list[RankResult]:
        return run_rank(member, plan, report if member.rank == 0 else _silent)

    return list(local_group(plan.ranks).run(body))


def run_in_job(plan: Plan, report: Report) -> list[list[RankResult]]:
    """Run as one rank of the job of torch.distributed's default group; every rank gets all results."""
    import torch.distributed as dist

    limit_threads(plan.ranks)
    results = run_rank(dist.group.WORLD, plan, report if dist.get_rank() == 0 else _silent)
    gathered: list[list[RankResult]] = [[] for _ in range(plan.ranks)]
    dist.all_gather_object(gathered, results)
    return gathered


def run_processes(plan: Plan, report: Report) -> list[list[RankResult]]:
    """Start a process a rank, wait for their results, and leave none behind. BenchmarkError names the culprit."""
    with tempfile.TemporaryDirectory(prefix="anyep-bench-") as name, _listening(Path(name)) as server:
        directory = Path(name)
        (directory / "plan").write_bytes(pickle.dumps(plan))
        processes: list[subprocess.Popen[bytes]] = []
        try:
            with hold_signals():
                processes.extend(_start(plan, directory))
            return _collect(plan, server, processes, directory, report)
        finally:
            _end(processes)


def limit_threads(num_ranks: int) -> None:
    """Give torch's own loops this rank's share of the cores."""
    torch.set_num_threads(max(1, available_cores() // num_ranks))


@contextmanager
def _listening(directory: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "socket"))
        server.listen(1024)
        yield server


def _start(plan: Plan, directory: Path) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "anyep.cli.bench.rank_main", str(directory)]
    if "mpich" in plan.peers:
        launcher = [str(find_mpiexec()), "-launcher", "fork", "-n", str(plan.ranks)]
        return [_spawn([*launcher, *command, "mpi"], directory / "stderr")]
    return [_spawn([*command, str(rank)], directory / "stderr") for rank in range(plan.ranks)]


def _spawn(command: list[str], stderr: Path) -> subprocess.Popen[bytes]:
    with stderr.open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_prepare)


def _prepare() -> None:
    die_with_parent()
    lay_out_alike()


def _collect(
    plan: Plan, server: socket.socket, processes: list[subprocess.Popen[bytes]], directory: Path, report: Report
) -> list[list[RankResult]]:
    connections: list[Connection] = []
    finished: dict[int, list[RankResult]] = {}
    failures: list[Failed] = []
    deadline = float("inf")
    while len(finished) < plan.ranks:
        for ready in wait([server, *connections], _POLL_S):
            if ready is server:
                connections.append(Connection(server.accept()[0].detach()))
                continue
            assert isinstance(ready, Connection)
            word = _receive(ready, connections)
            if isinstance(word, Step):
                report(word)
            elif isinstance(word, Finished):
                finished[word.rank] = word.results
            elif isinstance(word, Failed):
                if word.kind == KeyboardInterrupt.__name__:
                    raise KeyboardInterrupt
                failures.append(word)
        ended = [process for process in processes if process.poll() not in (None, 0)]
        if (failures or ended) and deadline == float("inf"):
            deadline = time.monotonic() + _GRACE_S
        if time.monotonic() > deadline or len(failures) == plan.ranks:
            raise BenchmarkError(_why(failures, ended, directory))
    return [finished[rank] for rank in range(plan.ranks)]


def _receive(connection: Connection, connections: list[Connection]) -> object:
    try:
        return connection.recv()
    except (EOFError, OSError):
        connections.remove(connection)
        connection.close()
        return None


def _why(failures: list[Failed], ended: list[subprocess.Popen[bytes]], directory: Path) -> str:
    codes = {abs(process.returncode) for process in ended}
    first = min(failures, key=lambda failure: failure.follows, default=None)
    if first is not None and not (first.follows and signal.SIGKILL in codes):
        return f"rank {first.rank}: {first.kind}: {first.text}"
    if signal.SIGKILL in codes:
        said = "" if first is None else f"; rank {first.rank} says: {first.text}"
        return f"a rank process was killed (signal 9), as happens when memory runs out: use fewer --tokens{said}"
    tail = (directory / "stderr").read_text(errors="replace").strip().splitlines()[-5:]
    return f"a rank process ended with exit code {min(codes)} and no word; its last lines: " + " | ".join(tail)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _silent(step: Step) -> None:
    """Only rank 0 reports."""
