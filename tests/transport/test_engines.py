"""What engines between processes do beside their exam: killed ranks, the surroundings, the same memory twice."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from anyep.testing.processes import RankProcesses, run_processes
from tests.engines import skip_without
from tests.transport import engine_ranks


@pytest.fixture(params=["gloo", "nixl"])
def name(request):
    return skip_without(request.param)


def test_a_rank_that_is_killed_in_the_middle_of_a_message_is_named(name, tmp_path):
    with RankProcesses(3, engine_ranks.stream_for_ever, name, str(tmp_path)) as ranks:
        _until(lambda: len(list(tmp_path.iterdir())) == 3)
        os.kill(ranks.pids[1], signal.SIGKILL)
        outcomes = ranks.outcomes(30)
    for rank in (0, 2):
        kind, culprits, text = outcomes[rank].value
        assert (kind, culprits) == ("PeerLost", (1,)), text
        assert "rank 1 died" in text


def test_ranks_that_survive_go_on_with_each_other(name, tmp_path):
    with RankProcesses(3, engine_ranks.go_on_without, name, str(tmp_path)) as ranks:
        _until(lambda: len(list(tmp_path.iterdir())) == 3)
        os.kill(ranks.pids[1], signal.SIGKILL)
        outcomes = ranks.outcomes(30)
    assert [outcomes[rank].value for rank in (0, 2)] == ["died", "died"]


def test_ranks_that_flush_do_not_keep_each_other_waiting_for_one_that_is_stopped(name, tmp_path):
    with RankProcesses(3, engine_ranks.flush_beside_a_stopped_one, name, str(tmp_path)) as ranks:
        _until(lambda: len(list(tmp_path.glob("here *"))) == 3)
        os.kill(ranks.pids[2], signal.SIGSTOP)
        _until(lambda: _stands_still(ranks.pids[2]))
        (tmp_path / "stopped").touch()
        _until(lambda: len(list(tmp_path.glob("flushed *"))) == 2)
        os.kill(ranks.pids[2], signal.SIGKILL)
        outcomes = ranks.outcomes(30)
    assert [outcome.value for outcome in outcomes] == [[True, False], [True, False], None]


def test_a_rank_that_closed_is_told_from_one_that_died(name):
    assert run_processes(2, engine_ranks.how_it_left, name) == [None, "closed"]


def test_a_rank_that_closes_while_it_is_spoken_to_is_told_from_one_that_died(name):
    assert run_processes(2, engine_ranks.how_it_left_while_spoken_to, name) == [[], ["closed"] * 5]


def test_neither_the_environment_nor_the_default_group_is_touched(name):
    assert run_processes(2, engine_ranks.surroundings, name) == [(True, True)] * 2


def test_read_only_memory_is_sent_without_a_warning(name):
    assert run_processes(2, engine_ranks.send_read_only, name) == [True, True]


def test_the_same_memory_goes_to_several_ranks_at_a_time(name):
    assert run_processes(3, engine_ranks.send_to_all, name) == [True] * 3


def test_messages_move_on_while_ranks_compute(name):
    assert run_processes(2, engine_ranks.compute_meanwhile, name) == [True, True]


def _stands_still(pid: int) -> bool:
    """Whether every thread of a process is stopped: the last may still answer when the first is."""
    states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


def _until(holds) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
