"""What goes wrong between hosts: other versions and arguments, no such interface, a death between two pieces."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from multiprocessing.util import Finalize
from pathlib import Path

import pytest
import torch

import anyep
from anyep.errors import Unavailable
from anyep.exchange import across, setup
from anyep.exchange.courier import Inbox, Outbox
from anyep.testing.hosts import Hosts
from anyep.testing.processes import RankProcesses, run_processes
from anyep.transport import engine_gloo, engine_nixl, nixl_streams

NUM_RANKS, PER_HOST = 4, 2
SIZES = {"hidden": 512, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 256}


def open_differently(group, rank, what):
    """Make a buffer that is another one on the second host; return the error."""
    os.environ["ANYEP_RANKS_PER_HOST"] = str(PER_HOST)
    options = dict(SIZES)
    if rank >= PER_HOST and what == "version":
        setup.__version__ = "99.1"
    elif rank >= PER_HOST:
        options |= {"straight_bytes": 7} if what == "straight_bytes" else {what: 2 * options[what]}
    try:
        anyep.Buffer(group, transport="gloo", timeout_s=20.0, **options).close()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_a_host_with_another_version_is_told_which_and_what_to_do():
    for rank, (kind, text) in enumerate(run_processes(NUM_RANKS, open_differently, "version")):
        assert kind == "ValueError", text
        mine, theirs = (anyep.__version__, "99.1") if rank < PER_HOST else ("99.1", anyep.__version__)
        assert f"rank {rank} runs AnyEP {mine}" in text
        assert f"rank {2 if rank < PER_HOST else 0} AnyEP {theirs}" in text
        assert "install the same version on all hosts" in text


@pytest.mark.parametrize("name", ["hidden", "num_experts", "max_tokens_per_rank", "straight_bytes"])
def test_a_host_with_other_arguments_is_told_which(name):
    for kind, text in run_processes(NUM_RANKS, open_differently, name):
        assert kind == "ValueError", text
        assert f"{name} differs between ranks" in text


def open_with_variable(group, rank, values):
    """Make a buffer where ranks have another ANYEP_RANKS_PER_HOST (None: not set); return the error."""
    if values[rank] is not None:
        os.environ["ANYEP_RANKS_PER_HOST"] = values[rank]
    try:
        anyep.Buffer(group, timeout_s=20.0, **SIZES).close()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((None, None, "2"), "ANYEP_RANKS_PER_HOST differs between ranks: not set on rank 0, 2 on rank 2; set it alike"),
        (("2", "1", "1"), "ANYEP_RANKS_PER_HOST differs between ranks: 2 on rank 0, 1 on rank 1; set it alike"),
        (("2", "two", "2"), "ANYEP_RANKS_PER_HOST must be a whole number from 1 on, got 'two'"),
    ],
    ids=["not set on all", "two numbers", "no number on one"],
)
def test_ranks_that_play_other_hosts_are_told_which(values, told):
    for kind, text in run_processes(len(values), open_with_variable, values):
        assert kind == "ValueError", text
        assert told in text


def open_on_interface(group, rank, engine):
    os.environ["ANYEP_RANKS_PER_HOST"] = str(PER_HOST)
    try:
        anyep.Buffer(group, transport=engine, interface="nowhere0" if rank == 3 else "lo", timeout_s=20.0, **SIZES)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_an_interface_that_one_rank_does_not_have_is_named_on_all(engine):
    for kind, text in run_processes(NUM_RANKS, open_on_interface, engine):
        assert kind == "Unavailable", text
        assert "nowhere0" in text
        assert re.search(r"\blo\b", text), "those that exist"


def open_in_vain(group, rank, engine):
    try:
        anyep.Buffer(group, transport=engine, timeout_s=3.0, **SIZES)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_a_host_that_cannot_be_reached_at_the_start_is_named_with_what_to_look_at(engine):
    try:
        hosts = Hosts(2)
    except Unavailable as error:
        pytest.skip(str(error))
    with hosts:
        hosts.cut(1)
        with hosts.start([2, 1], open_in_vain, engine) as ranks:
            told = ranks.results(60)
    for kind, text in told:
        assert kind == "Unavailable", text
        for part in (f"host {socket.gethostname()}", "eth0", "10.77.0.1", "10.77.0.2", "port", "Check that both"):
            assert part in text


def post_many(group, rank, engine):
    """Keep several operations under way, each of hundreds of messages, through queues and windows of four."""
    os.environ["ANYEP_RANKS_PER_HOST"] = str(PER_HOST)
    across.CHUNK_BYTES = 1000
    engine_gloo._RING = nixl_streams.SLOTS = engine_nixl.SLOTS = 4
    nixl_streams.PIECE_BYTES = engine_nixl.PIECE_BYTES = 512
    engine_gloo._Line.eager_bytes = engine_nixl.NixlEngine.eager_bytes = 256  # rows wait for a place
    tokens = torch.arange(256)
    idx = torch.stack([tokens % 8, (tokens + 4) % 8], 1)
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(rank)).bfloat16()
    options = SIZES | {"max_in_flight": 4, "straight_bytes": 0}
    with anyep.Buffer(group, transport=engine, timeout_s=30.0, **options) as ep:
        for number in range(3):
            sent = [(number + 1.0) * x, x + number, -x]
            dispatched = [ep.dispatch(batch, idx, wait=False) for batch in sent]
            received = [pending.wait() for pending in dispatched]
            sums = [ep.combine(batch.x, batch.handle, wait=False) for batch in received]
            for batch, pending in zip(sent, sums, strict=True):
                assert torch.equal(pending.wait(), 2 * batch)
    return "exact"


def test_many_messages_through_full_queues_are_exact(engine):
    assert run_processes(NUM_RANKS, post_many, engine) == ["exact"] * NUM_RANKS


def die_in_the_middle(group, rank, engine, victim, where, straight_bytes):
    """Exchange once, then with a victim that is killed between two pieces; return the error, and how late it came."""
    os.environ["ANYEP_RANKS_PER_HOST"] = str(PER_HOST)
    across.CHUNK_BYTES = 32 << 10
    tokens = torch.arange(256)
    x = torch.full((256, 512), rank + 1.0).bfloat16()
    idx = torch.stack([tokens % 8, (tokens + 4) % 8], 1)
    with anyep.Buffer(group, transport=engine, timeout_s=30.0, straight_bytes=straight_bytes, **SIZES) as ep:
        received = ep.dispatch(x, idx)
        assert torch.equal(ep.combine(received.x, received.handle), 2 * x)
        if rank == victim:
            operation, half = where.split()
            if operation == "dispatch":
                die_at_piece(4, half)
        begin = time.monotonic()
        try:
            received = ep.dispatch(x, idx)
            if rank == victim:
                die_at_piece(4, half)
            begin = time.monotonic()
            ep.combine(received.x, received.handle)
            begin = time.monotonic()
            ep.dispatch(x, idx)  # what this rank needed was here already
        except anyep.PeerError as error:
            return type(error).__name__, error.ranks, time.monotonic() - begin, str(error)
    return None


def die_at_piece(number, half):
    """Kill this process when it has sent, or taken, so many pieces."""
    kind, name = (Outbox, "send") if half == "sends" else (Inbox, "take")
    act, left = getattr(kind, name), [number]

    def act_and_die(*args):
        result = act(*args)
        if result is not None or half == "sends":
            left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(kind, name, act_and_die)


@pytest.mark.parametrize("victim", [0, 3])
@pytest.mark.parametrize("where", ["dispatch sends", "dispatch takes", "combine sends", "combine takes"])
def test_a_rank_that_dies_between_two_pieces_is_named_on_all_hosts(engine, where, victim):
    with RankProcesses(NUM_RANKS, die_in_the_middle, engine, victim, where, 0) as ranks:
        outcomes = ranks.outcomes(timeout_s=60)
    assert outcomes[victim].how == "died", outcomes[victim].tell()
    for rank in set(range(NUM_RANKS)) - {victim}:
        assert outcomes[rank].how == "returned", outcomes[rank].tell()
        kind, culprits, elapsed, text = outcomes[rank].value
        assert (kind, culprits) == ("PeerLost", (victim,)), text
        assert elapsed < 10.0, "long before the 30 s for which a silent rank is waited for"


def stop_in_the_middle(group, rank, engine, homes, folder):
    """Exchange in small pieces until somebody stands still; return whom this rank names. Ranks 0 and 3 wait least."""
    os.environ["ANYEP_HOST_ID"] = f"host {homes[rank]}"
    across.CHUNK_BYTES = 4000
    tokens = torch.arange(256)
    idx = torch.stack([tokens % len(homes), (tokens + 2) % len(homes)], 1)
    sizes = SIZES | {"num_experts": len(homes)}
    timeout_s = 2.0 if rank in (0, 3) else 20.0
    with anyep.Buffer(group, transport=engine, timeout_s=timeout_s, straight_bytes=0, **sizes) as ep:
        Path(folder, str(rank)).touch()
        try:
            while True:
                received = ep.dispatch(torch.ones(256, 512).bfloat16(), idx)
                ep.combine(received.x, received.handle)
        except anyep.PeerError as error:
            told = type(error).__name__, error.ranks, str(error)
    Path(folder, f"{rank} has left").touch()
    return told


@pytest.mark.parametrize(("homes", "victim"), [("aabcc", 1), ("aabbb", 2)])
def test_a_rank_that_is_stopped_is_named_by_those_whose_limits_end_first(engine, tmp_path, homes, victim):
    """Those that wait longer stand between it and the first to give up."""
    with RankProcesses(len(homes), stop_in_the_middle, engine, homes, str(tmp_path)) as ranks:
        until_there(tmp_path, "[0-9]", len(homes))
        time.sleep(0.1 * victim)
        os.kill(ranks.pids[victim], signal.SIGSTOP)
        until_there(tmp_path, "* has left", len(homes) - 1)
        os.kill(ranks.pids[victim], signal.SIGKILL)
        outcomes = ranks.outcomes(timeout_s=60)
    for outcome in outcomes[:victim] + outcomes[victim + 1 :]:
        assert outcome.how == "returned", outcome.tell()
        assert outcome.value[:2] == ("PeerTimeout", (victim,)), (outcome.rank, outcome.value[2])


def until_there(folder, pattern, count):
    deadline = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, sorted(path.name for path in folder.iterdir())
        time.sleep(0.01)


def report_and_crash(group, rank):
    """Return a result from a process that a library's destructor crashes afterwards."""
    os.environ["ANYEP_RANKS_PER_HOST"] = "1"
    with anyep.Buffer(group, transport="gloo", **SIZES) as ep:
        received = ep.dispatch(torch.ones(8, 512).bfloat16(), torch.arange(16).view(8, 2) % 8)
        Finalize(None, os.kill, args=(os.getpid(), signal.SIGSEGV), exitpriority=0)
        return received.handle.num_rows


def test_results_are_out_before_a_process_that_crashes_at_its_exit():
    with RankProcesses(2, report_and_crash) as ranks:
        assert ranks.results(60) == [8, 8]
        assert [process.exitcode for process in ranks._processes] == [-signal.SIGSEGV] * 2
