"""Combine between hosts, at the origin: a host's rows of its tokens, piece by piece, each only until it is summed.

A *supply* brings one host's rows of this rank's tokens in token order: over the network (:class:`SumsIn`), or summed
here, as if they had crossed (:class:`SumsHere`). :class:`Summing` adds up whatever tokens all supplies have reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from anyep.exchange.courier import DATA, Inbox, piece_memory
from anyep.exchange.sums_out import BackRow
from anyep.layout.pieces import cut_tokens
from anyep.machine.addresses import address_of
from anyep.transport.base import Words
from anyep.transport.engine import Bytes, Transfer

if TYPE_CHECKING:
    from anyep.exchange.across import Across


class Cuts(NamedTuple):
    """How a supply's rows are cut: the first token of each piece, then T, and the same in rows."""

    tokens: list[int]
    rows: list[int]

    @property
    def num_pieces(self) -> int:
        return len(self.tokens) - 1 if self.rows[-1] else 0


def cut(rows_T: NDArray[np.int64], row: BackRow, chunk_bytes: int) -> Cuts:
    """Cut a host's rows of this rank's tokens, ``rows`` [T], as their forwarder does."""
    tokens = cut_tokens(rows_T, row.most_rows(chunk_bytes))
    before = np.concatenate([[0], np.cumsum(rows_T)])
    return Cuts(tokens, before[tokens].tolist())


class Piece(NamedTuple):
    """Where row 0 and its weights would lie if the rows of tokens up to ``last_token`` were here."""

    rows_addr: int
    weights_addr: int
    last_token: int


class Supply(Protocol):
    """One host's rows."""

    def next(self) -> Piece | None:
        """Let go of the piece before, and return the next one; None while it is not here."""
        ...


class SumsIn:
    """The stream from one other host; a part of the operation (exchange/courier.py)."""

    def __init__(self, across: Across, forwarder: int, row: BackRow, cuts: Cuts, epoch: int) -> None:
        self._row = row
        self._cuts = cuts
        self._box = Inbox(across, forwarder, epoch)
        self._kept: Bytes | None = None
        self._asked = self._taken = 0
        self._ask()

    def next(self) -> Piece | None:
        if self._kept is not None:
            self._box.give_back(self._kept)
            self._kept = None
            self._ask()
        self._kept = self._box.take()
        if self._kept is None:
            return None
        begin, end = self._cuts.rows[self._taken], self._cuts.rows[self._taken + 1]
        self._taken += 1
        first, row = address_of(self._kept), self._row
        weights_addr = first + row.weights_offset(end - begin) - begin * row.weights
        return Piece(first - begin * row.row, weights_addr, self._cuts.tokens[self._taken])

    def advance(self) -> bool:
        return False  # pieces are taken when it is their turn

    def pending(self) -> list[Transfer]:
        return self._box.pending()

    def _ask(self) -> None:
        while self._asked < self._cuts.num_pieces and self._box.room():
            num_rows = self._cuts.rows[self._asked + 1] - self._cuts.rows[self._asked]
            self._box.ask(DATA, self._asked, self._row.piece_bytes(num_rows))
            self._asked += 1


Sum = Callable[[int, int, int, int], None]
"""Sum rows [first, last) of a host: (first, last, where row ``first`` goes, where its weights go)."""


class SumsHere:
    """Sums of a host whose rows can be read here."""

    def __init__(self, row: BackRow, cuts: Cuts, add_up: Sum) -> None:
        self._row = row
        self._cuts = cuts
        self._add_up = add_up
        self._taken = 0
        most = max(np.diff(cuts.rows).tolist(), default=0)
        self._memory = piece_memory(row.piece_bytes(most))

    def next(self) -> Piece:
        begin, end = self._cuts.rows[self._taken], self._cuts.rows[self._taken + 1]
        self._taken += 1
        first, row = address_of(self._memory), self._row
        weights_addr = first + row.weights_offset(end - begin)
        self._add_up(begin, end, first, weights_addr)
        return Piece(first - begin * row.row, weights_addr - begin * row.weights, self._cuts.tokens[self._taken])


class Summing:
    """The part that sums tokens as soon as all hosts' rows of them are here."""

    def __init__(
        self,
        num_tokens: int,
        supplies: Mapping[int, Supply],
        tables: tuple[Words, Words],
        first_host: int,
        add_up: Callable[[int, int], None],
        begin: Callable[[], bool],
    ) -> None:
        """``tables``: of rows and of weights, [R + M]; host h stands at ``first_host`` + h in them.

        ``add_up``: sum tokens [first, last). ``begin``: whether everything else is here that sums take.
        """
        self._num_tokens = num_tokens
        self._supplies = supplies
        self._rows_table, self._weights_table = tables
        self._first_host = first_host
        self._add_up = add_up
        self._may_begin = begin
        self._reached = dict.fromkeys(supplies, 0)
        self._next = 0

    def advance(self) -> bool:
        moved = False
        if self._next == 0 and not self._may_begin():
            return False
        while self._next < self._num_tokens and self._reach():
            last = min(self._reached.values(), default=self._num_tokens)
            self._add_up(self._next, last)
            self._next = last
            moved = True
        return moved

    def pending(self) -> list[Transfer]:
        return []

    def _reach(self) -> bool:
        """Go on to the next piece of every supply that has none for the next token; return whether all were here."""
        for host, supply in self._supplies.items():
            if self._reached[host] > self._next:
                continue
            piece = supply.next()
            if piece is None:
                return False
            self._rows_table[self._first_host + host] = piece.rows_addr
            self._weights_table[self._first_host + host] = piece.weights_addr
            self._reached[host] = piece.last_token
        return True
