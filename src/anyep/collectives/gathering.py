"""Sessions of all-gathers: every rank's tensor in every rank's memory, without a copy after the way.

Legend: R ranks, G gathers a session.

A rank's memory is handed out from its beginning in each session: a gather's tensor takes [R, *shape] bytes, rounded up
to 32, so that all ranks know all places. (1) Entering a session waits for every rank (*enter*), which says that nobody
reads the last session's results any more. (2) A gather copies this rank's tensor to its row in every rank's memory and
says so (*there*). (3) Waiting for a gather waits for *there* from every rank, and for nothing else. Gather i of session
s is message s G + i, so that within a session no two share a mailbox of the G in the ring; *enter* stands between
sessions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
import torch

from anyep.collectives.station import Station, Wiring, place_words
from anyep.collectives.tensors import bytes_of, dense, view_on
from anyep.errors import CapacityError
from anyep.exchange.arguments import check_integer
from anyep.exchange.event import Pending
from anyep.machine.addresses import address_of
from anyep.transport.base import Block, Lane, Words

ALIGNMENT_BYTES = 32
"""Between the results of a session."""

_ENTER = Lane(index=0, name="enter", words=2)
_THERE = Lane(index=1, name="there", words=3)
"""Digest of shapes and dtypes, tensors, bytes."""
_MOST_BYTES = 1 << 40
_MOST_GATHERS = 1 << 16

Gathered = torch.Tensor | tuple[torch.Tensor, ...]


def gathered_bytes(num_ranks: int, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return what one gathered tensor takes of a session's bytes.

    >>> gathered_bytes(3, (5,), torch.float32)
    64
    """
    return -(-num_ranks * bytes_of(shape, dtype) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Gatherer(Station):
    """The memory for sessions of all-gathers, one session at a time. Making it is collective.

    ``session_bytes``: of all results of a session (:func:`gathered_bytes` of each tensor); every rank commits as
    much. ``max_gathers`` G: calls of ``all_gather`` in a session.

    >>> from anyep import local_group
    >>> def rank_main(member):
    ...     with Gatherer(member, session_bytes=64) as gatherer, gatherer.session() as session:
    ...         return session.all_gather(torch.tensor([gatherer.rank, 7])).tolist()
    >>> local_group(2).run(rank_main)
    [[[0, 7], [1, 7]], [[0, 7], [1, 7]]]
    """

    label = "gatherer"

    def __init__(
        self,
        group: object,
        *,
        session_bytes: int,
        max_gathers: int = 32,
        timeout_s: float = 30.0,
        transport: str = "auto",
        kernels: str = "cpu",
    ) -> None:
        def plan(num_ranks: int) -> Wiring:
            check_integer("session_bytes", session_bytes, at_least=0, at_most=_MOST_BYTES)
            check_integer("max_gathers", max_gathers, at_least=1, at_most=_MOST_GATHERS)
            equal = {"session_bytes": session_bytes, "max_gathers": max_gathers}
            return Wiring(lanes=(_ENTER, _THERE), ring=max(2, max_gathers), heap_bytes=session_bytes, equal=equal)

        super().__init__(group, plan, timeout_s=timeout_s, transport=transport, kernels=kernels)
        self._session_bytes = session_bytes
        self._max_gathers = max_gathers
        self._sessions = 0
        self._running: GatherSession | None = None
        with self._opening():
            self._block = self._transport.allocate(session_bytes)
            told_R2 = self._swap(_ENTER, 0, np.array(place_words(self._block), np.int64), "opening: memory").tolist()
            self._bases_R = np.array([self._address(rank, *told) for rank, told in enumerate(told_R2)], np.int64)

    def session(self) -> GatherSession:
        """Enter a session; a context manager. Collective: waits for every rank.

        Results of the session before may be written over from now on. Raises ValueError while a session is open;
        PeerLost and PeerTimeout, which end the gatherer; ClosedError.
        """
        self._check_open()
        if self._running is not None:
            raise ValueError("a session of this gatherer is open: close it before the next one")
        number = self._sessions + 1
        with self._unbroken():
            self._swap(_ENTER, number, np.zeros(1, np.int64), f"session {number}: enter")
        self._sessions = number
        self._running = GatherSession(self, number)
        return self._running


@dataclass(frozen=True, kw_only=True, eq=False)
class Started:
    """A gather that was sent: views that will be filled, its number, and the words in which ranks must agree."""

    results: tuple[torch.Tensor, ...]
    number: int
    words: Words


class GatherSession:
    """Gathers until it is closed; its results are views that hold until the next session is entered.

    All ranks call the same with the same shapes and dtypes, in the same order.
    """

    def __init__(self, gatherer: Gatherer, number: int) -> None:
        self._gatherer = gatherer
        self._number = number
        self._gathers = 0
        self._used_bytes = 0
        self._spoiled = False
        self._closed = False

    def slot(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return this rank's place in the result of the next gather: filled and passed, it need not be copied here."""
        return self.slots([shape], dtype)[0]

    def slots(self, shapes: Iterable[Sequence[int]], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Return this rank's places for a gather of several tensors. Raises CapacityError, ValueError, ClosedError."""
        self._check_open()
        wanted = [(tuple(shape), dtype) for shape in shapes]
        offsets = self._place(wanted)
        own = [offset + self._gatherer.rank * bytes_of(*one) for one, offset in zip(wanted, offsets, strict=True)]
        return tuple(view_on(self._gatherer._block, at, *one) for one, at in zip(wanted, own, strict=True))

    @overload
    def all_gather(self, x: torch.Tensor, *, wait: Literal[True] = True) -> torch.Tensor: ...
    @overload
    def all_gather(self, x: torch.Tensor, *, wait: Literal[False]) -> Pending[torch.Tensor]: ...
    @overload
    def all_gather(self, x: Sequence[torch.Tensor], *, wait: Literal[True] = True) -> tuple[torch.Tensor, ...]: ...
    @overload
    def all_gather(self, x: Sequence[torch.Tensor], *, wait: Literal[False]) -> Pending[tuple[torch.Tensor, ...]]: ...

    def all_gather(
        self, x: torch.Tensor | Sequence[torch.Tensor], *, wait: bool = True
    ) -> Gathered | Pending[torch.Tensor] | Pending[tuple[torch.Tensor, ...]]:
        """Return [R, *x.shape], row r from rank r; for a sequence of tensors a tuple of such.

        ``x`` may be changed at once, unless it is a :meth:`slot`. ``wait=False`` sends and returns; ``wait()`` of the
        result, in the same session, waits for the other ranks. Raises CapacityError where the session has no room or
        no call left, TypeError and ValueError for arguments (nothing was sent); ValueError on every rank where ranks
        gather different shapes or dtypes: results of this session may be damaged then, and the next one is good again.
        PeerLost and PeerTimeout end the gatherer; ClosedError.
        """
        single = isinstance(x, torch.Tensor)
        started = self.begin([x] if isinstance(x, torch.Tensor) else x)

        def land() -> Gathered:
            self.finish(started)
            return started.results[0] if single else started.results

        if wait:
            return land()
        pending: Pending[Any] = Pending("all_gather", lambda: self._arrived(started), land)  # of one or of several
        return pending

    def begin(self, xs: Sequence[torch.Tensor]) -> Started:
        """The first half of :meth:`all_gather`: send; the results are there before they are filled."""
        self._check_open()
        gatherer = self._gatherer
        plain = [dense(f"x[{i}]", x) for i, x in enumerate(xs)]
        if self._gathers == gatherer._max_gathers:
            raise CapacityError(
                f"this session has made its max_gathers={gatherer._max_gathers} gathers; enter the next session, or "
                "make a gatherer with a larger max_gathers"
            )
        wanted = [(tuple(x.shape), x.dtype) for x in plain]
        offsets = self._place(wanted)
        tables = [self._table(x, offset) for x, offset in zip(plain, offsets, strict=True)]
        number = self._number * gatherer._max_gathers + self._gathers
        words = _summary(wanted)
        with gatherer._unbroken():
            for x, table_R in zip(plain, tables, strict=True):
                self._spread(x, table_R)
            gatherer._transport.post(_THERE, number, np.tile(words, (gatherer.num_ranks, 1)))
        self._gathers += 1
        self._used_bytes += self._bytes(wanted)
        shapes = [((gatherer.num_ranks, *shape), dtype) for shape, dtype in wanted]
        views = (view_on(gatherer._block, offset, *one) for one, offset in zip(shapes, offsets, strict=True))
        return Started(results=tuple(views), number=number, words=words)

    def finish(self, started: Started) -> None:
        """The second half: wait for every rank's tensors. May be called again."""
        self._check_open()
        gatherer, number, words = self._gatherer, started.number, started.words
        step = f"all_gather {number % gatherer._max_gathers + 1} of session {self._number}"
        with gatherer._unbroken():
            told_RW = gatherer._transport.wait(_THERE, number, step)
        different = np.flatnonzero((told_RW != words).any(axis=1)).tolist()
        if different:
            self._spoiled = True
            theirs = told_RW[different[0]].tolist()
            raise ValueError(
                f"{step}: ranks gather different shapes or dtypes: rank {gatherer.rank} {words[1]} tensors of "
                f"{words[2]} bytes, rank {different[0]} {theirs[1]} of {theirs[2]}; enter a new session"
            )

    def close(self) -> None:
        """End the session on this rank; what it gathered can be read until the next session is entered. Idempotent."""
        if not self._closed:
            self._closed = True
            self._gatherer._running = None

    def __enter__(self) -> GatherSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        self._gatherer._check_open()
        if self._closed:
            raise ValueError("this session was closed: wait for its gathers before, and enter a new one for others")
        if self._spoiled:
            raise ValueError("ranks have gathered different shapes in this session: enter a new one")

    def _arrived(self, started: Started) -> bool:
        return self._gatherer._transport.arrived(_THERE, started.number)

    def _bytes(self, wanted: Iterable[tuple[Sequence[int], torch.dtype]]) -> int:
        return sum(gathered_bytes(self._gatherer.num_ranks, *one) for one in wanted)

    def _place(self, wanted: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[int]:
        """Return where each result begins; CapacityError where they do not fit."""
        most_bytes = self._gatherer._session_bytes
        needed = self._bytes(wanted)
        if self._used_bytes + needed > most_bytes:
            raise CapacityError(
                f"gathering {needed} bytes more than the {self._used_bytes} of this session exceeds its "
                f"session_bytes={most_bytes}"
            )
        offsets, offset = [], self._used_bytes
        for one in wanted:
            offsets.append(offset)
            offset += self._bytes([one])
        return offsets

    def _table(self, x: torch.Tensor, offset: int) -> Words:
        """Return where the result lies on each rank, int64 [R]; 0 for this rank where ``x`` is its own slot."""
        gatherer = self._gatherer
        table_R: Words = gatherer._bases_R + offset
        begin, block = x.data_ptr(), gatherer._block
        if x.nbytes == 0 or not _overlap(begin, x.nbytes, block):
            return table_R
        if begin != block.address + offset + gatherer.rank * x.nbytes:
            raise ValueError(
                "x lies in the session's memory, but not at its place in this gather: fill slot() right before the "
                "gather it is for, or pass x.clone()"
            )
        table_R[gatherer.rank] = 0
        return table_R

    def _spread(self, x: torch.Tensor, table_R: Words) -> None:
        """Copy ``x`` to row ``rank`` of every result: one token with R entries."""
        if x.nbytes:
            ranks_R = np.arange(len(table_R), dtype=np.int32)
            rows_R = np.full(len(table_R), self._gatherer.rank, np.int32)
            addresses = (address_of(one) for one in (ranks_R, rows_R, table_R))
            self._gatherer._kernels.scatter(x.data_ptr(), x.nbytes, 0, 1, len(table_R), *addresses)


def _overlap(begin: int, num_bytes: int, block: Block) -> bool:
    return begin < block.address + block.num_bytes and block.address < begin + num_bytes


def _summary(wanted: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> Words:
    """Return the words in which the ranks of a gather must agree."""
    digest = blake2b(repr(wanted).encode(), digest_size=8).digest()
    num_bytes = sum(bytes_of(*one) for one in wanted)
    return np.array([int.from_bytes(digest, "little", signed=True), len(wanted), num_bytes], np.int64)
