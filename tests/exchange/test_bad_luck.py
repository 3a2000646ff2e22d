"""Results under way when a buffer is closed, a call is interrupted, or a rank is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

import anyep
from anyep.exchange.flights import Flights
from anyep.testing.processes import RankProcesses, run_processes
from tests.exchange.test_pending import SIZES, WAYS, batch


@pytest.mark.parametrize("way", WAYS)
def test_a_buffer_that_is_left_normally_finishes_what_is_in_flight(way):
    def thread_main(member):
        with anyep.Buffer(member, **SIZES, eager_bytes=WAYS[way]) as ep:
            ep.dispatch(*batch(), wait=False)  # dropped
            kept = [ep.dispatch(*batch(rank=member.rank), wait=False) for _ in range(3)]
            if member.rank == 0:
                time.sleep(0.2)
        received = [pending.wait() for pending in kept]
        assert all(torch.equal(one.x, received[0].x) for one in received)
        with pytest.raises(anyep.ClosedError):
            ep.combine(received[0].x, received[0].handle)
        return received[0].x[:, 0].tolist()

    rows = anyep.local_group(2).run(thread_main)
    assert set(rows[0]) == set(rows[1]) == {1.0, 2.0}


@pytest.mark.parametrize("way", WAYS)
def test_a_buffer_that_is_left_by_an_error_waits_for_nobody(way):
    def thread_main(member):
        if member.rank == 1:
            with anyep.Buffer(member, **SIZES, eager_bytes=WAYS[way], timeout_s=30.0) as ep:
                ep.barrier()
                time.sleep(1.5)
                return None
        try:
            with anyep.Buffer(member, **SIZES, eager_bytes=WAYS[way], timeout_s=30.0) as ep:
                ep.barrier()
                pendings = [ep.dispatch(*batch(), wait=False) for _ in range(3)]
                begin = time.monotonic()
                raise ZeroDivisionError
        except ZeroDivisionError:
            ended = time.monotonic() - begin
        for pending in pendings:
            with pytest.raises(anyep.ClosedError):
                pending.wait()
        return ended

    assert anyep.local_group(2).run(thread_main)[0] < 1.2


def leave_by_an_error(group, rank, eager_bytes):
    begin = time.monotonic()
    try:
        with anyep.Buffer(group, **SIZES, eager_bytes=eager_bytes, timeout_s=30.0) as ep:
            ep.barrier()
            if rank == 1:
                time.sleep(2.0)
                return None
            kept = [ep.dispatch(*batch(), wait=False), ep.dispatch(*batch(), layout="padded", wait=False)]
            begin = time.monotonic()
            raise ZeroDivisionError
    except ZeroDivisionError:
        return time.monotonic() - begin, len(kept)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_between_processes(way):
    assert run_processes(2, leave_by_an_error, WAYS[way])[0][0] < 1.2


def interrupted(group, rank, eager_bytes):
    begin = time.monotonic()
    try:
        with anyep.Buffer(group, **SIZES, eager_bytes=eager_bytes, timeout_s=30.0) as ep:
            ep.barrier()
            if rank == 1:
                time.sleep(3.0)
                return None
            signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            pendings = [ep.dispatch(*batch(), wait=False) for _ in range(3)]
            begin = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            pendings[1].wait()
    except KeyboardInterrupt:
        return time.monotonic() - begin


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_ends_a_wait_for_an_operation_in_flight(way):
    elapsed = run_processes(2, interrupted, WAYS[way])[0]
    assert 0.25 < elapsed < 2.0


def interrupted_and_going_on(group, rank):
    """The wait ends and not the operation; until it is over its number's memory is not used again."""
    with anyep.Buffer(group, **SIZES, eager_bytes=0, max_in_flight=1, timeout_s=30.0) as ep:
        ep.barrier()
        if rank == 1:
            time.sleep(1.0)
        else:
            signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
        pending = ep.dispatch(*batch(rank=rank), wait=False)
        try:
            pending.wait()
        except KeyboardInterrupt:
            assert rank == 0
        sums = [ep.dispatch(*batch(rank=rank), wait=False).wait().x.float().sum().item() for _ in range(6)]
        return len(set(sums)), len(ep._flights._flying)


