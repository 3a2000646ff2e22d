"""The same exchanges between rank processes over shared memory: the same bits, and what happens when ranks die."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import anyep
from anyep.testing.processes import RankProcesses, run_processes
from tests.exchange.cases import LAYOUTS, Case, cases
from tests.exchange.rounds import assert_same, check, open_buffer, play, poison_arenas
from tests.exchange.test_behaviour import CASE

SIZES = {"hidden": 512, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 64}


def play_case(group, rank, case):
    poison_arenas()
    with open_buffer(case, group) as ep:
        return play(case, ep)


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_and_processes_give_the_same_bits(layout, wire):
    case = replace(CASE, layout=layout, wire=wire, num_bias=1, alignment=4)

    def thread_main(member):
        with open_buffer(case, member) as ep:
            return play(case, ep)

    threads, processes = anyep.local_group(3).run(thread_main), run_processes(3, play_case, case)
    check(case, processes)
    for here, there in zip(threads, processes, strict=True):
        for name in here.received.bytes_of if layout != "padded" else ():  # whose blocks end in undefined rows
            assert_same(name, getattr(there.received, name), getattr(here.received, name))
        assert_same("combined", there.combined, here.combined)
        if here.weights is not None:
            assert_same("weights", there.weights, here.weights)
        assert there.received.counts == here.received.counts


@pytest.mark.timeout(600)
def test_random_exchanges_between_processes_are_exact(tmp_path):
    """Cases of each number of ranks are collected, then played by one set of processes."""
    drawn: dict[int, list[Case]] = {}

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(cases())
    def collect(case):
        drawn.setdefault(case.num_ranks, []).append(case)

    collect()
    for num_ranks, chosen in drawn.items():
        assert run_processes(num_ranks, check_cases, str(tmp_path), chosen, timeout_s=300) == [len(chosen)] * num_ranks


def check_cases(group, rank, folder, chosen):
    """Play each case, bring all outcomes to rank 0 (by files: padded ones are large), and judge them there."""
    poison_arenas()
    for case in chosen:
        with open_buffer(case, group) as ep:
            torch.save(play(case, ep), Path(folder, f"{rank}.pt"))
        group.allgather(b"written")
        if rank == 0:
            paths = [Path(folder, f"{other}.pt") for other in range(case.num_ranks)]
            check(case, [torch.load(path, weights_only=False) for path in paths])
        group.allgather(b"read")
    return len(chosen)


def wait_for_death(group, rank, folder, victim, action):
    """Exchange once, then let the victim act; survivors report how they heard of it and how long that took."""
    x = torch.ones(8, 512, dtype=torch.bfloat16)
    idx = torch.arange(16).view(8, 2) % 8
    with anyep.Buffer(group, timeout_s=2.0 if action == "stop" else 30.0, eager_bytes=0, **SIZES) as ep:
        received = ep.dispatch(x, idx)
        ep.combine(received.x, received.handle)
        Path(folder, f"ready{rank}").touch()
        if rank == victim:
            act(action)
        begin = time.monotonic()
        try:
            ep.dispatch(x, idx)
        except anyep.PeerError as error:
            return type(error).__name__, error.ranks, error.step, str(error), time.monotonic() - begin
    return None


def act(action):
    if action == "kill":
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "raise":
        time.sleep(0.3)
        raise ZeroDivisionError("the victim's own error")
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("victim", [0, 2])
def test_every_survivor_of_a_killed_rank_names_it(tmp_path, victim):
    with RankProcesses(4, wait_for_death, str(tmp_path), victim, "kill") as ranks:
        outcomes = ranks.outcomes(timeout_s=60)
    assert outcomes[victim].how == "died"
    for rank in set(range(4)) - {victim}:
        name, culprits, step, text, elapsed = outcomes[rank].value
        assert (name, culprits) == ("PeerLost", (victim,)), text
        assert step.startswith("dispatch 3"), step
        assert elapsed < 2.3, "0.3 s until it dies, and 2 s to hear of it"


def test_every_survivor_of_a_raising_rank_names_it(tmp_path):
    with RankProcesses(3, wait_for_death, str(tmp_path), 1, "raise") as ranks:
        outcomes = ranks.outcomes(timeout_s=60)
    assert (outcomes[1].how, outcomes[1].error) == ("raised", "ZeroDivisionError")
    for rank in (0, 2):
        name, culprits, step, text, elapsed = outcomes[rank].value
        assert (name, culprits) == ("PeerLost", (1,)), text
        assert step.startswith("dispatch 3"), step
        assert elapsed < 2.3


def test_a_stopped_rank_is_a_timeout_that_names_it_with_counters(tmp_path):
    with RankProcesses(3, wait_for_death, str(tmp_path), 1, "stop") as ranks:
        wait_until_ready(tmp_path, 3)
        time.sleep(4.0)
        os.kill(ranks.pids[1], signal.SIGCONT)
        outcomes = ranks.outcomes(timeout_s=60)
    for rank in (0, 2):
        name, culprits, step, text, _ = outcomes[rank].value
        assert (name, culprits) == ("PeerTimeout", (1,)), text
        assert step.startswith("dispatch 3"), step
        assert "epoch 3" in text
        assert "missing: 1" in text
    assert outcomes[1].value[0] in ("PeerTimeout", "PeerLost"), "the sleeper learns that the others gave up"


def read_late(group, rank):
    """Rank 1 reads rank 0's rows only when rank 0 has given up on it and written over them."""
    torch.set_num_threads(1)
    x = torch.ones(4, 512, dtype=torch.bfloat16)
    idx = torch.tensor([[0, 4]] * 4)
    with anyep.Buffer(group, timeout_s=0.5, eager_bytes=0, **SIZES) as ep:
        received = ep.dispatch(x, idx)
        y = ep.empty_output(received.handle)
        y.fill_(1)
        if rank == 1:
            reduce = ep._end.kernels.reduce
            ep._end.kernels.reduce = lambda *numbers: (time.sleep(1.5), reduce(*numbers))
        try:
            ep.combine(y, received.handle)
        except anyep.PeerTimeout as error:
            y.fill_(777)
            return error.ranks
    return None


