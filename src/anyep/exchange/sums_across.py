"""Combine between hosts: the forwarder sums a token's rows of its host, or collects them, and sends them back.

By default a host's rows of a token become one row (summed in fp32, rounded once, as it travels). Where sums must not
depend on where experts live (``reduce="expert"``), follow columns without groups, or the origin multiplies with
weights, each row crosses by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyep.exchange.across import CHUNK_BYTES
from anyep.exchange.courier import DATA, WEIGHTS, Inbox, Outbox
from anyep.exchange.crossing import Crossing, address_of
from anyep.exchange.proxy import Proxy
from anyep.exchange.rows_across import post_done
from anyep.exchange.wire import ELEMENTS
from anyep.numerics.logfmt import logfmt_row_bytes
from anyep.transport.engine import Bytes, Transfer

if TYPE_CHECKING:
    from anyep.exchange.across import Across
    from anyep.exchange.endpoint import AddressTable, Endpoint
    from anyep.exchange.returning import Returning


class Terms(NamedTuple):
    """Rows that a forwarder reads for one source: entries [n, W] that it sums, or ``numbers`` [n] that it copies.

    A row's number is ``rank * ROWS_A_RANK + row``.
    """

    num_rows: int
    entries: tuple[int, int, int, int]
    """width, by rank, where ranks and rows of the entries lie"""
    numbers: NDArray[np.int64] | None
    kept: tuple[NDArray[np.int32], ...]
    """what the addresses point into"""


ROWS_A_RANK = 1 << 31
"""Row numbers are int32: no rank has more."""


def each_by_itself(back: Returning) -> bool:
    """Whether rows cross one by one; otherwise a host's sum does."""
    by_columns = back.reduce == "column" and not back.group
    return by_columns or back.reduce == "expert" or back.handle.send.geometry.padded


def terms_of(proxy: Proxy, back: Returning, moved_rows: NDArray[np.int32] | None) -> Terms:
    """Return what a forwarder sends back for one source."""
    plan = proxy.plan
    ranks = plan.words(plan.entry_rank_addr, plan.num_tokens * plan.width)
    rows = plan.words(plan.entry_row_addr, plan.num_tokens * plan.width) if moved_rows is None else moved_rows
    if each_by_itself(back):
        named = np.flatnonzero(ranks >= 0)
        numbers = ranks[named].astype(np.int64) * ROWS_A_RANK + rows[named]
        return Terms(num_rows=len(numbers), entries=(0, 0, 0, 0), numbers=numbers, kept=())
    entries = (plan.width, int(back.reduce == "rank"), address_of(ranks), address_of(rows))
    return Terms(num_rows=plan.num_tokens, entries=entries, numbers=None, kept=(ranks, rows))


def crossing_row_bytes(end: Endpoint, back: Returning) -> int:
    """Return the bytes of a row as it crosses."""
    return back.row_bytes if back.wire == "none" else logfmt_row_bytes(end.hidden)