def test_after_ctrl_c_in_a_wait_the_operation_goes_on_in_the_background():
    assert run_processes(2, interrupted_and_going_on) == [(1, 0)] * 2


def test_a_lost_rank_is_named_by_the_older_operation_while_a_newer_one_is_waited_for():
    def thread_main(member):
        with anyep.Buffer(member, **SIZES, timeout_s=30.0) as ep:
            ep.barrier()
            if member.rank == 1:
                return None
            older, newer = ep.dispatch(*batch(), wait=False), ep.dispatch(*batch(), layout="padded", wait=False)
            with pytest.raises((anyep.PeerLost, anyep.ClosedError), match=r"dispatch 2: announcement.*rank 1") as error:
                newer.wait()
            with pytest.raises(anyep.PeerLost, match=r"dispatch 2: announcement.*missing: 1") as first:
                older.wait()
            return type(error.value), first.value.ranks, first.value.step

    ended = anyep.local_group(3).run(thread_main)
    assert ended[0][1:] == ended[2][1:] == ((1,), "dispatch 2: announcement")


def fail_while_in_flight(group, rank, folder, eager_bytes, action):
    with anyep.Buffer(group, **SIZES, eager_bytes=eager_bytes, timeout_s=1.5 if action == "stop" else 30.0) as ep:
        ep.barrier()
        if rank == 1:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        pending = ep.dispatch(*batch(), wait=False)
        Path(folder, f"posted{rank}").touch()
        begin = time.monotonic()
        try:
            pending.wait()
        except anyep.PeerError as error:
            return type(error).__name__, error.ranks, error.step, str(error), time.monotonic() - begin
    return None


@pytest.mark.parametrize(("action", "name"), [("kill", "PeerLost"), ("stop", "PeerTimeout")])
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_goes_while_others_have_results_in_flight_is_named_with_the_half(tmp_path, way, action, name):
    with RankProcesses(3, fail_while_in_flight, str(tmp_path), WAYS[way], action) as ranks:
        if action == "stop":
            deadline = time.monotonic() + 60
            while not (tmp_path / "posted0").exists() or not (tmp_path / "posted2").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(4.0)
            os.kill(ranks.pids[1], signal.SIGCONT)
        outcomes = ranks.outcomes(timeout_s=60)
    for rank in (0, 2):
        assert outcomes[rank].how == "returned", outcomes[rank].tell()
        found, culprits, step, text, elapsed = outcomes[rank].value
        assert (found, culprits, step) == (name, (1,), "dispatch 2: announcement"), text
        assert "missing: 1" in text
        assert elapsed < 4.0


class _Interrupted:
    """An operation that finds its transport closed: another thread's operation has just ended the buffer."""

    label = "dispatch"

    def __init__(self, meanwhile, half):
        self._meanwhile, self._half = meanwhile, half

    def _do(self, half):
        if half == self._half:
            self._meanwhile()
            raise anyep.ClosedError("the transport is closed; open a new one")

    def post(self, epoch):
        self._do("post")

    def size_up(self):
        self._do("size up")

    def finish(self):
        self._do("finish")

    def targets(self):
        return None

    def wants_background(self):
        return False

    def may_answer(self):
        return False

    def ready(self):
        return True


@pytest.mark.parametrize("half", ["post", "size up", "finish"])
def test_a_thread_whose_operation_another_one_ended_is_told_who_is_to_blame(half):
    lost = anyep.PeerLost("rank 1 died", ranks=[1], step="combine 1")
    flights = Flights(4, lambda error: None, lambda: None)
    with pytest.raises(anyep.PeerLost) as caught:
        flights.start(_Interrupted(lambda: flights._break(lost), half), sized=True).wait()
    assert caught.value is lost
