"""The process of one rank: ``python -m anyep.cli.bench.rank_main DIRECTORY RANK``; ``mpi`` for RANK under mpiexec.

The directory holds the plan, the socket of whoever waits for the results, and the store where ranks meet.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from anyep.cli.bench.launch import Failed, Finished, limit_threads
from anyep.cli.bench.plan import Plan
from anyep.cli.bench.rank import run_rank
from anyep.machine import processes
from anyep.testing.peers.mpich import mpi_world
from anyep.transport.liveness import follows_from_peer


def main(directory: Path, which: str) -> None:
    """Carry out the plan in ``directory`` and send the results; exit code 1 after an error was sent."""
    processes.die_with_parent()  # under mpiexec the parent is its proxy
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    plan: Plan = pickle.loads((directory / "plan").read_bytes())
    communicator = mpi_world() if which == "mpi" else None
    rank = int(which) if communicator is None else communicator.Get_rank()
    with Client(str(directory / "socket")) as connection:
        try:
            _carry_out(directory, plan, rank, communicator, connection)
        except BaseException as error:
            follows = follows_from_peer(error) or isinstance(error, dist.DistError)
            connection.send(Failed(rank=rank, kind=type(error).__name__, text=str(error), follows=follows))
            os._exit(1)  # MPI and gloo would wait for the others in their exit handlers


def _carry_out(directory: Path, plan: Plan, rank: int, communicator: Any, connection: Connection) -> None:
    limit_threads(plan.ranks)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'store'}",
        rank=rank,
        world_size=plan.ranks,
        timeout=timedelta(seconds=plan.timeout_s),
    )
    report: Callable[[object], None] = connection.send if rank == 0 else lambda step: None
    results = run_rank(dist.group.WORLD, plan, report, communicator)
    dist.destroy_process_group()
    connection.send(Finished(rank=rank, results=results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
