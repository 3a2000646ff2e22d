"""Rank processes on several hosts, with gloo between them: the same bits, and who is named when ranks or links end."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import anyep
from anyep.errors import Unavailable
from anyep.layout.hosts import group_ranks
from anyep.testing.hosts import Hosts, check_hosts
from anyep.testing.processes import RankProcesses, run_processes
from tests.exchange.rounds import check, open_buffer, play, poison_arenas
from tests.exchange.test_behaviour import CASE

SIZES = {"hidden": 512, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 64}
CASES = [
    replace(CASE, wire="fp8", num_bias=1),
    replace(CASE, layout="expert", reduce="expert", alignment=4),
    replace(CASE, layout="padded", wire="fp8"),
]


def play_cases(group, rank, engine, ranks_per_host, straight_bytes, chosen):
    """Play cases one after another on hosts of so many ranks; return the outcomes and what was chosen."""
    os.environ["ANYEP_RANKS_PER_HOST"] = str(ranks_per_host)
    poison_arenas()
    outcomes, told = [], ""
    for case in chosen:
        with open_buffer(case, group, transport=engine, straight_bytes=straight_bytes) as ep:
            outcomes.append(play(case, ep))
            told = str(ep.explain())
    return outcomes, told


TOPOLOGIES = {
    "2x2": ((17, 0, 40, 9), 2),
    "2x4": ((5, 40, 0, 7, 30, 1, 20, 0), 4),
    "3x1": ((17, 0, 40), 1),
    "3x2+1": ((5, 40, 0, 7, 30, 1, 20), 2),
    "3+3+1": ((5, 40, 0, 7, 30, 1, 20), 3),
}
QUICK = {("2x2", 0), ("3x1", 1 << 20), ("3x2+1", 0)}
WAYS = [
    pytest.param(
        *TOPOLOGIES[name], straight, id=f"{name}-{way}", marks=() if (name, straight) in QUICK else pytest.mark.slow
    )
    for name in TOPOLOGIES
    for way, straight in (("forwarded", 0), ("straight", 1 << 20))
]


@pytest.mark.parametrize(("num_tokens", "ranks_per_host", "straight_bytes"), WAYS)
def test_an_exchange_between_hosts_is_exact(engine, num_tokens, ranks_per_host, straight_bytes):
    chosen = [replace(case, num_tokens=num_tokens) for case in CASES]
    results = run_processes(len(num_tokens), play_cases, engine, ranks_per_host, straight_bytes, chosen)
    for number, case in enumerate(chosen):
        check(case, [outcomes[number] for outcomes, _ in results], group_ranks(len(num_tokens), ranks_per_host))
    assert all({"gloo": "gloo of torch", "nixl": "NIXL, UCX inside"}[engine] in told for _, told in results)


def exchange_large(group, rank, engine):
    """Rows of several messages for each pair of hosts, there and back."""
    os.environ["ANYEP_RANKS_PER_HOST"] = "2"
    x = (torch.arange(512)[:, None] + rank).expand(512, 4096).bfloat16().contiguous()
    idx = torch.tensor([[0, 2]]).expand(512, 2).contiguous() + (torch.arange(512) % 2)[:, None]
    sizes = {"hidden": 4096, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": 512}
    with anyep.Buffer(group, transport=engine, **sizes) as ep:
        received = ep.dispatch(x, idx)
        out = ep.combine(received.x, received.handle)
    return bool(torch.equal(out, 2 * x)), received.handle.num_rows


def test_rows_cross_in_many_messages(engine):
    assert run_processes(4, exchange_large, engine) == [(True, 4 * 256)] * 4


def recall_handle(group, rank, engine, straight_bytes):
    """Make a dispatch's handle again from its counts; combine and dispatch with both."""
    os.environ["ANYEP_RANKS_PER_HOST"] = "2"
    generator = torch.Generator().manual_seed(rank)
    tokens = (40, 0, 7)[rank]
    x = torch.randn(tokens, 512, generator=generator).bfloat16()
    idx = torch.rand(tokens, 6, generator=generator).argsort(dim=1)[:, :2].contiguous()
    sizes = SIZES | {"num_experts": 6}
    with anyep.Buffer(group, transport=engine, wire="raw16", straight_bytes=straight_bytes, **sizes) as ep:
        received = ep.dispatch(x.view(torch.int16), idx)
        again = ep.handles.recall(idx.clone(), torch.from_numpy(received.handle.announced.copy()))
        y = received.x.view(torch.bfloat16)
        sums = ep.combine(y, received.handle)
        assert torch.equal(ep.combine(y, again), sums)
        cached = ep.dispatch((2 * x).view(torch.int16), handle=again).x.view(torch.bfloat16)
        assert torch.equal(cached, 2 * y)
        return bool(torch.equal(ep.combine(cached, again), 2 * sums))


