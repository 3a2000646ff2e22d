"""What ``anyep doctor --peers`` measures: who reaches whom, and how soon and how fast through the engine.

One rank of each host, its first, speaks for it. Pairs of hosts take turns, so that none disturbs another.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import numpy as np

from anyep.errors import PeerTimeout
from anyep.transport.engine import Bytes, Engine, Transfer

_PINGS, _WARM_UP = 200, 20
_MESSAGE_BYTES = 1 << 20
"""Large enough that what a message costs by itself does not count."""
_WINDOW = 4
_TRIAL_MESSAGES, _MOST_MESSAGES = 4, 512
_STREAM_S = 0.5
"""How long a stream should last: long beside any latency, short beside a person's patience."""
_PING, _COUNT, _ACK, _STREAM = 1, 2, 3, 16
"""Tags; a stream takes those from its own on."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two hosts through the engine. ``error``: why nothing, or not everything, was measured."""

    hosts: tuple[int, int]
    latency_us: float | None = None
    """half of a round trip of 8 bytes, the median"""
    there_gbit_s: float | None = None
    back_gbit_s: float | None = None
    error: str | None = None


@contextmanager
def listening(address: str) -> Iterator[int]:
    """Open a port at ``address`` to which others can connect, and return its number."""
    with socket.create_server((address, 0), backlog=128) as ear:
        yield int(ear.getsockname()[1])


def cannot_reach(address: str, port: int, timeout_s: float) -> str | None:
    """Connect and hang up; return why that failed, None if it did not."""
    try:
        socket.create_connection((address, port), timeout_s).close()
    except OSError as error:
        return str(error)
    return None


def probe_pair(engine: Engine, hosts: tuple[int, int], other: int, *, first: bool, timeout_s: float) -> Pair:
    """Measure between this rank and ``other``, which calls this at the same time; one of them is ``first``.

    Raises PeerLost and PeerTimeout, naming ``other``.
    """
    line = _Line(engine, other, timeout_s)
    latency_us = line.ping(first=first)
    speeds = [line.stream(sending=first), line.stream(sending=not first)]
    return Pair(hosts=hosts, latency_us=latency_us, there_gbit_s=speeds[0], back_gbit_s=speeds[1])


class _Line:
    """Messages to and from one other rank; every wait is bounded."""

    def __init__(self, engine: Engine, other: int, timeout_s: float) -> None:
        self._engine = engine
        self._other = other
        self._timeout_s = timeout_s
        self._memory = [np.zeros(_MESSAGE_BYTES, np.uint8) for _ in range(_WINDOW)]

    def ping(self, *, first: bool) -> float:
        """Return half of a round trip in us."""
        word = np.zeros(8, np.uint8)
        trips = []
        for _ in range(_WARM_UP + _PINGS):
            began_ns = time.perf_counter_ns()
            for sending in (first, not first):
                self._move(_PING, word, sending=sending)
            trips.append((time.perf_counter_ns() - began_ns) / 2e3)
        return median(trips[_WARM_UP:])

    def stream(self, *, sending: bool) -> float:
        """Return Gbit/s of one way, as whoever sends sees it until the other has said that it has everything."""
        trial_s = self._stream(_TRIAL_MESSAGES, sending=sending)
        count = min(_MOST_MESSAGES, max(_TRIAL_MESSAGES, int(_STREAM_S / (trial_s / _TRIAL_MESSAGES))))
        word = np.array([count], np.int64)
        self._move(_COUNT, word.view(np.uint8), sending=sending)
        took_s = self._stream(int(word[0]), sending=sending)
        return 8 * _MESSAGE_BYTES * int(word[0]) / took_s / 1e9

    def _stream(self, count: int, *, sending: bool) -> float:
        began = time.perf_counter()
        under_way: list[Transfer] = []
        for number in range(count):
            if len(under_way) == _WINDOW:
                self._await(under_way.pop(0))
            memory = self._memory[number % _WINDOW]
            under_way.append(self._start(_STREAM + number, memory, sending=sending))
        for transfer in under_way:
            self._await(transfer)
        self._move(_ACK, np.zeros(8, np.uint8), sending=not sending)
        return time.perf_counter() - began

    def _move(self, tag: int, memory: Bytes, *, sending: bool) -> None:
        self._await(self._start(tag, memory, sending=sending))

    def _start(self, tag: int, memory: Bytes, *, sending: bool) -> Transfer:
        act = self._engine.send if sending else self._engine.receive
        return act(self._other, tag, memory)

    def _await(self, transfer: Transfer) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not transfer.done():
            if time.monotonic() > deadline:
                raise PeerTimeout(
                    f"rank {self._other} did not answer through {self._engine.name} within {self._timeout_s:g} s",
                    ranks=[self._other],
                    step="probing",
                )
            self._engine.wait([transfer], 0.05)
