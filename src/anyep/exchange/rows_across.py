"""Dispatch between hosts, on its way out: where a stream's tokens go first, then the tokens in pieces.

A stream from one rank to one host, in token order: messages with topk_idx of all tokens that cross, in the experts' own
numbers (not in a cached dispatch); then pieces of x, scales, weights and token numbers. exchange/rows_in.py takes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anyep.exchange.courier import DATA, ROUTING, Outbox
from anyep.exchange.crossing import Crossing
from anyep.exchange.scatter import Route
from anyep.layout.pieces import pack_rows, rows_a_piece
from anyep.layout.regions import RowBytes
from anyep.machine.addresses import address_of
from anyep.transport.base import Words
from anyep.transport.engine import Bytes, Transfer

if TYPE_CHECKING:
    from anyep.exchange.across import Across
    from anyep.exchange.endpoint import Endpoint
    from anyep.exchange.geometry import Geometry
    from anyep.exchange.outgoing import Outgoing


def crossing_row(geometry: Geometry, *, cached: bool) -> RowBytes:
    """Return what crosses in pieces: token numbers only if the forwarder does not know them yet."""
    row = geometry.row
    token = 0 if cached else row.token
    return RowBytes(x=row.x, scales=row.scales, topk_idx=0, topk_weights=row.topk_weights, token=token, y=0)


def idx_row_bytes(geometry: Geometry) -> int:
    """Return the bytes of a token's columns as they cross."""
    return geometry.num_topk * geometry.key.idx_bytes


class RowsOut:
    """The stream of one rank's tokens to one host."""

    def __init__(self, end: Endpoint, across: Across, out: Outgoing, crossing: Crossing, host: int, epoch: int) -> None:
        self._end = end
        self._across = across
        self._out = out
        self._crossing = crossing
        self._host = host
        self._tokens = crossing.tokens_for(host)
        cached = out.cached is not None
        self._row = crossing_row(out.geometry, cached=cached)
        self._piece_tokens = rows_a_piece(self._row.sent, across.chunk_bytes)
        self._idx_tokens = rows_a_piece(idx_row_bytes(out.geometry), across.chunk_bytes)
        self._num_pieces = -(-len(self._tokens) // self._piece_tokens)
        self._next = 0 if cached else -len(self._tokens) // self._idx_tokens
        """routing is numbered up to -1, rows from 0 on"""
        self._first = self._next
        self._to = across.hosts.forwarder(end.rank, host)
        self._box = Outbox(across, self._to, epoch)
        self._packed: tuple[Bytes, int] | None = None
        """a piece that has not been sent: its memory, its bytes"""

    def begin(self) -> None:
        """Send routing, as much as may be on its way, and pack the first rows.

        They leave when this rank has asked for what comes to it: its words would wait behind them on the link, and did
        for up to 17 ms at 1 Gbit/s.
        """
        while self._box.room() and self._next < 0:
            self._send_routing(self._next - self._first)
            self._next += 1
        if self._next == 0 and self._num_pieces and self._box.room():
            self._packed = self._pack_rows(0)

    def advance(self) -> bool:
        moved = False
        while self._box.room() and self._next < self._num_pieces:
            if self._next < 0:
                self._send_routing(self._next - self._first)
            else:
                memory, num_bytes = self._packed or self._pack_rows(self._next)
                self._packed = None
                self._box.send(DATA, self._next, memory, num_bytes)
            self._next += 1
            moved = True
        return moved

    def pending(self) -> list[Transfer]:
        return self._box.pending()

    def sent_to(self) -> dict[int, tuple[int, int, int]]:
        """See exchange/retract.py."""
        return {self._to: (min(self._next, 0) - self._first, max(self._next, 0), 0)}

    def _table(self, address: int) -> tuple[Words, int]:
        """Return a peer table by host, with an address for this one alone."""
        table_M = np.zeros(len(self._crossing.tokens_M), np.int64)
        table_M[self._host] = address
        return table_M, address_of(table_M)

    def _entries(self) -> Route:
        crossing = self._crossing
        ranks, slots = address_of(crossing.entry_host_TW), address_of(crossing.entry_slot_TW)
        return Route(crossing.width, ranks, slots, by_expert=0)

    def _span(self, begin: int, count: int) -> tuple[int, int]:
        """Return the range of all tokens in which ``count`` that cross lie, from number ``begin`` of those on."""
        tokens = self._tokens[begin : begin + count]
        return int(tokens[0]), int(tokens[-1]) + 1

    def _send_routing(self, number: int) -> None:
        begin = number * self._idx_tokens
        count = min(self._idx_tokens, len(self._tokens) - begin)
        row_bytes = idx_row_bytes(self._out.geometry)
        memory = self._box.memory(count * row_bytes)
        idx_table, idx_addr = self._table(address_of(memory) - begin * row_bytes)  # slots count from the first token
        self._scatter_routing(self._span(begin, count), 0, idx_addr, 0, 0)
        del idx_table  # kept until here: the kernel read it
        self._box.send(ROUTING, number, memory, count * row_bytes)

    def _pack_rows(self, number: int) -> tuple[Bytes, int]:
        end, rows, row = self._end, self._out.rows, self._row
        begin = number * self._piece_tokens
        count = min(self._piece_tokens, len(self._tokens) - begin)
        piece = pack_rows(row, count)
        memory = self._box.memory(piece.num_bytes)
        first, (width, ranks, slots, _) = address_of(memory), self._entries()
        x_table, x_addr = self._table(first - begin * row.x)
        scales_table, scales_addr = self._table(first + piece.scales - begin * row.scales)
        weights_table, weights_addr = self._table(first + piece.topk_weights - begin * row.topk_weights)
        token_table, token_addr = self._table(first + piece.token - begin * row.token)
        tokens = self._span(begin, count)
        span = (*tokens, width, ranks, slots)
        if rows.quantise_from is not None:
            element = int(rows.quantise_from)
            end.kernels.quantise_scatter(
                rows.x.data_ptr(), element, end.hidden, end.scale_code, *span, x_addr, scales_addr
            )
        else:
            end.kernels.scatter(rows.x.data_ptr(), row.x, *span, x_addr)
        if rows.scales is not None:
            end.kernels.scatter(rows.scales.data_ptr(), row.scales, *span, scales_addr)
        weights = self._out.topk_weights
        if row.topk_weights or row.token:
            weights_from = weights.data_ptr() if row.topk_weights and weights is not None else 0
            self._scatter_routing(tokens, weights_from, 0, weights_addr, token_addr if row.token else 0)
        end.kernels.fence()
        del x_table, scales_table, weights_table, token_table  # kept until here: the kernels read them
        return memory, piece.num_bytes

    def _scatter_routing(
        self, tokens: tuple[int, int], weights: int, idx_table: int, weights_table: int, token_table: int
    ) -> None:
        end, plan, entries = self._end, self._out.plan, self._entries()
        end.kernels.scatter_routing(
            plan.idx_addr,
            plan.idx_bytes,
            weights,
            *tokens,
            end.num_topk,
            entries.width,
            0,
            address_of(self._across.host_E),
            address_of(self._across.number_E),
            entries.entry_rank_addr,
            entries.entry_row_addr,
            idx_table,
            weights_table,
            token_table,
        )