def rows_a_chunk(row_bytes: int) -> int:
    """Return how many rows cross in one message."""
    return max(1, CHUNK_BYTES // row_bytes)


class SumsOut:
    """The stream from a forwarder back to one source."""

    def __init__(
        self,
        end: Endpoint,
        across: Across,
        back: Returning,
        proxy: Proxy,
        terms: Terms,
        lent: AddressTable,
        epoch: int,
    ) -> None:
        self._end = end
        self._across = across
        self._back = back
        self._proxy = proxy
        self._terms = terms
        self._lent = lent
        self._epoch = epoch
        self._row_bytes = crossing_row_bytes(end, back)
        self._chunk_rows = rows_a_chunk(self._row_bytes)
        self._num_chunks = -(-terms.num_rows // self._chunk_rows)
        self._next = 0 if back.topk_weights is None else -1
        self._box = Outbox(across.transport, proxy.source, epoch)

    def advance(self) -> bool:
        moved = False
        while self._box.room() and self._next < self._num_chunks:
            if self._next < 0:
                self._send_weights()
            else:
                self._send_chunk(self._next)
            self._next += 1
            moved = True
            if self._next == self._num_chunks:  # everything was read
                post_done(self._end, self._across, self._proxy, self._epoch)
        return moved

    def pending(self) -> list[Transfer]:
        return self._box.pending()

    def _send_weights(self) -> None:
        end, terms = self._end, self._terms
        num_bytes = 4 * end.num_topk * terms.num_rows
        memory = self._box.memory(num_bytes)
        table_addr, out_addr = self._lent.addr[1], address_of(memory)
        if terms.numbers is not None:
            self._copy(0, terms.num_rows, 4 * end.num_topk, table_addr, out_addr)
        else:
            end.kernels.reduce_weights(end.num_topk, 0, terms.num_rows, *terms.entries, table_addr, out_addr)
        self._send(WEIGHTS, 0, memory, num_bytes)

    def _send_chunk(self, number: int) -> None:
        end, terms, row_bytes, table_addr = self._end, self._terms, self._row_bytes, self._lent.addr[0]
        begin = number * self._chunk_rows
        last = min(begin + self._chunk_rows, terms.num_rows)
        memory = self._box.memory((last - begin) * row_bytes)
        if terms.numbers is not None:
            self._copy(begin, last, row_bytes, table_addr, address_of(memory))
        else:
            out_addr = address_of(memory) - begin * row_bytes  # the kernel counts rows from 0
            element = int(ELEMENTS[self._back.y.dtype])
            end.kernels.reduce(element, end.hidden, begin, last, *terms.entries, table_addr, 0, 0, 0, out_addr)
        self._send(DATA, number, memory, (last - begin) * row_bytes)

    def _send(self, kind: int, number: int, memory: Bytes, num_bytes: int) -> None:
        """Send what was read, unless a lender gave up and may have written over it: the origin cannot see that."""
        self._end.kernels.fence()
        self._across.transport.check(self._epoch, f"combine {self._epoch}")
        self._box.send(kind, number, memory, num_bytes)

    def _copy(self, first: int, last: int, row_bytes: int, table_addr: int, out_addr: int) -> None:
        """Copy rows [first, last) as they are."""
        assert self._terms.numbers is not None
        numbers = self._terms.numbers[first:last]
        ranks = self._end.num_ranks
        self._end.kernels.gather(
            row_bytes, len(numbers), address_of(numbers), 8, ROWS_A_RANK, ranks, table_addr, out_addr
        )


class SumsIn:
    """The stream from one other host back to the origin: rows [n, H], and weights [n, K], in token order."""

    def __init__(self, end: Endpoint, across: Across, back: Returning, host: int, num_rows: int, epoch: int) -> None:
        self._row_bytes = crossing_row_bytes(end, back)
        self._num_rows = num_rows
        self._chunk_rows = rows_a_chunk(self._row_bytes)
        self._num_chunks = -(-num_rows // self._chunk_rows)
        self.rows: Bytes = np.empty(num_rows * self._row_bytes, np.uint8)
        self.weights: Bytes = np.empty(0 if back.topk_weights is None else 4 * end.num_topk * num_rows, np.uint8)
        self._box = Inbox(across.transport, across.hosts.forwarder(end.rank, host), epoch)
        if self.weights.size:
            self._box.ask(WEIGHTS, 0, self.weights)
        self._asked = 0
        self._ask()

    def advance(self) -> bool:
        moved = False
        while self._box.take() is not None:
            self._ask()
            moved = True
        return moved

    def pending(self) -> list[Transfer]:
        return self._box.pending()

    def _ask(self) -> None:
        """Let pieces arrive where they stay."""
        while self._asked < self._num_chunks and self._box.room():
            begin = self._asked * self._chunk_rows
            end = min(begin + self._chunk_rows, self._num_rows)
            self._box.ask(DATA, self._asked, self.rows[begin * self._row_bytes : end * self._row_bytes])
            self._asked += 1


def rows_from(crossing: Crossing, back: Returning, host: int) -> int:
    """Return how many rows come back from ``host``."""
    if not each_by_itself(back):
        return int(crossing.tokens_M[host])
    return int((crossing.copies_M if back.reduce == "column" else crossing.rows_M)[host])
