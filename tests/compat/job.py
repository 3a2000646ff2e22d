"""Starts ranks as torchrun does; the store where they meet is open before they are: nobody can take its port."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from click.testing import CliRunner

import anyep
from anyep.cli.main import cli

_LIMIT_S = 120


class Ended(NamedTuple):
    """A rank's last words."""

    code: int
    output: str


def run_job(program: Path, ranks: int, **variables: str) -> list[Ended]:
    """Run ``program`` in ``ranks`` processes that find ``deep_ep`` by the path alone; leave none behind."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **_finding_deep_ep(),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **variables,
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(program)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=_LIMIT_S)[0] for process in processes]
        return [Ended(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_torchrun(program: Path, ranks: int, **variables: str) -> Ended:
    """Run ``program`` as users do, with torchrun, which chooses a free port and ends all ranks with the first."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**_finding_deep_ep(), **variables}
    ended = subprocess.run(
        [*torchrun, str(program)], env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    return Ended(ended.returncode, ended.stdout + ended.stderr)


def _finding_deep_ep() -> dict[str, str]:
    path = CliRunner().invoke(cli, ["compat-path"]).output.strip()
    found = os.pathsep.join([path, str(Path(anyep.__file__).parents[1])])
    return {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
