"""Ranks on several hosts, played by threads: what a rank did before it left counts."""

from __future__ import annotations

import threading
import time

import numpy as np

from anyep.layout.hosts import group_ranks
from anyep.transport.engine_inprocess import InProcessEngine
from anyep.transport.hierarchical import HierarchicalTransport
from anyep.transport.inprocess import InProcessTransport, local_group
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
