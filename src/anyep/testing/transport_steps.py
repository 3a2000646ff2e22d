"""What the cases of a transport's exam are made of: lanes, messages that can be told apart, and one way to fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from anyep.errors import PeerError
from anyep.transport.base import Lane, Place, Ranks, Transport, Words

OPEN = Lane(index=0, name="open", words=7)
DONE = Lane(index=1, name="done", words=1)
WIDE = Lane(index=2, name="wide", words=300)
LANES = (OPEN, DONE, WIDE)
TIMEOUT_S = 30.0
SILENCE_S = 0.4

Make = Callable[..., Transport]
"""``make(lanes=, ring=, heap_bytes=, timeout_s=, poison=)`` opens the transport under test, collectively."""


class TransportExamError(AssertionError):
    """A transport did what the seam forbids, or did not do what it promises."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise TransportExamError(what)


@contextmanager
def opened(
    make: Make, *, ring: int = 2, heap_bytes: int = 1 << 20, timeout_s: float = TIMEOUT_S
) -> Iterator[Transport]:
    transport = make(lanes=LANES, ring=ring, heap_bytes=heap_bytes, timeout_s=timeout_s, poison=True)
    try:
        yield transport
    finally:
        transport.close()


def expect(kind: type[Exception], call: Callable[[], object], what: str) -> Any:
    try:
        call()
    except kind as error:
        return error
    except Exception as error:
        raise TransportExamError(f"{what}: expected {kind.__name__}, got {type(error).__name__}: {error}") from error
    raise TransportExamError(f"{what}: expected {kind.__name__}, got no error")


def message(lane: Lane, epoch: int, source: int, destination: int) -> Words:
    """What ``source`` says: of another length in each epoch, with every bit of a word in use."""
    count = 1 + epoch % lane.words
    seed = np.int64((epoch % (1 << 31)) * 1_000_003 + source * 1009 + destination * 31 + lane.index)
    words: Words = (np.arange(count, dtype=np.int64) * np.int64(-0x61C8864680B583EB)) ^ seed
    return words


def pause_sometimes(rng: np.random.Generator, probability: float) -> None:
    if rng.random() < probability:
        time.sleep(rng.random() * 0.002)


def post(transport: Transport, lane: Lane, epoch: int) -> None:
    rows = [message(lane, epoch, transport.rank, d) for d in range(transport.size)]
    transport.post(lane, epoch, np.stack(rows))


def wait(transport: Transport, lane: Lane, epoch: int) -> Words:
    words = transport.wait(lane, epoch, f"exam {epoch}: {lane.name}")
    require(words.shape == (transport.size, lane.words), f"wait returned {words.shape} on lane {lane.name}")
    check_messages(transport, lane, epoch, words)
    return words


def check_messages(transport: Transport, lane: Lane, epoch: int, words: Words, sources: Ranks | None = None) -> None:
    for source in range(transport.size) if sources is None else sources.tolist():
        expected = message(lane, epoch, source, transport.rank)
        require(
            np.array_equal(words[source, : expected.size], expected),
            f"rank {transport.rank}, lane {lane.name}, epoch {epoch}: wrong words from rank {source}",
        )


def swap_places(transport: Transport, epoch: int, place: Place) -> list[Place]:
    words = np.tile(np.array([place.segment, place.offset], np.int64), (transport.size, 1))
    transport.post(OPEN, epoch, words)
    told = transport.wait(OPEN, epoch, f"exam {epoch}: places")
    return [Place(segment=int(segment), offset=int(offset)) for segment, offset in told[:, :2]]


def meet(transport: Transport, epoch: int) -> None:
    transport.post(DONE, epoch, np.zeros((transport.size, 1), np.int64))
    transport.wait(DONE, epoch, f"exam {epoch}: done")


def check_error(error: PeerError, ranks: tuple[int, ...], step: str) -> None:
    require(error.ranks == ranks, f"{type(error).__name__} names ranks {error.ranks}, expected {ranks}: {error}")
    require(step in str(error) and error.step == step, f"the error does not say in which step: {error}")
