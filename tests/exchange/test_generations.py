"""Hosts that die and come back: survivors keep their processes, and make a buffer with those that take the places."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import FileStore

import anyep
from anyep.errors import Unavailable
from anyep.testing.hosts import Hosts, check_hosts
from anyep.testing.processes import RankProcesses

SIZES = {"hidden": 512, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 64}
NUM_RANKS, PER_HOST = 4, 2


def exchange(ep: anyep.Buffer) -> bool:
    """Send 16 rows everywhere and back; return whether the sums are right."""
    x = torch.full((16, 512), ep.rank + 1.0).bfloat16()
    received = ep.dispatch(x, torch.stack([torch.arange(16) % 8, (torch.arange(16) + 3) % 8], 1))
    y = ep.empty_output(received.handle).copy_(received.x)
    ranks = torch.stack([torch.arange(16) % 8 // 2, (torch.arange(16) + 3) % 8 // 2], 1)
    times = 1 + (ranks[:, 0] != ranks[:, 1]).float()[:, None]
    return bool(torch.equal(ep.combine(y, received.handle).float(), x.float() * times))


def work(group, number, store, folder, first_rank, plays, deaths):
    """Exchange; a rank of the second host dies in the middle of its first ``deaths`` generations."""
    if plays:
        os.environ["ANYEP_RANKS_PER_HOST"] = str(PER_HOST)
    rank = first_rank + number
    generations = anyep.Generations(FileStore(store, -1), rank, NUM_RANKS, timeout_s=30.0)
    diary = []
    while True:
        try:
            with anyep.Buffer(generations.meet(), timeout_s=20.0, **SIZES) as ep:
                diary.append((generations.number, exchange(ep)))
                if rank >= PER_HOST and generations.number <= deaths:
                    os.kill(os.getpid(), signal.SIGKILL)
                if generations.number <= deaths:
                    exchange(ep)
                    exchange(ep)
            return diary
        except anyep.PeerError as error:
            diary.append((type(error).__name__, set(error.ranks) <= {2, 3}))
            Path(folder, f"heard{rank}-{generations.number}").touch()


def wait_for(paths):
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, "survivors did not hear of it"
        time.sleep(0.02)


def check(survivors, others, deaths):
    for outcome in survivors:
        assert outcome.how == "returned", outcome.tell()
        expected = [one for n in range(1, deaths + 1) for one in ((n, True), ("PeerLost", True))]
        assert outcome.value == [*expected, (deaths + 1, True)]
    for outcome in others:
        assert outcome.how == "returned", outcome.tell()
        assert outcome.value == [(deaths + 1, True)]


def test_a_host_that_died_comes_back_to_the_ranks_that_are_left(tmp_path):
    arguments = (str(tmp_path / "store"), str(tmp_path))
    with RankProcesses(NUM_RANKS, work, *arguments, 0, True, 1) as ranks:
        wait_for([tmp_path / "heard0-1", tmp_path / "heard1-1"])
        with RankProcesses(PER_HOST, work, *arguments, PER_HOST, True, 1) as others:
            check(ranks.outcomes(60)[:PER_HOST], others.outcomes(60), 1)


def test_a_host_may_die_and_come_back_more_than_once(tmp_path):
    """Each set of processes joins the generation behind the last one that its ranks were in."""
    arguments = (str(tmp_path / "store"), str(tmp_path))
    with RankProcesses(NUM_RANKS, work, *arguments, 0, True, 2) as ranks:
        for number in (1, 2):
            wait_for([tmp_path / f"heard0-{number}"])
            with RankProcesses(PER_HOST, work, *arguments, PER_HOST, True, 2) as others:
                outcomes = others.outcomes(60)
            assert [outcome.how for outcome in outcomes] == ["died" if number == 1 else "returned"] * PER_HOST
        check(ranks.outcomes(60)[:PER_HOST], outcomes, 2)


@pytest.mark.slow
def test_a_host_comes_back_at_its_old_address(tmp_path):
    """Between network namespaces: the same interfaces and addresses as before."""
    try:
        check_hosts()
        hosts = Hosts(2)
    except Unavailable as error:
        pytest.skip(str(error))
    arguments = (str(tmp_path / "store"), str(tmp_path))
    with hosts, hosts.start([PER_HOST, PER_HOST], work, *arguments, 0, False, 1) as ranks:
        wait_for([tmp_path / "heard0-1", tmp_path / "heard1-1"])
        with hosts.start([0, PER_HOST], work, *arguments, PER_HOST, False, 1) as others:
            check(ranks.outcomes(60)[:PER_HOST], others.outcomes(60), 1)


def test_a_rank_outside_of_the_group_is_refused(tmp_path):
    with pytest.raises(ValueError, match="from 0 to size - 1 = 3, got 4"):
        anyep.Generations(FileStore(str(tmp_path / "store"), -1), 4, 4)
