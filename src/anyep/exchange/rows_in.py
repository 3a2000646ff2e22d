"""Dispatch between hosts, at the forwarder: what one source of another host sends, written where it belongs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anyep.exchange.courier import DATA, ROUTING, Inbox
from anyep.exchange.proxy import Proxy, make_proxy
from anyep.exchange.rows_across import crossing_row, idx_row_bytes
from anyep.layout.pieces import pack_rows, rows_a_piece
from anyep.machine.addresses import address_of
from anyep.transport.base import Words
from anyep.transport.engine import Bytes, Transfer

if TYPE_CHECKING:
    from anyep.exchange.across import Across
    from anyep.exchange.desk import AddressTable
    from anyep.exchange.endpoint import Endpoint
    from anyep.exchange.geometry import Geometry


class RowsIn:
    """The stream of one source of another host at its forwarder here (exchange/rows_across.py)."""

    def __init__(
        self,
        end: Endpoint,
        across: Across,
        geometry: Geometry,
        source: int,
        num_tokens: int,
        epoch: int,
        *,
        opened_RW: Words,
        places: AddressTable,
        known: Proxy | None,
    ) -> None:
        self._end = end
        self._across = across
        self._geometry = geometry
        self._source = source
        self._num_tokens = num_tokens
        self._epoch = epoch
        self._opened_RW = opened_RW
        self._places = places
        self.proxy = known
        self._row = crossing_row(geometry, cached=known is not None)
        self._piece_tokens = rows_a_piece(self._row.sent, across.chunk_bytes)
        self._num_pieces = -(-num_tokens // self._piece_tokens)
        self._box = Inbox(across, source, epoch)
        self._routing = np.empty(0 if known is not None else num_tokens * idx_row_bytes(geometry), np.uint8)
        """what comes first, all of it: a plan is made of whole batches"""
        idx_bytes = rows_a_piece(idx_row_bytes(geometry), across.chunk_bytes) * idx_row_bytes(geometry)
        self._idx_pieces = [self._routing[at : at + idx_bytes] for at in range(0, self._routing.size, idx_bytes)]
        self._asked = self._taken = -len(self._idx_pieces)
        """routing is numbered up to -1, rows from 0 on"""
        self._ended = False
        self._ask()

    def advance(self) -> bool:
        moved = False
        self._ask()
        while (message := self._box.take()) is not None:
            if self._taken < 0:
                self._box.give_back(None)
            else:
                self._write(message)
                self._box.give_back(message)
            self._taken += 1
            self._ask()
            moved = True
        if self._taken == self._num_pieces and not self._ended:
            self._ended = True
            assert self.proxy is not None
            post_done(self._end, self._across, self.proxy, self._epoch)
            moved = True
        return moved

    def pending(self) -> list[Transfer]:
        return self._box.pending()

    def _ask(self) -> None:
        while self._asked < self._num_pieces and self._box.room():
            if self._asked < 0:
                self._box.ask_into(ROUTING, self._asked + len(self._idx_pieces), self._idx_pieces[self._asked])
            else:
                begin = self._asked * self._piece_tokens
                count = min(self._piece_tokens, self._num_tokens - begin)
                self._box.ask(DATA, self._asked, pack_rows(self._row, count).num_bytes)
            self._asked += 1

    def _write(self, message: Bytes) -> None:
        """Write a piece's rows, with their routing, where they belong."""
        proxy = self._known_proxy()
        end, plan, row, places = self._end, proxy.plan, self._row, self._places.addr
        begin = self._taken * self._piece_tokens
        count = min(self._piece_tokens, self._num_tokens - begin)
        first, piece = address_of(message), pack_rows(row, count)
        span = (begin, begin + count, plan.width, plan.entry_rank_addr, plan.entry_row_addr)
        end.kernels.scatter(first - begin * row.x, row.x, *span, places[0])
        if row.scales:
            end.kernels.scatter(first + piece.scales - begin * row.scales, row.scales, *span, places[1])
        if row.topk_weights or self._geometry.row.topk_idx:
            self._write_routing(begin, count, first + piece.topk_weights - begin * row.topk_weights)
        if proxy.tokens is not None:
            if row.token:
                proxy.tokens[begin : begin + count] = message[piece.token : piece.token + 4 * count].view(np.int32)
            end.kernels.scatter(address_of(proxy.tokens), 4, *span, places[4])
        end.kernels.fence()

    def _known_proxy(self) -> Proxy:
        """Learn where the rows go, once."""
        if self.proxy is None:
            self.proxy = make_proxy(
                self._end, self._geometry, self._source, self._num_tokens, self._routing, self._opened_RW
            )
            self._routing = np.empty(0, np.uint8)
            self._idx_pieces = []
        return self.proxy

    def _write_routing(self, begin: int, count: int, weights_addr: int) -> None:
        assert self.proxy is not None
        end, geometry, plan, places = self._end, self._geometry, self.proxy.plan, self._places.addr
        end.kernels.scatter_routing(
            plan.idx_addr,
            plan.idx_bytes,
            weights_addr if self._row.topk_weights else 0,
            begin,
            begin + count,
            end.num_topk,
            plan.width,
            int(geometry.by_expert),
            end.tables.rank_addr,
            end.tables.local_addr,
            plan.entry_rank_addr,
            plan.entry_row_addr,
            places[2] if geometry.row.topk_idx else 0,
            places[3],
            0,
        )


def post_done(end: Endpoint, across: Across, proxy: Proxy, epoch: int) -> None:
    """Say to this host's ranks, in a source's name, that its rows are written, or read."""
    rows_R = proxy.plan.numbers("rank_rows")
    to_R = np.flatnonzero(rows_R > 0).astype(np.int64)
    across.transport.post_for(proxy.source, end.lanes.done, epoch, np.zeros((end.num_ranks, 1), np.int64), to_R)
