"""A program that knows DeepEP alone runs unchanged, with the path that ``anyep compat-path`` prints."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("v2_program.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("per_host", ["2", "1"])
def test_a_training_step_runs_unchanged_in_two_processes(per_host):
    printed = subprocess.run(
        [sys.executable, "-m", "anyep", "compat-path"], capture_output=True, text=True, check=True, timeout=60
    )
    path = os.pathsep.join([printed.stdout.strip(), *filter(None, [os.environ.get("PYTHONPATH")])])
    port = str(free_port())
    ranks = []
    for rank in range(2):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables["ANYEP_RANKS_PER_HOST"] = per_host
        environment = {**os.environ, **variables, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(PROGRAM)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    assert "trained a step" in outputs[0]
