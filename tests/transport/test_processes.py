"""Rank processes: results, failures with their tracebacks, and no process that outlives its run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from anyep.testing.processes import RankFailed, RankProcesses, run_processes
from tests.transport import ranks


def _gone(pids):
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"still there: {pids}"
        time.sleep(0.01)


def test_results_come_in_rank_order():
    gathered = [b"\x00", b"\x01", b"\x02"]
    assert run_processes(3, ranks.whoami, 5) == [(rank, 3, 5, gathered) for rank in range(3)]


def test_tensors_travel_by_value():
    x = torch.arange(1000.0)
    for rank, y in enumerate(run_processes(2, ranks.scaled, x)):
        assert torch.equal(y, x * (rank + 1))


def test_failure_carries_the_traceback_of_the_rank_at_fault():
    with pytest.raises(
        RankFailed, match=r"rank 1 raised ValueError: rank 1 fails on purpose\nTraceback(.|\n)*fail_on"
    ) as caught:
        run_processes(3, ranks.fail_on, 1)
    assert [outcome.how for outcome in caught.value.outcomes] == ["returned", "raised", "returned"]


def test_root_cause_and_not_what_followed():
    with pytest.raises(RankFailed, match=r"^rank 2 raised ValueError: the culprit"):
        run_processes(3, ranks.fail_after_exchange, 2)


def test_a_rank_that_dies_without_a_word():
    with pytest.raises(RankFailed, match="rank 2 died with exit code 7"):
        run_processes(3, ranks.die_on, 2)


def test_a_result_that_cannot_travel_is_that_ranks_error():
    with pytest.raises(RankFailed, match=r"rank 0 raised (AttributeError|PicklingError|TypeError)"):
        run_processes(1, ranks.unpicklable)


def test_ranks_that_take_too_long_are_ended():
    with RankProcesses(2, ranks.sleep_on, 1, 100.0) as processes:
        outcomes = processes.outcomes(timeout_s=2.0)
        assert [outcome.how for outcome in outcomes] == ["returned", "stuck"]
        _gone(processes.pids)
    with pytest.raises(RankFailed, match="rank 0 stuck after 1 s"):
        run_processes(1, ranks.sleep_on, 0, 100.0, timeout_s=1.0)


def test_leaving_ends_every_rank_stopped_ones_too():
    processes = RankProcesses(2, ranks.sleep_on, 1, 100.0)

    def fail():
        with processes:
            os.kill(processes.pids[1], signal.SIGSTOP)
            raise KeyError("the test itself fails")

    with pytest.raises(KeyError):
        fail()
    _gone(processes.pids)


def test_ranks_end_with_whoever_started_them(tmp_path):
    """Also when that one is killed."""
    program = (
        "import sys, time\n"
        "from anyep.testing.processes import RankProcesses\n"
        "from tests.transport import ranks\n"
        "if __name__ == '__main__':\n"
        "    processes = RankProcesses(2, ranks.sleep_on, 0, 100.0)\n"
        "    print(*processes.pids, flush=True)\n"
        "    time.sleep(100)\n"
    )
    (tmp_path / "starter.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": ranks.python_path()}
    starter = subprocess.Popen(
        [sys.executable, str(tmp_path / "starter.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert starter.stdout is not None
    pids = [int(pid) for pid in starter.stdout.readline().split()]
    assert len(pids) == 2
    starter.kill()
    starter.wait()
    starter.stdout.close()
    _gone(pids)
