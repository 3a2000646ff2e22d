"""Ranks as threads: results, root causes, ends that are noticed, and the waits of a platform without futexes."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from anyep.errors import CapacityError, ClosedError, PeerError, PeerLost, PeerTimeout
from anyep.machine import linux, room
from anyep.testing.processes import RankProcesses
from anyep.transport import waiting
from anyep.transport.base import Blame, Lane
from anyep.transport.inprocess import InProcessTransport, local_group
from tests.transport import ranks
from tests.transport.ranks import LANES, exchange


def open_on(member, *, heap_bytes=1 << 20, timeout_s=20.0, lanes=LANES, ring=2):
    return InProcessTransport(member, lanes=lanes, ring=ring, heap_bytes=heap_bytes, timeout_s=timeout_s, poison=True)


def test_run_returns_results_in_rank_order():
    group = local_group(5)
    assert group.run(lambda member: (time.sleep(0.01 * (5 - member.rank)), member.rank)[1]) == [0, 1, 2, 3, 4]
    assert group.run(lambda member: member.size) == [5] * 5, "and again"
    assert (len(group), group[3].rank, [m.rank for m in group], [m.rank for m in group[1:3]]) == (
        5,
        3,
        list(range(5)),
        [1, 2],
    )


@pytest.mark.parametrize(
    ("num_ranks", "kind", "text"),
    [
        (0, ValueError, "at least 1, got 0"),
        (-2, ValueError, "at least 1"),
        ("2", TypeError, "int, got '2'"),
        (True, TypeError, "True"),
    ],
)
def test_bad_sizes_of_a_group(num_ranks, kind, text):
    with pytest.raises(kind, match=text):
        local_group(num_ranks)


def test_run_raises_the_root_cause():
    def work(member):
        with_transport = open_on(member)
        exchange(with_transport, 0)
        if member.rank == 2:
            raise KeyError("the culprit")
        try:
            exchange(with_transport, 1)
        finally:
            with_transport.close()

    with pytest.raises(KeyError, match="the culprit"):
        local_group(4).run(work)


def test_survivors_name_the_thread_that_raised():
    seen = {}

    def work(member):
        transport = open_on(member)
        exchange(transport, 0)
        if member.rank == 1:
            raise ZeroDivisionError("on purpose")
        with pytest.raises(PeerLost) as caught:
            exchange(transport, 1, "dispatch 1: open")
        seen[member.rank] = caught.value
        transport.close()

    with pytest.raises(ZeroDivisionError):
        local_group(3).run(work)
    assert sorted(seen) == [0, 2]
    for error in seen.values():
        assert (error.ranks, error.step) == ((1,), "dispatch 1: open")
        assert "ZeroDivisionError: on purpose" in str(error)


def test_first_peer_error_is_raised_where_there_is_no_other():
    def work(member):
        transport = open_on(member, timeout_s=0.3)
        if member.rank == 0:
            time.sleep(1.0)
            return
        exchange(transport, 0)

    with pytest.raises(PeerTimeout) as caught:
        local_group(3).run(work)
    assert caught.value.ranks == (0,)


def test_a_rank_that_ends_before_opening_is_noticed():
    def work(member):
        if member.rank == 1:
            raise OSError("no such model")
        open_on(member)

    began = time.monotonic()
    with pytest.raises(OSError, match="no such model"):
        local_group(3, timeout_s=60).run(work)
    assert time.monotonic() - began < 30

    def leave(member):
        return None if member.rank == 1 else open_on(member)

    with pytest.raises(PeerLost, match=r"rank 1 ended before it came.*all 3 ranks"):
        local_group(3, timeout_s=60).run(leave)


def test_a_rank_that_never_opens_is_a_timeout():
    group = local_group(2, timeout_s=0.2)
    with pytest.raises(PeerTimeout, match=r"rank 1 did not come within 0.2 s") as caught:
        open_on(group[0])
    assert (caught.value.ranks, caught.value.step) == ((1,), "opening")


def test_a_group_runs_one_function_at_a_time():
    group = local_group(2)

    def work(member):
        if member.rank == 0:
            group.run(lambda member: None)

    with pytest.raises(ValueError, match="already running"):
        group.run(work)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lanes": LANES[:1]}, "lanes and ring differ between ranks"),
        ({"ring": 3}, "lanes and ring differ between ranks"),
        ({"ring": 0}, "ring must be at least 1, got 0"),
        ({"heap_bytes": -1}, "heap_bytes must be at least 0, got -1"),
        ({"timeout_s": 0.0}, "timeout_s must be positive and finite, got 0.0"),
        ({"timeout_s": float("inf")}, "positive and finite"),
        ({"lanes": [Lane(index=1, name="x", words=1)]}, "numbered from 0"),
        ({"lanes": [Lane(index=0, name="x", words=-1)]}, "at least 0 words"),
    ],
)
def test_bad_arguments_on_one_rank_fail_on_all(change, text):
    errors = {}

    def work(member):
        with pytest.raises(ValueError, match=text) as caught:
            open_on(member, **(change if member.rank == 1 else {}))
        errors[member.rank] = str(caught.value)

    local_group(3).run(work)
    assert len(errors) == 3
    if "differ" not in text:
        assert "rank 1 could not open its transport" in errors[0]
        assert "rank 1" not in errors[1]


def test_too_little_memory_fails_on_all_ranks(monkeypatch):
    monkeypatch.setattr(room, "available_bytes", lambda: 200 << 20)

    def work(member):
        with pytest.raises(CapacityError, match=r"opening 3 ranks on one host needs 18\d\.\d MiB.*200.0 MiB left"):
            open_on(member, heap_bytes=60 << 20)
        transport = open_on(member, heap_bytes=1 << 20)
        assert exchange(transport, 0) == [0, 1, 2]
        with pytest.raises(CapacityError, match=r"an arena that is full needs 300.0 MiB"):
            transport.allocate(300 << 20)
        assert transport.allocate(3 << 20).place.segment == 1, "what fits still does"
        transport.close()

    local_group(3).run(work)


def test_ranks_that_grow_together_count_each_other(monkeypatch):
    """A rank that is about to commit has not taken its memory yet; the others see what it is about to take."""
    committing, go_on = threading.Event(), threading.Event()
    real = linux.private_memory

    def slow(num_bytes):
        if num_bytes > 50 << 20:
            committing.set()
            go_on.wait(20)
        return real(num_bytes)

    def work(member):
        transport = open_on(member)
        exchange(transport, 0)
        if member.rank == 0:
            assert transport.allocate(80 << 20).num_bytes == 80 << 20
        else:
            committing.wait(20)
            with pytest.raises(CapacityError, match=r"needs 70.0 MiB of memory while other ranks take 80.0 MiB"):
                transport.allocate(70 << 20)
            go_on.set()
        exchange(transport, 1)
        if member.rank == 1:
            assert transport.allocate(70 << 20).num_bytes == 70 << 20, "as soon as that is over"
        transport.close()

    monkeypatch.setattr(linux, "private_memory", slow)
    group = local_group(2)
    monkeypatch.setattr(room, "available_bytes", lambda: 210 << 20)
    group.run(work)


def test_words_that_do_not_fit_the_lane():
    def work(member):
        transport = open_on(member)
        for words, kind in (
            (np.zeros((2, 4), np.int64), ValueError),
            (np.zeros((3, 1), np.int64), ValueError),
            (np.zeros(2, np.int64), ValueError),
            (np.zeros((2, 1), np.int32), TypeError),
        ):
            with pytest.raises(kind, match=r"lane 'open' takes"):
                transport.post(LANES[0], 0, words)
        exchange(transport, 0)
        transport.close()

    local_group(2).run(work)


@pytest.mark.parametrize(
    ("ranks", "kind", "text"),
    [
        (np.array([0, 2]), ValueError, r"distinct numbers \[m\] from 0 to 1, got \[0, 2\]"),
        (np.array([-1]), ValueError, r"got \[-1\]"),
        (np.array([[0]]), ValueError, r"got \[\[0\]\]"),
        (np.array([0], np.int32), TypeError, "int64 array or None, got int32"),
        ([0], TypeError, "got <class 'list'>"),
    ],
)
def test_what_are_no_ranks(ranks, kind, text):
    transports = local_group(2).run(open_on)
    with pytest.raises(kind, match=text):
        transports[0].post(LANES[1], 0, np.zeros((2, 1), np.int64), ranks)
    with pytest.raises(kind, match=text):
        transports[0].wait(LANES[1], 0, "no ranks", ranks)
    for transport in transports:
        transport.close()


def test_ranks_of_any_strides_are_taken():
    transports = local_group(3).run(open_on)
    frozen = np.array([2, 0])
    frozen.setflags(write=False)
    for epoch, to in enumerate((frozen, np.array([0, 7, 2, 7])[::2])):
        transports[0].post(LANES[1], epoch, np.arange(3, dtype=np.int64)[:, None], to)
        for rank in (0, 2):
            assert transports[rank].wait(LANES[1], epoch, "some", to[to == 0])[0, 0] == rank
        assert transports[0].wait(LANES[1], epoch, "all of some", to[1:] * 0)[0, 0] == 0
    for transport in transports:
        transport.close()


def test_words_of_any_strides_are_sent():
    def work(member):
        transport = open_on(member)
        wide = np.arange(12, dtype=np.int64).reshape(2, 6) + 100 * member.rank
        frozen = wide[:, :3].copy()
        frozen.setflags(write=False)
        for epoch, words in enumerate((wide[:, ::2], np.asfortranarray(wide[:, :3]), frozen)):
            transport.post(LANES[0], 2 * epoch, words)
            got = transport.wait(LANES[0], 2 * epoch, "strides")
            expected = words[member.rank] - 100 * member.rank
            assert got.tolist() == [expected.tolist(), (expected + 100).tolist()]
            exchange(transport, 2 * epoch + 1)
        transport.close()

    local_group(2).run(work)


def test_without_futexes_waits_nap():
    def work(member):
        transport = open_on(member, timeout_s=0.5)
        transport._waiter.sleeps = False
        assert "no futex here" in transport.describe()["waits"]
        rng = np.random.default_rng(member.rank)
        for epoch in range(100):
            if rng.random() < 0.2:
                time.sleep(0.002)
            assert exchange(transport, epoch) == [0, 1, 2]
        if member.rank == 2:
            transport.close()
            return
        with pytest.raises(PeerLost) as caught:
            exchange(transport, 100)
        assert caught.value.ranks == (2,)
        transport.close()

    local_group(3).run(work)


def test_memory_goes_with_its_last_user(monkeypatch):
    """After all ranks have closed nothing keeps an arena but its tensors."""
    watched = []
    real = linux.private_memory

    def watched_memory(num_bytes):
        memory = real(num_bytes)
        watched.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(linux, "private_memory", watched_memory)

    def work(member):
        transport = open_on(member)
        exchange(transport, 0)
        block = transport.allocate(5000)
        tensor = torch.frombuffer(block.memory, dtype=torch.uint8).fill_(member.rank)
        transport.close()
        return transport, tensor

    gc.disable()
    try:
        kept = local_group(3).run(work)
        assert len(watched) == 3
        assert not any(ref() for ref in watched), "closed transports keep no memory"
        assert [int(tensor[4999]) for _, tensor in kept] == [0, 1, 2]
    finally:
        gc.enable()


def test_leaving_under_a_wait_ends_it():
    group = local_group(2)
    transports = group.run(open_on)
    failures = []

    def wait():
        try:
            transports[0].wait(LANES[0], 0, "waiting")
        except ClosedError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    transports[0].leave()
    thread.join(20)
    assert not thread.is_alive()
    assert len(failures) == 1
    for transport in transports:
        transport.close()


@pytest.mark.parametrize("awaited", [[1], [1, 2], [1, 2, 3]], ids=["one", "two", "all"])
def test_who_waits_for_the_culprit_is_not_named(awaited):
    """Rank 0 waits for rank 1, which waits for rank 2, which waits for rank 3, which does nothing; rank 0 gives up."""
    group = local_group(4)
    gave_up = threading.Event()

    def rank_main(member):
        transport = open_on(member, timeout_s=1.0 if member.rank == 0 else 20.0)
        named = None
        if member.rank == 0:
            with pytest.raises(PeerTimeout) as caught:
                transport.wait(LANES[0], 0, "waiting", np.array(awaited))
            named = caught.value.ranks
            gave_up.set()
            transport.leave(Blame(ranks=named, timeout=True))
        elif member.rank < 3:
            with pytest.raises(PeerError):
                transport.wait(LANES[1], 0, "waiting", np.array([0, member.rank + 1]))
        assert gave_up.wait(20)
        transport.close()
        return named

    assert group.run(rank_main)[0] == (3,)


def test_a_rank_that_has_waited_is_named_when_it_does_something_else():
    """Rank 1 waited for rank 2, whose message came, and then computes."""
    group = local_group(3)
    waits, gave_up = threading.Event(), threading.Event()

    def rank_main(member):
        transport = open_on(member, timeout_s=1.0 if member.rank == 0 else 20.0)
        named = None
        if member.rank == 0:
            assert waits.wait(20)
            with pytest.raises(PeerTimeout) as caught:
                transport.wait(LANES[0], 0, "waiting", np.array([1]))
            named = caught.value.ranks
            gave_up.set()
        elif member.rank == 1:
            transport.wait(LANES[1], 0, "waiting", np.array([2]))
            waits.set()
        else:
            time.sleep(0.2)
            transport.post(LANES[1], 0, np.zeros((3, 1), np.int64), np.array([1]))
        assert gave_up.wait(20)
        transport.close()
        return named

    assert group.run(rank_main)[0] == (1,)


def test_several_silent_ranks_are_all_named():
    group = local_group(3)
    transports = group.run(lambda member: open_on(member, timeout_s=0.1))
    transports[0].post(LANES[0], 0, np.zeros((3, 1), np.int64))
    with pytest.raises(PeerTimeout) as caught:
        transports[0].wait(LANES[0], 0, "waiting")
    assert caught.value.ranks == (1, 2)
    for transport in transports:
        transport.close()


def test_a_dead_peers_message_counts(monkeypatch):
    """Found gone and found missing, but its message came in between: no error."""
    group = local_group(2)
    transports = group.run(open_on)
    real = waiting.departures_of

    def late(signals, opened):
        departures = real(signals, opened)
        if not departures:
            transports[1].post(LANES[0], 0, np.ones((2, 1), np.int64))
            transports[1].close()
            return real(signals, opened)
        return departures

    transports[0].post(LANES[0], 0, np.zeros((2, 1), np.int64))
    monkeypatch.setattr(waiting, "departures_of", late)
    assert transports[0].wait(LANES[0], 0, "late")[:, 0].tolist() == [0, 1]
    transports[0].close()


def test_ctrl_c_ends_a_run():
    with RankProcesses(1, ranks.interrupted_run) as processes:
        outcome = processes.outcomes(timeout_s=60)[0]
    assert outcome.how == "returned", outcome.tell()
    assert outcome.value == ["KeyboardInterrupt", "PeerLost", "PeerLost"]
