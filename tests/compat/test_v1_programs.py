"""Programs written for DeepEP run unchanged: only PYTHONPATH says where ``deep_ep`` is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import anyep
from anyep.cli.main import cli

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(program: str, ranks: int, **more: str) -> list[str]:
    """Start ``ranks`` processes as torchrun does; return what they print, and leave none behind."""
    path = CliRunner().invoke(cli, ["compat-path"]).output.strip()
    environment = {
        **os.environ,
        "PYTHONPATH": f"{path}:{Path(anyep.__file__).parents[1]}",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        **more,
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / program)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        return [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("program", "ranks", "hosts"),
    [("prefill", 2, {}), ("prefill", 4, {"ANYEP_RANKS_PER_HOST": "2"}), ("decode", 2, {})],
)
def test_a_program_for_deep_ep_runs_unchanged(program, ranks, hosts):
    outputs = run_ranks(f"program_{program}.py", ranks, **hosts)
    for rank, output in enumerate(outputs):
        assert f"{program} {rank} of {ranks}: fine" in output, "\n".join(outputs)
