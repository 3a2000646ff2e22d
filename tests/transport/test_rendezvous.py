"""Groups of every kind meet: torch process groups, torchrun, MPI, stores, threads, anything with the three names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore

from anyep.errors import PeerTimeout
from anyep.testing.processes import RankProcesses, run_processes
from anyep.transport.identity import Identity
from anyep.transport.inprocess import local_group
from anyep.transport.rendezvous import StoreRendezvous, find_rendezvous
from tests.transport import ranks

PROGRAM = Path(__file__).with_name("program.py")


def test_a_store_serves_many_meetings_in_order():
    store = HashStore()

    def work(member):
        gathered = []
        for _ in range(3):
            rendezvous = StoreRendezvous(store, member.rank, member.size, timeout=timedelta(seconds=20))
            gathered += [rendezvous.allgather(b"%d-%d" % (member.rank, call)) for call in range(3)]
        return gathered

    for gathered in local_group(3).run(work):
        assert gathered == [[b"0-%d" % call, b"1-%d" % call, b"2-%d" % call] for call in range(3)] * 3


def test_meetings_leave_nothing_but_who_took_part_in_the_store():
    store = HashStore()

    def work(member):
        rendezvous = StoreRendezvous(store, member.rank, member.size)
        for call in range(5):
            rendezvous.allgather(bytes(call))

    local_group(2).run(work)
    assert store.num_keys() == 4, "a counter and a process of each rank"


def test_empty_items_are_items():
    store = HashStore()
    group = local_group(2)
    assert group.run(lambda m: StoreRendezvous(store, m.rank, 2).allgather(b"")) == [[b"", b""]] * 2
    assert group.run(lambda m: m.allgather(b"")) == [[b"", b""]] * 2


def test_a_rank_that_does_not_come_to_the_store_is_named():
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    rendezvous = StoreRendezvous(store, 0, 3, timeout=timedelta(seconds=0.3))
    StoreRendezvous(store, 1, 3)._store.set("1/1", b"here")
    with pytest.raises(PeerTimeout, match=r"rank 2 did not come .* within 0.3 s") as caught:
        rendezvous.allgather(b"")
    assert (caught.value.ranks, caught.value.step) == ((2,), "opening")


@pytest.mark.parametrize("comes_first", [True, False], ids=["after one meeting", "before it came"])
def test_a_rank_process_that_dies_before_it_comes_is_lost(comes_first):
    with RankProcesses(3, ranks.killed_before_opening, 1, comes_first) as processes:
        outcomes = processes.outcomes(timeout_s=60)
        pid = processes.pids[1]
    for rank in (0, 2):
        assert outcomes[rank].how == "returned", outcomes[rank].tell()
        kind, culprits, text, seconds = outcomes[rank].value
        assert (kind, culprits) == ("PeerLost", (1,))
        assert f"rank 1 (process {pid}) ended before it came" in text
        assert seconds < 10, "by its end, and not by the five minutes of the store"


def test_a_rank_of_another_host_cannot_be_seen_to_end():
    own = Identity.own()
    assert not own.has_ended()
    assert replace(own, pid=2**22 + 5).has_ended()
    assert replace(own, started="1").has_ended(), "another process has that number now"
    for change in ({"host": "elsewhere"}, {"process_namespace": "pid:1"}, {"started": ""}):
        assert not replace(own, pid=2**22 + 5, **change).has_ended()


def test_torch_process_groups():
    """The default group, groups of some ranks, and None where torch.distributed runs."""
    assert run_processes(3, ranks.meet_in_torch_groups, timeout_s=120) == [
        ["default 0-1-2", "none 0-1-2", "part 0-2", "shm 0-1-2", "shm 0-2"],
        ["default 0-1-2", "none 0-1-2", "not a member", "shm 0-1-2"],
        ["default 0-1-2", "none 0-1-2", "part 0-2", "shm 0-1-2", "shm 0-2"],
    ]


def _run(command: list[str]) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": ranks.python_path()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_torchrun():
    """None is torchrun's job, without a process group; several transports, one after the other and at the same time."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    output = _run([*launch, str(PROGRAM), "torchrun"])
    assert sorted(re.findall(r"rank (\d) exchanged (.*?);", output)) == [
        (str(rank), "[0, 1, 2]" * 4) for rank in range(3)
    ]


def test_mpi():
    pytest.importorskip("mpi4py")
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("no mpiexec beside this Python (the bench extra has one)")
    output = _run([str(mpiexec), "-launcher", "fork", "-n", "3", sys.executable, str(PROGRAM), "mpi"])
    assert sorted(re.findall(r"rank (\d) exchanged (.*?);", output)) == [
        (str(rank), "[0, 1, 2]" * 4) for rank in range(3)
    ]


class _Own:
    rank, size = 0, 1

    def allgather(self, item):
        return [item]


def test_anything_with_the_three_names_is_a_group():
    own = _Own()
    assert find_rendezvous(own) is own
    member = local_group(2)[1]
    assert find_rendezvous(member) is member


class _Methods:
    def rank(self):
        return 0

    size = allgather = rank


@pytest.mark.parametrize("group", ["gloo", 4, object(), _Methods(), [0, 1]])
def test_what_is_no_group(group):
    with pytest.raises(
        TypeError, match=r"torch.distributed process group, an mpi4py communicator, .*local_group"
    ) as caught:
        find_rendezvous(group)
    assert f"got {type(group).__name__}" in str(caught.value)


def test_none_outside_of_torchrun(monkeypatch):
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TypeError, match=r"None inside a torchrun job; got None, and torchrun's agent did not start"):
        find_rendezvous(None)
