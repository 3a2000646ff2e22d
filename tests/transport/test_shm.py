"""Rank processes: killed, stopped, interrupted, refused; and nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from anyep.errors import Unavailable
from anyep.testing.processes import RankProcesses, run_processes
from anyep.transport.identity import Identity
from anyep.transport.shm import check_one_host
from tests.transport import ranks

R = 4


def _mapping(pids: list[int]) -> set[int]:
    """Return which processes are there and map memory of ours."""
    return {
        pid for pid in pids if Path(f"/proc/{pid}").exists() and "memfd:anyep" in Path(f"/proc/{pid}/maps").read_text()
    }


def _check_clean(pids: list[int]) -> None:
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "no process stays"
    assert not [name for name in os.listdir("/dev/shm") if "anyep" in name], "no memory has a name"


def _wait_for(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(path.iterdir())) < count:
        assert time.monotonic() < deadline, "ranks did not come this far"
        time.sleep(0.005)


@pytest.mark.parametrize("busy", [False, True], ids=["while others wait", "in the middle of traffic"])
def test_killed_rank_is_named_by_every_survivor(tmp_path, busy):
    with RankProcesses(R, ranks.until_lost, str(tmp_path), 2, busy) as processes:
        _wait_for(tmp_path, R)
        time.sleep(0.2)
        os.kill(processes.pids[2], signal.SIGKILL)
        killed = time.monotonic()
        outcomes = processes.outcomes(timeout_s=60)
        pids = processes.pids
    assert (outcomes[2].how, outcomes[2].exit_code) == ("died", -signal.SIGKILL)
    for rank in (0, 1, 3):
        assert outcomes[rank].how == "returned", outcomes[rank].tell()
        kind, culprits, step, text, when = outcomes[rank].value
        assert (kind, culprits) == ("PeerLost", (2,)), text
        assert step.startswith("step ")
        assert f"rank 2 (process {pids[2]})" in text
        assert when - killed < 2.0, "noticed by its end, not by a timeout"
    _check_clean(processes.pids)


def test_stopped_rank_is_a_timeout_that_names_it(tmp_path):
    with RankProcesses(R, ranks.until_silent, str(tmp_path)) as processes:
        _wait_for(tmp_path, R)
        time.sleep(0.2)
        os.kill(processes.pids[1], signal.SIGSTOP)
        (tmp_path / "stopped").touch()
        _wait_for(tmp_path, R + 1 + R - 1)  # every survivor has said that it left
        os.kill(processes.pids[1], signal.SIGCONT)
        outcomes = processes.outcomes(timeout_s=60)
    for rank in (0, 2, 3):
        assert outcomes[rank].how == "returned", outcomes[rank].tell()
        kind, culprits, text = outcomes[rank].value
        assert (kind, culprits) == ("PeerTimeout", (1,)), text
    first = min((outcomes[rank].value[2] for rank in (0, 2, 3)), key=lambda text: "said before leaving" in text)
    for part in ("step ", "epoch ", "timeout_s=0.5", "missing: 1", "arrived: 0, 2-3", f"process {processes.pids[1]}"):
        assert part in first
    assert f"process {processes.pids[1]}, stopped by a signal" in first
    kind, culprits, text = outcomes[1].value
    assert (kind, culprits) == ("PeerTimeout", (1,)), "it hears, on going on, that it was given up"
    assert "rank 1 (this rank" in text
    _check_clean(processes.pids)


def test_nothing_is_left_after_all_are_killed(tmp_path):
    with RankProcesses(R, ranks.until_lost, str(tmp_path), 0, False) as processes:
        _wait_for(tmp_path, R)
        pids = processes.pids
        assert _mapping(pids) == set(pids), "while they live"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        outcomes = processes.outcomes(timeout_s=60)
    assert {outcome.how for outcome in outcomes} == {"died"}
    _check_clean(pids)


def test_waiting_takes_next_to_no_processor_time():
    used = run_processes(8, ranks.wait_long, 1.0, timeout_s=60)[1:]
    assert min(used) < 0.01, f"1 s of waiting took CPU seconds {used}"


def test_ctrl_c_while_waiting(tmp_path):
    with RankProcesses(2, ranks.interrupted, str(tmp_path)) as processes:
        _wait_for(tmp_path, 2)
        time.sleep(0.3)
        os.kill(processes.pids[0], signal.SIGINT)
        outcomes = processes.outcomes(timeout_s=60)
    assert outcomes[0].value == ("KeyboardInterrupt", True), outcomes[0].tell()
    assert outcomes[1].value == ("PeerLost", (0,)), "the interrupted rank closed on its way out"


def test_first_error_is_what_all_ranks_report():
    """Rank 0 leaves because of rank 3. When the others need rank 0 they blame rank 3, and so does rank 3 itself."""
    outcomes = run_processes(R, ranks.leave_in_turn, timeout_s=60)
    assert outcomes == [("PeerTimeout", (3,), "step 1")] + [("PeerTimeout", (3,), "step 2")] * 3


def test_descriptors_and_mappings_do_not_pile_up():
    for before, after in run_processes(3, ranks.open_and_close, 50, timeout_s=120):
        assert after == before


def test_dropped_transport_leaves_no_descriptor_and_no_mapping():
    for before, after in run_processes(3, ranks.open_and_drop, timeout_s=60):
        assert after == before


def test_forked_child_does_not_speak_for_its_parent():
    for rank, told in enumerate(run_processes(2, ranks.fork_in_the_middle, timeout_s=60)):
        text, after, mappings = told
        assert f"transport of rank {rank} belongs to process" in text
        assert "this is a fork of it; use it there" in text
        assert after == [[0, 1]] * 2, "and the parent goes on"
        assert mappings == 0, "the child keeps nothing"


def test_closed_transport_unmaps_all_but_tensors():
    for counts in run_processes(3, ranks.mappings_over_life, timeout_s=60):
        assert counts == {"open": 3, "with a tensor": 1, "without": 0}


@pytest.mark.parametrize("culprit", [0, 2])
def test_rank_that_cannot_open_is_named_everywhere(culprit):
    for rank, (kind, text) in enumerate(run_processes(3, ranks.open_with_few_files, culprit, timeout_s=60)):
        assert kind == "CapacityError", text
        assert "open files" in text or "ulimit -n" in text
        assert (f"rank {culprit} could not open its transport" in text) == (rank != culprit), text


def test_more_memory_than_the_machine_has():
    for kind, text in run_processes(3, ranks.open_too_much, timeout_s=60):
        assert kind == "CapacityError", text
        assert "opening 3 ranks on one host needs" in text


def test_ranks_of_other_hosts_are_refused_by_name():
    for kind, text in run_processes(4, ranks.open_on_hosts, ["a", "b", "a", "b"], timeout_s=60):
        assert kind == "Unavailable"
        assert "ranks 0, 2 on 'a'; ranks 1, 3 on 'b'" in text
    assert run_processes(3, ranks.open_on_hosts, ["same"] * 3, timeout_s=60) == [("opened", "shm")] * 3


def test_one_host_needs_one_process_namespace():
    one, other = (Identity(host="h", process_namespace=namespace, pid=1) for namespace in ("pid:1", "pid:2"))
    check_one_host({0: one, 1: one})
    with pytest.raises(Unavailable, match="2 PID namespaces"):
        check_one_host({0: one, 1: other})


@pytest.mark.parametrize(
    ("blame", "kind", "culprit"), [(None, "PeerLost", 0), (False, "PeerLost", 2), (True, "PeerTimeout", 2)]
)
def test_segment_of_a_rank_that_has_left_names_whom_it_blamed(blame, kind, culprit):
    assert run_processes(3, ranks.map_after_leaving, blame, timeout_s=60)[1] == (kind, (culprit,))
