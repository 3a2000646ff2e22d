"""Combine between hosts, at the forwarder: it sums a token's rows of its host, or collects them, and sends them back.

By default a host's rows of a token become one row (summed in fp32, rounded once, as it travels). Where sums must not
depend on where experts live (``reduce="expert"``), or the origin multiplies with weights, each row crosses by itself.
Rows cross in pieces of whole tokens, and weights that travel back beside their rows; exchange/sums_in.py takes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyep.exchange.courier import DATA, Outbox
from anyep.exchange.proxy import Proxy
from anyep.exchange.rows_in import post_done
from anyep.exchange.wire import ELEMENTS
from anyep.layout.pieces import cut_tokens, rows_a_piece
from anyep.layout.regions import aligned
from anyep.machine.addresses import address_of
from anyep.numerics.logfmt import logfmt_row_bytes
from anyep.transport.engine import Transfer

if TYPE_CHECKING:
    from anyep.exchange.across import Across
    from anyep.exchange.desk import AddressTable
    from anyep.exchange.endpoint import Endpoint
    from anyep.exchange.returning import Returning

ROWS_A_RANK = 1 << 31
"""Row numbers are int32: no rank has more."""


class BackRow(NamedTuple):
    """Bytes of a row as it crosses back, and of the weights beside it. In a piece all weights follow all rows."""

    row: int
    weights: int

    def weights_offset(self, num_rows: int) -> int:
        """Return where the weights of a piece of so many rows begin."""
        return aligned(num_rows * self.row) if self.weights else num_rows * self.row

    def piece_bytes(self, num_rows: int) -> int:
        return self.weights_offset(num_rows) + num_rows * self.weights

    def most_rows(self, chunk_bytes: int) -> int:
        """Return how many rows a piece has at most, unless a single token has more."""
        return rows_a_piece(self.row + self.weights, chunk_bytes)


def back_row(end: Endpoint, back: Returning) -> BackRow:
    row = back.way.row_bytes if back.way.wire == "none" else logfmt_row_bytes(end.hidden)
    return BackRow(row, 0 if back.topk_weights is None else 4 * end.num_topk)


def each_by_itself(back: Returning) -> bool:
    """Whether rows cross one by one; otherwise a host's sum does."""
    by_columns = back.way.reduce == "column" and not back.way.group
    return by_columns or back.way.reduce == "expert" or back.handle.send.geometry.padded


class Terms(NamedTuple):
    """Rows that a forwarder reads for one source: entries [n, W] that it sums, or ``numbers`` [m] that it copies.

    A row's number is ``rank * ROWS_A_RANK + row``.
    """

    rows_n: NDArray[np.int64]
    """how many rows cross for each token"""
    entries: tuple[int, int, int, int]
    """width, by rank, where ranks and rows of the entries lie"""
    numbers: NDArray[np.int64] | None
    kept: tuple[NDArray[np.int32], ...]
    """what the addresses point into"""


def terms_of(proxy: Proxy, back: Returning, moved_rows: NDArray[np.int32] | None) -> Terms:
    """Return what a forwarder sends back for one source."""
    plan = proxy.plan
    ranks = plan.words(plan.entry_rank_addr, plan.num_tokens * plan.width)
    rows = plan.words(plan.entry_row_addr, plan.num_tokens * plan.width) if moved_rows is None else moved_rows
    if each_by_itself(back):
        named = np.flatnonzero(ranks >= 0)
        numbers = ranks[named].astype(np.int64) * ROWS_A_RANK + rows[named]
        rows_n = (plan.entry_ranks() >= 0).sum(axis=1)
        return Terms(rows_n=rows_n, entries=(0, 0, 0, 0), numbers=numbers, kept=())
    entries = (plan.width, int(back.way.reduce == "rank"), address_of(ranks), address_of(rows))
    return Terms(rows_n=np.ones(plan.num_tokens, np.int64), entries=entries, numbers=None, kept=(ranks, rows))


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
        self._row = back_row(end, back)
        edges = cut_tokens(terms.rows_n, self._row.most_rows(across.chunk_bytes))
        before = np.concatenate([[0], np.cumsum(terms.rows_n)])
        self._edges: list[int] = before[edges].tolist()
        """the first row of each piece, and how many there are"""
        self._num_pieces = len(edges) - 1 if self._edges[-1] else 0
        self._next = 0
        self._box = Outbox(across, proxy.source, epoch)

    def advance(self) -> bool:
        moved = False
        while self._box.room() and self._next < self._num_pieces:
            self._send(self._next)
            self._next += 1
            moved = True
            if self._next == self._num_pieces:  # everything was read
                post_done(self._end, self._across, self._proxy, self._epoch)
        return moved

    def pending(self) -> list[Transfer]:
        return self._box.pending()

    def _send(self, number: int) -> None:
        """Send a piece, unless a lender gave up and may have written over it: the origin cannot see that."""
        first, last = self._edges[number], self._edges[number + 1]
        memory = self._box.memory(self._row.piece_bytes(last - first))
        rows_addr = address_of(memory)
        weights_addr = rows_addr + self._row.weights_offset(last - first)
        if self._terms.numbers is not None:
            self._copy(first, last, self._row.row, self._lent.addr[0], rows_addr)
            if self._row.weights:
                self._copy(first, last, self._row.weights, self._lent.addr[1], weights_addr)
        else:
            self._reduce(first, last, rows_addr, weights_addr)
        self._end.kernels.fence()
        self._across.transport.check(self._epoch, f"combine {self._epoch}")
        self._box.send(DATA, number, memory, self._row.piece_bytes(last - first))

    def _reduce(self, first: int, last: int, rows_addr: int, weights_addr: int) -> None:
        """Sum the rows of tokens [first, last), one row each. Kernels count from token 0."""
        end, entries, (rows_table, weights_table) = self._end, self._terms.entries, self._lent.addr
        element, out_addr = int(ELEMENTS[self._back.y.dtype]), rows_addr - first * self._row.row
        end.kernels.reduce(element, end.hidden, first, last, *entries, rows_table, 0, 0, 0, out_addr)
        if self._row.weights:
            out_addr = weights_addr - first * self._row.weights
            end.kernels.reduce_weights(end.num_topk, first, last, *entries, weights_table, out_addr)

    def _copy(self, first: int, last: int, row_bytes: int, table_addr: int, out_addr: int) -> None:
        """Copy rows [first, last) as they are."""
        assert self._terms.numbers is not None
        numbers = self._terms.numbers[first:last]
        ranks = self._end.num_ranks
        self._end.kernels.gather(
            row_bytes, len(numbers), address_of(numbers), 8, ROWS_A_RANK, ranks, table_addr, out_addr
        )
