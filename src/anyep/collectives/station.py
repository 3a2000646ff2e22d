"""What row stores, rings and gather sessions share: a transport of their own, waits that end, and how they end.

An error in the middle of an operation ends the object on this rank: it leaves, and says whom it blames, so that the
others learn the culprit at once and not the messenger after their own time limit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import numpy as np

from anyep.errors import ClosedError
from anyep.kernels.registry import load
from anyep.kernels.spec import KernelSet
from anyep.machine.forks import tell_after_fork
from anyep.transport.base import Blame, Block, Lane, Place, Ranks, Words
from anyep.transport.inprocess import Member
from anyep.transport.liveness import blame_for
from anyep.transport.registry import check_name, open_transport
from anyep.transport.rendezvous import find_rendezvous
from anyep.transport.together import together

Self = TypeVar("Self", bound="Station")


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """What an object asks of its transport (``transport/base.py``), and the arguments in which ranks must agree."""

    lanes: tuple[Lane, ...]
    ring: int
    heap_bytes: int
    equal: Mapping[str, object]


class Station:
    """One rank's end of a collective object. Making it is collective; ``with`` or ``close`` ends it.

    ``plan(num_ranks)`` checks the arguments and returns the wiring; what it raises on one rank is an error on all.
    """

    label = "collective"
    _closed = True
    """until all is made; of the class, for ``__init__`` does not run where an argument has a wrong name"""

    def __init__(
        self,
        group: object,
        plan: Callable[[int], Wiring],
        *,
        timeout_s: float,
        transport: str,
        kernels: str,
    ) -> None:
        self._broken: BaseException | None = None
        rendezvous = find_rendezvous(group)
        made: list[tuple[Wiring, KernelSet]] = []

        def act() -> dict[str, str]:
            check_name(transport)
            _check_timeout(timeout_s)
            made.append((plan(rendezvous.size), load(kernels)))
            return {name: repr(value) for name, value in made[0][0].equal.items()}

        self._check_equal(rendezvous.rank, together(rendezvous, act, what=f"make its {self.label}"))
        wiring, self._kernels = made[0]
        self._transport = open_transport(
            rendezvous,
            transport=_of_one_host(transport, group),
            lanes=wiring.lanes,
            ring=wiring.ring,
            heap_bytes=wiring.heap_bytes,
            timeout_s=timeout_s,
        ).transport
        self._closed = False
        tell_after_fork(self)

    @property
    def rank(self) -> int:
        """This rank's number in the group, 0 to R - 1."""
        return self._transport.rank

    @property
    def num_ranks(self) -> int:
        """R."""
        return self._transport.size

    def after_fork(self) -> None:
        """Called in a child of this process, where other ranks' memory is not mapped."""
        self._broken = ClosedError(f"the {self.label} belongs to the process that made it, and this is a fork of it")

    def close(self) -> None:
        """Leave the group and free its memory, once the last tensor on it is gone. Idempotent, waits for nobody.

        Ranks that already have what they wait for are not disturbed; those that still need this rank get PeerLost.
        """
        self._end(None)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._end(blame_for(error, self.rank, self._transport.holders))

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"{self!r} was never closed; use it in a with statement", ResourceWarning, stacklevel=2)

    def __repr__(self) -> str:
        if not hasattr(self, "_transport"):
            return f"<anyep {self.label}, not made>"
        state = "closed" if self._closed else "open"
        return f"<anyep {self.label} of rank {self.rank} of {self.num_ranks}, {self._transport.name}, {state}>"

    def _check_equal(self, rank: int, told: list[dict[str, str]]) -> None:
        for name, mine in told[rank].items():
            for other, arguments in enumerate(told):
                if arguments[name] != mine:
                    raise ValueError(
                        f"{name} differs between ranks: {mine} on rank {rank}, {arguments[name]} on rank {other}; "
                        f"every rank must make its {self.label} with the same arguments"
                    )

    def _check_open(self) -> None:
        """Raise ClosedError if nothing can be done any more."""
        if self._broken is not None:
            cause = f"{type(self._broken).__name__}: {self._broken}"
            raise ClosedError(f"this {self.label} ended with {cause}; close it and make a new one") from self._broken
        if self._closed:
            raise ClosedError(f"this {self.label} is closed; make a new one")

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        """What breaks off in here ends the object."""
        self._check_open()
        try:
            yield
        except BaseException as error:
            if self._broken is None:
                self._broken = error
                self._transport.leave(blame_for(error, self.rank, self._transport.holders))
            raise

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """The last steps of making the object, together with the peers: it is closed where they fail."""
        try:
            with self._unbroken():
                yield
        except BaseException:
            self._end(None)
            raise

    def _swap(self, lane: Lane, epoch: int, words_N: Words, step: str, ranks: Ranks | None = None) -> Words:
        """Tell the same words to ``ranks`` (None: all) and return what they told: int64 [R, lane.words], by rank."""
        self._transport.post(lane, epoch, np.tile(words_N, (self.num_ranks, 1)), ranks)
        return self._transport.wait(lane, epoch, step, ranks)

    def _address(self, rank: int, segment: int, offset: int) -> int:
        return self._transport.address(rank, Place(segment, offset))

    def _end(self, blame: Blame | None) -> None:
        if not self._closed:
            self._closed = True
            self._transport.leave(blame)
            self._join()
            self._transport.close()

    def _join(self) -> None:
        """Wait for this object's own threads, between leaving and giving memory back."""


def place_words(block: Block) -> list[int]:
    """Return what peers have to know to find a block: segment and offset."""
    return [block.place.segment, block.place.offset]


def _check_timeout(timeout_s: object) -> None:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
        raise TypeError(f"timeout_s must be a number of seconds, got {timeout_s!r}")
    if not 0 < timeout_s < float("inf"):
        raise ValueError(f"timeout_s must be positive and finite, got {timeout_s}")


def _of_one_host(transport: str, group: object) -> str:
    """Return what "auto" means here: collectives read and write their peers' memory, so all ranks are on one host."""
    if transport != "auto":
        return transport
    return "inprocess" if isinstance(find_rendezvous(group), Member) else "shm"
