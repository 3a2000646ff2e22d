"""Collectives between processes: the same bytes, and an end that everybody notices at once."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

import anyep
from anyep.collectives import Gatherer, Ring, RowStore
from anyep.testing.processes import RankProcesses, run_processes


def all_three(group, rank):
    """Return what this rank got from each, in several rounds."""
    told = []
    with (
        RowStore(group, timeout_s=30.0) as store,
        Ring(group, max_bytes=1 << 16, slots=2, timeout_s=30.0) as ring,
        Gatherer(group, session_bytes=1 << 20, timeout_s=30.0) as gatherer,
    ):
        for turn in range(20):
            store.write(torch.full((5, 300), rank + 10 * turn))
            told.append(store.fetch(torch.tensor([[0, 7], [14, 2]]))[:, :, 299].tolist())
            ring.send(torch.full((50, 50), rank), to=ring.next)
            told.append(int(ring.recv(ring.previous).unique()))
            with gatherer.session() as session:
                slot = session.slot((4000,), torch.int64)
                slot.fill_(rank * turn)
                told.append(session.all_gather(slot)[:, -1].tolist())
    return told


def test_all_three_over_shared_memory():
    for rank, told in enumerate(run_processes(3, all_three)):
        for turn in range(20):
            rows, block, gathered = told[3 * turn : 3 * turn + 3]
            assert rows == [[10 * turn, 1 + 10 * turn], [2 + 10 * turn, 10 * turn]]
            assert block == (rank - 1) % 3
            assert gathered == [0, turn, 2 * turn]


def wait_with(kind):
    """Return how to make an object of a kind, and to wait for rank 1 in it."""
    if kind == "ring":
        return lambda group: Ring(group, max_bytes=64, timeout_s=60.0), lambda ring: ring.recv(1)
    if kind == "rows":
        return lambda group: RowStore(group, timeout_s=60.0), lambda store: store.write(torch.ones(1))
    return lambda group: Gatherer(group, session_bytes=64, timeout_s=60.0), lambda gatherer: gatherer.session()


def wait_for_a_dead_rank(group, rank, kind):
    make, wait = wait_with(kind)
    with make(group) as made:
        group.allgather(b"made")
        if rank == 1:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            wait(made)
        except anyep.PeerLost as error:
            return error.ranks
    return None


@pytest.mark.parametrize("kind", ["ring", "rows", "gatherer"])
def test_a_killed_rank_is_noticed_at_once(kind):
    with RankProcesses(3, wait_for_a_dead_rank, kind) as processes:
        outcomes = processes.outcomes(60.0)
    assert outcomes[1].how == "died"
    for rank in (0, 2):
        assert outcomes[rank].value == (1,), "ranks that only wait for timeout_s are stuck by then"


def fetch_from_the_dead(group, rank):
    with RowStore(group) as store:
        store.write(torch.full((2, 1000), float(rank)))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        return store.fetch(torch.tensor([3, 0]))[:, 999].tolist()


def test_rows_of_a_killed_rank_can_still_be_fetched():
    with RankProcesses(2, fetch_from_the_dead) as processes:
        outcomes = processes.outcomes(60.0)
    assert outcomes[0].value == [1.0, 0.0], outcomes[0].tell()


def fork_and_fetch(group, rank):
    with RowStore(group) as store:
        store.write(torch.full((2, 1000), float(rank)))
        child = os.fork()
        if child == 0:
            try:
                store.fetch(torch.tensor([2 * (1 - rank)]))
            except anyep.ClosedError as error:
                os._exit(7 if "this is a fork of it" in str(error) else 8)
            os._exit(9)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), store.fetch(torch.tensor([3])).unique().tolist()


def test_a_forked_child_is_refused():
    assert run_processes(2, fork_and_fetch) == [(7, [1.0])] * 2
