"""Who holds a rank, and in which transports: a process may wait in one buffer while it is missed in another.

A *holder* is the process that is a rank, or the thread where ranks are threads. Buffers may number the same holders
differently, or have others, so that what is said of a wait in another buffer goes by their names: numbers that are the
same in all transports.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from typing import NamedTuple, Protocol
from weakref import WeakSet

from anyep.transport.identity import Identity


class Outsider(NamedTuple):
    """One who takes no part here and is waited for in another transport."""

    rank: int
    """there"""
    holder: int


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A wait in another transport of the same holder, as it looks here."""

    holders: tuple[int, ...]
    """who is waited for, of those that take part here"""
    outsider: Outsider | None
    """one of the others"""


class Listener(Protocol):
    """One transport's (:class:`anyep.transport.inquiry.Inquiry`)."""

    holders: Sequence[int]

    def hear(self, source: object, wait: Elsewhere, now_ns: int) -> None:
        """This thread waits in the transport ``source``; for nobody: it does not wait there any more."""

    def forget(self, source: object) -> None:
        """Nobody waits in the transport ``source`` any more: its rank has left it."""


class Holder:
    """One process, or one thread that is a rank: what waits in one of its transports is told to the others."""

    def __init__(self, name: int) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._listeners: WeakSet[Listener] = WeakSet()

    def join(self, listener: Listener) -> None:
        with self._lock:
            self._listeners.add(listener)

    def leave(self, listener: Listener) -> None:
        with self._lock:
            self._listeners.discard(listener)

    def others(self, listener: Listener) -> list[Listener]:
        """Return who else listens. They live as long as that list."""
        with self._lock:
            return [other for other in self._listeners if other is not listener]


def name_of(identity: Identity, thread: int = 0) -> int:
    """Return how transports call a process, or a thread of it, all alike: 62 bits."""
    words = " ".join(map(str, (*astuple(identity), thread)))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 2


def this_process() -> Holder:
    """Return the holder of ranks that are processes."""
    return _process(os.getpid())


@cache
def _process(pid: int) -> Holder:
    return Holder(name_of(Identity.own()))


class _OfThread(threading.local):
    holder: Holder | None = None


_of_thread = _OfThread()
_numbers = itertools.count(1)


def this_thread() -> Holder:
    """Return the holder of a rank that is this thread."""
    holder = _of_thread.holder
    if holder is None:
        holder = _of_thread.holder = Holder(name_of(Identity.own(), next(_numbers)))
    return holder


def seen_there(
    missing: Sequence[int], holders: Sequence[int], there: Collection[int], waits_for: Callable[[int], Sequence[int]]
) -> Elsewhere:
    """Return how a wait for ``missing`` looks where only the holders ``there`` are known.

    Whoever is not known there is replaced by those for whom it waits itself.

    >>> waits = {0: [1], 1: [2], 2: []}
    >>> seen_there([0], [70, 71, 72], {71}, waits.__getitem__)
    Elsewhere(holders=(71,), outsider=None)
    >>> seen_there([0], [70, 71, 72], {73}, waits.__getitem__)
    Elsewhere(holders=(), outsider=Outsider(rank=2, holder=72))
    """
    seen: set[int] = set()
    known: list[int] = []
    outsider: Outsider | None = None
    ahead = [*missing]
    while ahead:
        rank = ahead.pop()
        if rank in seen:
            continue
        seen.add(rank)
        if holders[rank] in there:
            known.append(holders[rank])
            continue
        further = waits_for(rank)
        ahead += further
        if not further:
            outsider = Outsider(rank, holders[rank])
    return Elsewhere(holders=tuple(known), outsider=outsider)
