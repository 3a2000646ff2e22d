"""Ranks on several hosts, played by threads: what a rank did before it left counts."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from anyep.errors import PeerError, PeerTimeout
from anyep.layout.hosts import group_ranks
from anyep.transport import board
from anyep.transport.base import Blame
from anyep.transport.elsewhere import Outsider
from anyep.transport.engine_inprocess import InProcessEngine
from anyep.transport.hierarchical import HierarchicalTransport
from anyep.transport.inprocess import InProcessTransport, local_group
from anyep.transport.questions import Questions
from tests.transport.ranks import LANES

WAIT_S = 10.0


def open_on(member, engine: InProcessEngine) -> HierarchicalTransport:
    options = {"lanes": LANES, "ring": 2, "heap_bytes": 1 << 20, "timeout_s": WAIT_S}
    local = InProcessTransport(member, members=[member.rank], **options)
    return HierarchicalTransport(local, engine, group_ranks(member.size, 1), timeout_s=WAIT_S)


class LooksTooLate(InProcessEngine):
    """Its peer sends and leaves while it is asked who has left."""

    def __init__(self, member, looks: threading.Event, left: threading.Event) -> None:
        super().__init__(member)
        self._looks, self._left = looks, left

    def departures(self):
        self._looks.set()
        assert self._left.wait(WAIT_S)
        return super().departures()

    def wait(self, transfers, timeout_s):
        pass


def test_a_rank_that_sends_and_leaves_between_two_looks_is_not_missed():
    looks, left = threading.Event(), threading.Event()

    def rank_main(member):
        if member.rank == 0:
            transport = open_on(member, LooksTooLate(member, looks, left))
            memory = np.zeros(8, np.uint8)
            transfer = transport.engine.receive(1, 5, memory)
            transport.await_transfers([transfer], 1, "a test", time.monotonic_ns())
            assert memory.tolist() == [7] * 8
        else:
            transport = open_on(member, InProcessEngine(member))
            assert looks.wait(WAIT_S)
            transport.engine.send(0, 5, np.full(8, 7, np.uint8))
            transport.close()
            left.set()
        transport.close()

    local_group(2).run(rank_main)


def test_a_forwarder_that_is_stopped_while_it_looks_after_the_network_is_named(monkeypatch):
    """Rank 0 forwards for rank 2 to rank 1, its neighbour; nobody stops a thread, so it stops saying that it looks."""
    monkeypatch.setattr(board, "FRESH_NS", 0)
    assert culprits_for_rank_1() == (0,)


def test_a_forwarder_that_looks_after_the_network_is_not_named():
    assert culprits_for_rank_1() == (2,)


def culprits_for_rank_1() -> tuple[int, ...]:
    """Return whom rank 1 names; rank 0 has posted its own message and waits for that of rank 2, which is silent."""
    done = threading.Event()

    def rank_main(member):
        near = [2] if member.rank == 2 else [0, 1]
        timeout_s = 0.3 if member.rank == 1 else WAIT_S
        options = {"lanes": LANES, "ring": 2, "heap_bytes": 1 << 20, "timeout_s": timeout_s}
        local = InProcessTransport(member, members=near, **options)
        engine = InProcessEngine(member)
        transport = HierarchicalTransport(local, engine, group_ranks(3, 2), timeout_s=timeout_s)
        named = None
        if member.rank < 2:
            transport.post(LANES[0], 0, np.zeros((3, 1), np.int64))
        if member.rank == 0:
            with transport.passing_on():
                assert done.wait(WAIT_S)
        elif member.rank == 1:
            with pytest.raises(PeerTimeout) as caught:
                transport.wait(LANES[0], 0, "waiting")
            named = caught.value.ranks
            done.set()
        else:
            assert done.wait(WAIT_S)
        transport.close()
        return named

    return local_group(3).run(rank_main)[1]


@pytest.mark.parametrize("per_host", [1, 2], ids=["hosts of one", "hosts of two"])
def test_who_waits_for_the_culprit_on_another_host_is_not_named(per_host):
    """Rank 0 misses rank 2, which misses rank 3, of its host or a third; rank 3 misses rank 5, which does nothing."""
    waits_for = {0: 2, 2: 3, 3: 5}
    done = threading.Event()

    def rank_main(member):
        hosts = group_ranks(6, per_host)
        timeout_s = 2.0 if member.rank == 0 else WAIT_S
        options = {"lanes": LANES, "ring": 2, "heap_bytes": 1 << 20, "timeout_s": timeout_s}
        local = InProcessTransport(member, members=hosts.near(member.rank), **options)
        transport = HierarchicalTransport(local, InProcessEngine(member), hosts, timeout_s=timeout_s)
        named = None
        awaited = waits_for.get(member.rank)
        if awaited is None:
            assert done.wait(WAIT_S)
        else:
            with pytest.raises(PeerTimeout if member.rank == 0 else PeerError) as caught:
                miss(transport, awaited)
            named = caught.value.ranks
            done.set()
            transport.leave(Blame(ranks=named, timeout=True))
        transport.close()
        return named

    assert local_group(6).run(rank_main)[0] == (5,)


def miss(transport, rank):
    """Wait for a message that never comes, as an operation waits for a neighbour's or another host's."""
    if rank in transport.hosts.near(transport.rank):
        transport.wait(LANES[1], 0, "waiting", np.array([rank]))
    transfer = transport.engine.receive(rank, 5, np.zeros(8, np.uint8))
    began_ns = time.monotonic_ns()
    with transport.passing_on():
        while True:
            transport.await_transfers([transfer], 1, "waiting", began_ns)


def test_a_rank_that_is_asked_twice_answers_twice():
    """Rank 0 asks whom rank 1 waits for, which answers as often as it is asked, and not before it waits."""
    turn = threading.Barrier(2)

    def rank_main(member):
        engine = InProcessEngine(member)
        questions = Questions(engine, [1 - member.rank], asks=1, tells=2)
        told = []
        for number in range(3):
            if member.rank == 0:
                since_ns = time.monotonic_ns()
                questions.ask(since_ns)
                questions.ask(since_ns)
                told.append(dict(questions.answers(since_ns)))
            turn.wait(WAIT_S)
            if member.rank == 1:
                questions.answer([number % 2], None)
            turn.wait(WAIT_S)
            if member.rank == 0:
                told.append(dict(questions.answers(since_ns)))
        engine.close()
        return told

    assert local_group(2).run(rank_main)[0] == [{}, {1: ((0,), None)}, {}, {1: ((1,), None)}, {}, {1: ((0,), None)}]


def test_a_rank_whose_time_is_up_is_not_named_before_it_has_left():
    """Rank 1 gives up on rank 2, of another host, and is slow to say so; rank 0 misses rank 1 meanwhile."""
    named, gave_up = {}, threading.Event()
    begin = threading.Barrier(2)

    def rank_main(member):
        hosts = group_ranks(3, 2)
        timeout_s = 1.7 if member.rank == 1 else 2.0
        options = {"lanes": LANES, "ring": 2, "heap_bytes": 1 << 20, "timeout_s": timeout_s}
        local = InProcessTransport(member, members=hosts.near(member.rank), **options)
        transport = HierarchicalTransport(local, InProcessEngine(member), hosts, timeout_s=timeout_s)
        if member.rank < 2:
            begin.wait(WAIT_S)
            with pytest.raises(PeerTimeout) as caught:
                miss(transport, member.rank + 1)
            named[member.rank] = caught.value.ranks
        if member.rank == 0:
            gave_up.set()
        assert gave_up.wait(WAIT_S)
        transport.close()

    local_group(3).run(rank_main)
    assert named == {0: (2,), 1: (2,)}


def test_answers_to_one_thread_are_not_lost_when_another_asks():
    """Two threads of rank 0 wait; the second asks before the first has looked for what its own question brought."""
    turn = threading.Barrier(2)

    def rank_main(member):
        engine = InProcessEngine(member)
        questions = Questions(engine, [1 - member.rank], asks=1, tells=2)
        first_ns = time.monotonic_ns()
        if member.rank == 0:
            questions.ask(first_ns)
        turn.wait(WAIT_S)
        if member.rank == 1:
            questions.answer([1], Outsider(4, 1 << 61))
        turn.wait(WAIT_S)
        told = []
        if member.rank == 0:
            second_ns = time.monotonic_ns()
            questions.ask(second_ns)
            told = [dict(questions.answers(since_ns)) for since_ns in (first_ns, second_ns)]
        turn.wait(WAIT_S)
        engine.close()
        return told

    assert local_group(2).run(rank_main)[0] == [{1: ((1,), (4, 1 << 61))}, {}]
