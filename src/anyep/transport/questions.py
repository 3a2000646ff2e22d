"""Between hosts: whom do you wait for? Asked by who has waited nearly as long as it may, answered by who waits.

A rank that computes answers when it comes to its next wait, one that is stopped never. There is one question at a time
between two ranks, each way, so that two tags are enough.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from anyep.transport.elsewhere import Outsider
from anyep.transport.engine import Bytes, Engine, Transfer, has_come
from anyep.transport.inquiry import Answer

_OUTSIDER_BYTES = 16
"""An answer: the outsider's rank (-1: there is none) and holder as int64, then a byte a rank, 1 where it is waited
for."""
_NOBODY = Outsider(-1, 0)


class Questions:
    """One rank's questions to its ``partners`` on other hosts, and its answers.

    ``asks`` and ``tells``: the engine's tags for them.
    """

    def __init__(self, engine: Engine, partners: Collection[int], *, asks: int, tells: int) -> None:
        self._engine = engine
        self._asks, self._tells = asks, tells
        self._lock = threading.Lock()
        self._asked_ns = 0
        self._sent: dict[tuple[int, int], tuple[Transfer, Bytes]] = {}
        """keeps what is under way, by rank and tag"""
        self._unanswered: dict[int, tuple[Transfer, Bytes]] = {}
        self._told: dict[int, tuple[int, Answer]] = {}
        """when a rank's last answer was found, and for whom it waits"""
        self._asked = {rank: self._receive(rank, asks, 1) for rank in partners}

    def ask(self, since_ns: int) -> None:
        """Ask everybody, unless that was done since; whoever has not answered the last time is not asked again."""
        with self._lock:
            if self._asked_ns >= since_ns:
                return
            self._collect(self._asked_ns)  # it answers the question before: of now it tells nothing
            self._asked_ns = time.monotonic_ns()
            for rank in self._asked.keys() - self._unanswered.keys():
                self._unanswered[rank] = self._receive(rank, self._tells, _OUTSIDER_BYTES + self._engine.size)
                self._send(rank, self._asks, np.zeros(1, np.uint8))

    def answer(self, missing: Sequence[int], outsider: Outsider | None) -> None:
        """Tell who has asked that this rank waits for ``missing``, and for an outsider."""
        with self._lock:
            for rank in [rank for rank, (asked, _) in self._asked.items() if has_come(asked)]:
                answer = np.zeros(_OUTSIDER_BYTES + self._engine.size, np.uint8)
                answer[:_OUTSIDER_BYTES].view(np.int64)[:] = outsider or _NOBODY
                answer[_OUTSIDER_BYTES:][list(missing)] = 1
                self._send(rank, self._tells, answer)
                self._asked[rank] = self._receive(rank, self._asks, 1)

    def answers(self, since_ns: int) -> Mapping[int, Answer]:
        """Return for whom each rank waits that has answered since then."""
        with self._lock:
            self._collect(time.monotonic_ns())
            return {rank: answer for rank, (found_ns, answer) in self._told.items() if found_ns >= since_ns}

    def _collect(self, now_ns: int) -> None:
        for rank in [rank for rank, (answer, _) in self._unanswered.items() if has_come(answer)]:
            _, memory = self._unanswered.pop(rank)
            outsider = Outsider(*memory[:_OUTSIDER_BYTES].view(np.int64).tolist())
            ranks = tuple(np.flatnonzero(memory[_OUTSIDER_BYTES:]).tolist())
            self._told[rank] = now_ns, Answer(ranks, outsider if outsider.rank >= 0 else None)

    def _receive(self, rank: int, tag: int, num_bytes: int) -> tuple[Transfer, Bytes]:
        memory = np.zeros(num_bytes, np.uint8)
        return self._engine.receive(rank, tag, memory), memory

    def _send(self, rank: int, tag: int, memory: Bytes) -> None:
        self._sent[rank, tag] = self._engine.send(rank, tag, memory), memory
