"""Functions that ranks on test hosts run; light to import."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from anyep.testing.hosts import interface_bytes
from anyep.transport.engine_gloo import GlooEngine
from anyep.transport.interfaces import addresses


def where(group: Any, rank: int) -> tuple[str, dict[str, str]]:
    group.allgather(b"")
    return os.environ["ANYEP_HOST_ID"], addresses()


def wait_for(group: Any, rank: int, path: str) -> None:
    Path(path, str(rank)).touch()
    time.sleep(60)


def shout(group: Any, rank: int, address: str) -> bool:
    """Whether a datagram from rank 0 to rank 1 arrives."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear:
        ear.bind(("", 7777))
        ear.settimeout(0.5)
        group.allgather(b"")
        if rank == 0:
            ear.sendto(b"hello", (address, 7777))
            return True
        try:
            return ear.recv(10) == b"hello"
        except TimeoutError:
            return False


def stream(group: Any, rank: int, num_messages: int, num_bytes: int, window: int) -> tuple[float, int, int]:
    """Rank 0 sends to rank 1, ``window`` messages at a time; return seconds, and the bytes of its interface."""
    engine = GlooEngine(group)
    act = engine.send if rank == 0 else engine.receive
    memory = [np.ones(num_bytes, np.uint8) for _ in range(window)]
    group.allgather(b"")
    before, began = interface_bytes(), time.perf_counter()
    pending: list[Any] = []
    for tag in range(num_messages):
        pending.append(act(1 - rank, tag, memory[tag % window]))
        if len(pending) == window or tag == num_messages - 1:
            _finish(engine, pending if tag == num_messages - 1 else pending[:1])
            del pending[0]
    took_s, after = time.perf_counter() - began, interface_bytes()
    group.allgather(b"")
    engine.close()
    return took_s, after.sent - before.sent, after.received - before.received


def _finish(engine: Any, transfers: list[Any]) -> None:
    for transfer in transfers:
        while not transfer.done():
            engine.wait([transfer], 1.0)