@pytest.mark.parametrize("straight_bytes", [0, 1 << 20], ids=["forwarded", "straight"])
def test_a_recalled_handle_serves_like_the_first_one(engine, straight_bytes):
    assert run_processes(3, recall_handle, engine, straight_bytes) == [True] * 3


def wait_for_end(group, rank, folder, victim, action, ranks_per_host, engine="auto"):
    """Exchange once, then let the victim act, or the link; the others report how they heard of it, and how late."""
    if ranks_per_host:
        os.environ["ANYEP_RANKS_PER_HOST"] = str(ranks_per_host)
    x = torch.ones(8, 512, dtype=torch.bfloat16)
    idx = torch.arange(16).view(8, 2) % 8
    timeout_s = 30.0 if action == "kill" else 2.0
    with anyep.Buffer(group, timeout_s=timeout_s, transport=engine, **SIZES) as ep:
        received = ep.dispatch(x, idx)
        ep.combine(received.x, received.handle)
        Path(folder, f"ready{rank}").touch()
        if rank == victim:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        while action == "cut" and not Path(folder, "cut").exists():
            time.sleep(0.02)
        begin = time.monotonic()
        try:
            ep.dispatch(x, idx)
        except anyep.PeerError as error:
            return type(error).__name__, error.ranks, error.step, str(error), time.monotonic() - begin
    return None


@pytest.mark.parametrize(("num_ranks", "ranks_per_host", "victim"), [(4, 2, 3), (4, 2, 0), (3, 1, 1)])
def test_a_killed_rank_is_named_on_all_hosts_within_seconds(tmp_path, engine, num_ranks, ranks_per_host, victim):
    with RankProcesses(num_ranks, wait_for_end, str(tmp_path), victim, "kill", ranks_per_host, engine) as ranks:
        outcomes = ranks.outcomes(timeout_s=60)
    assert outcomes[victim].how == "died"
    for rank in set(range(num_ranks)) - {victim}:
        assert outcomes[rank].how == "returned", outcomes[rank].tell()
        name, culprits, step, text, elapsed = outcomes[rank].value
        assert (name, culprits) == ("PeerLost", (victim,)), text
        assert step.startswith("dispatch 3"), step
        assert elapsed < 5.0, "long before the 30 s for which a silent rank is waited for"


def test_a_stopped_rank_of_another_host_is_a_timeout_that_names_it(tmp_path):
    with RankProcesses(4, wait_for_end, str(tmp_path), 3, "stop", 2) as ranks:
        wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(4)))
        time.sleep(4.0)
        os.kill(ranks.pids[3], signal.SIGCONT)
        outcomes = ranks.outcomes(timeout_s=60)
    for rank in range(3):
        assert outcomes[rank].how == "returned", outcomes[rank].tell()
        name, culprits, step, text, _ = outcomes[rank].value
        assert (name, culprits) == ("PeerTimeout", (3,)), text
        assert step.startswith("dispatch 3"), step
    learned = outcomes[3].value  # nothing, if all that it awaits had come straight before the others gave up
    assert learned is None or learned[0] in ("PeerTimeout", "PeerLost")


def outlive(group, rank):
    """Do nothing for longer than timeout_s, then exchange."""
    os.environ["ANYEP_RANKS_PER_HOST"] = "1"
    x = torch.full((8, 512), rank + 1.0).bfloat16()
    with anyep.Buffer(group, timeout_s=1.0, **SIZES) as ep:
        time.sleep(2.5)
        received = ep.dispatch(x, torch.arange(16).view(8, 2) % 8)
        return bool(torch.equal(ep.combine(received.x, received.handle), x))


def test_hosts_that_had_nothing_to_say_for_longer_than_timeout_s_still_hear_each_other():
    assert run_processes(2, outlive) == [True, True]


@pytest.mark.slow
def test_a_link_that_is_cut_is_a_timeout_that_names_ranks_of_other_hosts(tmp_path):
    """Between network namespaces, where nobody is told that packets are lost."""
    try:
        check_hosts()
        hosts = Hosts(2)
    except Unavailable as error:
        pytest.skip(str(error))
    with hosts, hosts.start([2, 2], wait_for_end, str(tmp_path), None, "cut", None) as ranks:
        wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(4)))
        hosts.cut(1)
        (tmp_path / "cut").touch()
        outcomes = ranks.outcomes(timeout_s=60)
    for rank, outcome in enumerate(outcomes):
        assert outcome.how == "returned", outcome.tell()
        name, culprits, step, text, elapsed = outcome.value
        far = {2, 3} if rank < 2 else {0, 1}
        assert name == "PeerTimeout", text
        assert culprits, text
        assert set(culprits) <= far, text
        assert step.startswith("dispatch 3"), step
        assert elapsed < 10.0


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "ranks did not come this far"
        time.sleep(0.02)
