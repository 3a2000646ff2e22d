"""Two buffers in a process: a rank that is missed in one may wait in the other, and is not to blame then."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

import anyep
from anyep.testing.processes import RankProcesses
from anyep.transport.rendezvous import StoreRendezvous
from tests.engines import skip_without
from tests.hosts.test_bad_luck import until_there

SIZES = {"hidden": 64, "num_topk": 1, "max_tokens_per_rank": 8}
ALL = (0, 1, 2)


@pytest.fixture(params=["shm", "gloo", "nixl"])
def transport(request):
    return skip_without(request.param)


def open_on(group, rank, members, name, **options):
    """Make a buffer of some ranks, numbered in this order; None where this rank is none of them."""
    if rank not in members:
        return None
    part = StoreRendezvous(group._store, members.index(rank), len(members), name=name)
    return anyep.Buffer(part, num_experts=len(members), **options, **SIZES)


def wait_in_two(group, rank, transport, folder, first, second, timeouts_s):
    """Rank 0 waits in the first buffer for rank 1, that one in the second for the last one, which stands still."""
    if transport != "shm":
        os.environ["ANYEP_HOST_ID"] = f"host {rank}" if transport == "gloo" else "ab"[rank % 2]
    options = {"transport": transport, "timeout_s": timeouts_s[rank]}
    a = open_on(group, rank, first, "first", **options)
    b = open_on(group, rank, second, "second", **options)
    group.allgather(b"")
    if rank == group.size - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        if rank == 0:
            with a:
                a.barrier()
        else:
            with a, b:
                b.barrier()
    except anyep.PeerError as error:
        (folder / f"{rank} has left").touch()
        return type(error).__name__, error.ranks, str(error)
    return None


def run_stopped(*args, folder):
    with RankProcesses(3, wait_in_two, *args) as ranks:
        until_there(folder, "0 has left", 1)
        os.kill(ranks.pids[2], signal.SIGKILL)
        outcomes = ranks.outcomes(60)
    for outcome in outcomes[:2]:
        assert outcome.how == "returned", outcome.tell()
    return [outcome.value for outcome in outcomes[:2]]


@pytest.mark.parametrize("second", [(0, 1, 2), (2, 1, 0), (2, 1)])
def test_who_stands_still_is_named_through_the_other_buffer(transport, tmp_path, second):
    told = run_stopped(transport, tmp_path, ALL, second, (2.0, 20.0, 20.0), folder=tmp_path)
    assert told[0][:2] == ("PeerTimeout", (2,)), told[0][2]


def test_who_waits_in_the_other_buffer_for_somebody_unknown_here_is_named_with_that(transport, tmp_path):
    told = run_stopped(transport, tmp_path, (0, 1), (2, 1), (2.0, 20.0, 20.0), folder=tmp_path)
    assert told[0][:2] == ("PeerTimeout", (1,)), told[0][2]
    assert "Rank 1 waits in another buffer of its process, for rank 0 of that buffer" in told[0][2]


@pytest.mark.parametrize("second", [(0, 1, 2), (2, 1, 0), (2, 1)])
def test_an_error_of_the_other_buffer_is_passed_on_in_the_numbers_of_this_one(transport, tmp_path, second):
    """Rank 1's limit ends first; it closes both buffers because of it."""
    told = run_stopped(transport, tmp_path, ALL, second, (20.0, 1.0, 20.0), folder=tmp_path)
    assert told[1][:2] in {("PeerTimeout", (second.index(2),)), ("PeerTimeout", (0, second.index(2)))}, told[1][2]
    assert told[0][:2] == ("PeerTimeout", (2,)), told[0][2]


@pytest.mark.parametrize("played_hosts", [False, True])
@pytest.mark.parametrize("same_group", [False, True])
def test_ranks_that_are_threads_follow_waits_into_other_buffers(played, same_group, played_hosts):
    played(1 if played_hosts else 3)
    group = anyep.local_group(3)
    other = group if same_group else anyep.local_group(3)
    done = threading.Event()

    def rank_main(member):
        timeout_s = 1.0 if member.rank == 0 else 20.0
        options = {"num_experts": 3, "timeout_s": timeout_s, **SIZES}
        number = member.rank if same_group else 2 - member.rank
        with anyep.Buffer(member, **options) as a, anyep.Buffer(other[number], **options) as b:
            if member.rank == 2:
                assert done.wait(30.0)
                return None
            try:
                (a if member.rank == 0 else b).barrier()
            except anyep.PeerError as error:
                done.set()
                return error.ranks
            return None

    assert group.run(rank_main)[0] == (2,)


@pytest.mark.parametrize("how", ["waits", "has waited", "its buffer was closed"])
def test_what_is_said_of_a_wait_elsewhere_is_taken_back(played, how):
    """Rank 1 of two threads waits in its second buffer for a while, and is missed in the first afterwards."""
    played(2)
    group = anyep.local_group(2)
    go, done = threading.Event(), threading.Event()

    def rank_main(member):
        options = {"num_experts": 2, "timeout_s": 20.0, **SIZES}
        with anyep.Buffer(member, **options) as a, anyep.Buffer(member, **options) as b:
            transport = b._end.transport
            if member.rank == 1:
                began_ns = time.monotonic_ns()
                transport.say_waiting([0], began_ns)
                if how == "has waited":
                    transport.say_waited()
                elif how == "its buffer was closed":
                    b.close()
                go.set()
                assert done.wait(20.0)
                return a._end.transport.inquiry._said
            assert go.wait(20.0)
            found = a._end.transport._opened().boards[1].waits_for(1)
            done.set()
            return found

    found, said = group.run(rank_main)
    assert found == (() if how == "has waited" else (0,)), "what was said of a buffer that ended grows old"
    assert bool(said) == (how == "waits")


def pass_on(group, rank, transport, folder):
    """Rank 0 waits in the second buffer for rank 1, and that one in the first for rank 2; rank 0 gives up and closes
    both. Rank 3 waits in the first for rank 0."""
    if transport != "shm":
        os.environ["ANYEP_HOST_ID"] = "abcd"[rank]
    options = {"transport": transport, "timeout_s": 1.5 if rank == 0 else 20.0}
    a = open_on(group, rank, (0, 1, 2, 3), "first", **options)
    b = open_on(group, rank, (1, 0), "second", **options)
    group.allgather(b"")
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        with a:
            if rank == 0:
                with b:
                    b.barrier()
            else:
                a.barrier()
    except anyep.PeerError as error:
        (folder / f"{rank} has left").touch()
        return type(error).__name__, error.ranks, str(error)
    return None


def test_what_is_told_of_a_wait_for_somebody_unknown_is_known_where_he_takes_part(transport, tmp_path):
    with RankProcesses(4, pass_on, transport, tmp_path) as ranks:
        until_there(tmp_path, "3 has left", 1)
        os.kill(ranks.pids[2], signal.SIGKILL)
        outcomes = ranks.outcomes(60)
    told = [outcome.value for outcome in outcomes]
    assert told[0][:2] == ("PeerTimeout", (0,)), "rank 1 of the first is rank 0 of the second"
    assert "Rank 0 waits in another buffer of its process, for rank 2 of that buffer" in told[0][2]
    assert told[3][:2] == ("PeerTimeout", (2,)), told[3][2]