def test_rows_that_were_written_over_are_an_error_and_no_result():
    assert run_processes(2, read_late) == [(1,), (1,)]


def interrupted(group, rank):
    with anyep.Buffer(group, **SIZES) as ep:
        ep.barrier()
        if rank == 0:
            time.sleep(2.0)
            return "slept"
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        begin = time.monotonic()
        try:
            ep.barrier()
        except KeyboardInterrupt:
            return time.monotonic() - begin
    return None


def test_ctrl_c_works_while_waiting():
    _, elapsed = run_processes(2, interrupted)
    assert 0.2 < elapsed < 1.5


def hang(group, rank, folder):
    with anyep.Buffer(group, **SIZES) as ep:
        ep.barrier()
        Path(folder, f"ready{rank}").touch()
        if rank == 0:
            time.sleep(60)
        ep.barrier()


def wait_until_ready(folder, num_ranks):
    deadline = time.monotonic() + 60
    while not all((folder / f"ready{rank}").exists() for rank in range(num_ranks)):
        assert time.monotonic() < deadline, "ranks did not come this far"
        time.sleep(0.02)


def named_memory():
    """Return the names in shared memory, but for those of an MPI job that may run on this machine."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("mpich_shm_")}


def test_nothing_is_left_after_all_ranks_were_killed(tmp_path):
    before = named_memory()
    with RankProcesses(3, hang, str(tmp_path)) as ranks:
        wait_until_ready(tmp_path, 3)
        pids = list(ranks.pids)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert {outcome.how for outcome in ranks.outcomes(timeout_s=30)} == {"died"}
    assert named_memory() <= before
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def grow(group, rank):
    """Receive more than the arena holds, several times, and look at every byte."""
    x = torch.full((64, 512), float(rank + 1)).bfloat16()
    idx = torch.zeros(64, 2, dtype=torch.int64)
    with anyep.Buffer(group, arena_bytes=1, **SIZES | {"hidden": 512}) as ep:
        held = [ep.dispatch(x, idx, layout="expert") for _ in range(40)]
        for received in held:
            for source in range(ep.num_ranks):
                rows = received.x[source * 128 : (source + 1) * 128]
                assert (rows == source + 1).all()
            out = ep.combine(received.x, received.handle)
            assert (out == 2 * (rank + 1)).all()
        return ep._end.transport.describe()["arena"]


def test_arenas_grow_between_processes():
    arenas = run_processes(3, grow)
    assert "1 segments" not in arenas[0], "rank 0 receives everything"


def overlap(group, rank):
    """Return how long an exchange in the background lets Python loop at the same time."""
    x = torch.ones(64, 512, dtype=torch.bfloat16)
    idx = torch.arange(128).view(64, 2) % 8
    with anyep.Buffer(group, **SIZES) as ep:
        ep.barrier()
        if rank == 1:
            time.sleep(0.5)
        pending = ep.dispatch(x, idx, wait=False)
        turns = 0
        while not pending.done():
            turns += 1
            time.sleep(0.001)
        received = pending.wait()
        assert (received.x == 1).all()
        return turns


def test_a_background_dispatch_leaves_python_to_the_caller():
    turns = run_processes(2, overlap)
    assert turns[0] > 20, "rank 0 waits half a second for rank 1, and computes meanwhile"
