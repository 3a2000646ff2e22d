"""What the cases of an engine's exam are made of: messages that can be told apart, guarded memory, one way to fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from anyep.testing.transport_steps import require
from anyep.transport.engine import NUM_TAGS, Bytes, Engine, Transfer

TIMEOUT_S = 60.0
SLICE_S = 5.0
SIZES = (0, 1, 7, 4096, 16383, 16384, 16385, 65537, (1 << 20) + 3)
"""Bytes: none, odd ones, those around which engines change their way, and one of many packets."""
LARGE = 16 << 20
POISON = 0xFF
_GUARD = 64
_MEET = NUM_TAGS - 1

Make = Callable[[], Engine]
"""Opens the engine under test, collectively."""


@contextmanager
def opened(make: Make) -> Iterator[Engine]:
    engine = make()
    try:
        yield engine
    finally:
        engine.close()


def peers(engine: Engine) -> list[int]:
    return [rank for rank in range(engine.size) if rank != engine.rank]


def content(source: int, destination: int, tag: int, num_bytes: int) -> Bytes:
    """The bytes that ``source`` sends: different for every message, without a period that a packet could have."""
    rng = np.random.default_rng([source, destination, tag, num_bytes])
    return rng.integers(0, 256, num_bytes, dtype=np.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class Incoming:
    """A message that is awaited, in poisoned memory between two guards."""

    transfer: Transfer
    whole: Bytes
    expected: Bytes

    def check(self) -> None:
        name = f"the message of {self.expected.size} bytes from rank {self.transfer.rank}"
        inner = self.whole[_GUARD : _GUARD + self.expected.size]
        require(bool(np.array_equal(inner, self.expected)), f"{name} has wrong bytes")
        guards = np.concatenate([self.whole[:_GUARD], self.whole[_GUARD + self.expected.size :]])
        require(bool((guards == POISON).all()), f"{name} was written beyond its memory")


def send(engine: Engine, rank: int, tag: int, num_bytes: int) -> Transfer:
    return engine.send(rank, tag, content(engine.rank, rank, tag, num_bytes))


def receive(engine: Engine, rank: int, tag: int, num_bytes: int) -> Incoming:
    whole = np.full(num_bytes + 2 * _GUARD, POISON, np.uint8)
    transfer = engine.receive(rank, tag, whole[_GUARD : _GUARD + num_bytes])
    return Incoming(transfer=transfer, whole=whole, expected=content(rank, engine.rank, tag, num_bytes))


def finish(engine: Engine, transfers: Sequence[Transfer]) -> None:
    """Wait until all are done; fail after a minute."""
    deadline = time.monotonic() + TIMEOUT_S
    pending = [transfer for transfer in transfers if not transfer.done()]
    while pending:
        left_s = deadline - time.monotonic()
        require(left_s > 0, f"{len(pending)} messages of {len(transfers)} were not done in time")
        engine.wait(pending, min(left_s, SLICE_S))
        pending = [transfer for transfer in pending if not transfer.done()]
    require(all(transfer.done() for transfer in transfers), "a transfer that was done is not done any more")


def arrive(engine: Engine, messages: Sequence[Incoming]) -> None:
    finish(engine, [message.transfer for message in messages])
    for message in messages:
        message.check()


def meet(engine: Engine, tag: int = _MEET) -> None:
    """Return when every rank is here."""
    incoming = [receive(engine, rank, tag, 1) for rank in peers(engine)]
    finish(engine, [send(engine, rank, tag, 1) for rank in peers(engine)])
    arrive(engine, incoming)


def settle(engine: Engine, transfer: Transfer) -> Exception | None:
    """Wait until a transfer is done; return the error that it raises instead, if it does."""
    try:
        finish(engine, [transfer])
    except AssertionError:
        raise
    except Exception as error:
        return error
    return None
