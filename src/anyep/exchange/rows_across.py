"""Dispatch between hosts: a token's routing first, then rows in pieces, which the forwarder writes where they belong.

A stream from one rank to one host: one message with the routing of all tokens that cross (topk_idx in the experts' own
numbers, weights, token numbers), then messages of up to CHUNK_BYTES with x and scales, in token order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anyep.exchange.across import CHUNK_BYTES
from anyep.exchange.courier import DATA, ROUTING, Inbox, Outbox
from anyep.exchange.crossing import Crossing, address_of
from anyep.exchange.proxy import Proxy, make_proxy, routing_row
from anyep.exchange.scatter import Route
from anyep.layout.regions import RowBytes, row_region
from anyep.transport.base import Words
from anyep.transport.engine import Bytes, Transfer

if TYPE_CHECKING:
    from anyep.exchange.across import Across
    from anyep.exchange.endpoint import AddressTable, Endpoint
    from anyep.exchange.geometry import Geometry
    from anyep.exchange.outgoing import Outgoing


def tokens_a_chunk(row: RowBytes) -> int:
    """Return how many tokens cross in one message."""
    return max(1, CHUNK_BYTES // max(1, row.x + row.scales))


def data_row(geometry: Geometry) -> RowBytes:
    """Return what crosses in pieces."""
    return RowBytes(x=geometry.row.x, scales=geometry.row.scales, topk_idx=0, topk_weights=0, token=0, y=0)


class RowsOut:
    """The stream of one rank's tokens to one host."""

    def __init__(self, end: Endpoint, across: Across, out: Outgoing, crossing: Crossing, host: int, epoch: int) -> None:
        self._end = end
        self._out = out
        self._crossing = crossing
        self._host = host
        self._tokens = crossing.tokens_for(host)
        self._row = data_row(out.geometry)
        self._chunk_tokens = tokens_a_chunk(self._row)
        self._num_chunks = -(-len(self._tokens) // self._chunk_tokens)
        self._routing = routing_row(out.geometry, cached=out.cached is not None)
        self._next = -1 if row_region(self._routing, len(self._tokens)).routing_bytes else 0
        self._box = Outbox(across.transport, across.hosts.forwarder(end.rank, host), epoch)

    def advance(self) -> bool:
        moved = False
        while self._box.room() and self._next < self._num_chunks:
            if self._next < 0:
                self._send_routing()
            else:
                self._send_chunk(self._next)
            self._next += 1
            moved = True
        return moved

    def pending(self) -> list[Transfer]:
        return self._box.pending()

    def _table(self, address: int) -> tuple[Words, int]:
        """Return a peer table by host, with an address for this one alone."""
        table_M = np.zeros(len(self._crossing.tokens_M), np.int64)
        table_M[self._host] = address
        return table_M, address_of(table_M)

    def _entries(self) -> Route:
        crossing = self._crossing
        ranks, slots = address_of(crossing.entry_host_TW), address_of(crossing.entry_slot_TW)
        return Route(crossing.width, ranks, slots, by_expert=0)

    def _send_routing(self) -> None:
        end, out, across = self._end, self._out, self._end.across
        assert across is not None
        region = row_region(self._routing, len(self._tokens))
        memory = self._box.memory(region.routing_bytes)
        first, entries = address_of(memory), self._entries()
        weights = out.topk_weights.data_ptr() if self._routing.topk_weights and out.topk_weights is not None else 0
        idx_table, idx_addr = self._table(first)
        weights_table, weights_addr = self._table(first + region.weights_offset)
        token_table, token_addr = self._table(first + region.token_offset)
        end.kernels.scatter_routing(
            out.plan.idx_addr,
            out.plan.idx_bytes,
            weights,
            0,
            out.plan.num_tokens,
            end.num_topk,
            entries.width,
            0,
            address_of(across.host_E),
            address_of(across.number_E),
            entries.entry_rank_addr,
            entries.entry_row_addr,
            idx_addr if self._routing.topk_idx else 0,
            weights_addr,
            token_addr if self._routing.token else 0,
        )
        del idx_table, weights_table, token_table  # kept until here: the kernel read them
        self._box.send(ROUTING, 0, memory, region.routing_bytes)

    def _send_chunk(self, number: int) -> None:
        end, rows, row = self._end, self._out.rows, self._row
        begin = number * self._chunk_tokens
        tokens = self._tokens[begin : begin + self._chunk_tokens]
        region = row_region(row, len(tokens))
        memory = self._box.memory(region.data_bytes)
        first, (width, ranks, slots, _) = address_of(memory), self._entries()
        x_table, x_addr = self._table(first - begin * row.x)  # slots count from the first token that crosses
        scales_table, scales_addr = self._table(first + region.scales_offset - begin * row.scales)
        span = (int(tokens[0]), int(tokens[-1]) + 1, width, ranks, slots)
        if rows.quantise_from is not None:
            element = int(rows.quantise_from)
            end.kernels.quantise_scatter(
                rows.x.data_ptr(), element, end.hidden, end.scale_code, *span, x_addr, scales_addr
            )
        else:
            end.kernels.scatter(rows.x.data_ptr(), row.x, *span, x_addr)
        if rows.scales is not None:
            end.kernels.scatter(rows.scales.data_ptr(), row.scales, *span, scales_addr)
        end.kernels.fence()
        del x_table, scales_table  # kept until here: the kernels read them
        self._box.send(DATA, number, memory, region.data_bytes)


class RowsIn:
    """The stream of one source of another host at its forwarder here."""

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
        self._row = data_row(geometry)
        self._chunk_tokens = tokens_a_chunk(self._row)
        self._num_chunks = -(-num_tokens // self._chunk_tokens)
        self._routing = routing_row(geometry, cached=known is not None)
        routing_bytes = row_region(self._routing, num_tokens).routing_bytes
        self._box = Inbox(across.transport, source, epoch)
        self._asked = 0
        self._routed = routing_bytes == 0
        self._written = 0
        if routing_bytes:
            self._box.ask(ROUTING, 0, np.empty(routing_bytes, np.uint8))
        else:
            self._settle(None)
        self._ended = False

    def advance(self) -> bool:
        moved = False
        self._ask()
        while (message := self._box.take()) is not None:
            if self._routed:
                self._write(message)
            else:
                self._settle(message)
                self._routed = True
            self._ask()
            moved = True
        if self._routed and self._written == self._num_chunks and not self._ended:
            self._end_it()
            moved = True
        return moved

    def pending(self) -> list[Transfer]:
        return self._box.pending()

    def _ask(self) -> None:
        while self._asked < self._num_chunks and self._box.room():
            count = min(self._chunk_tokens, self._num_tokens - self._asked * self._chunk_tokens)
            self._box.ask(DATA, self._asked, np.empty(row_region(self._row, count).data_bytes, np.uint8))
            self._asked += 1

    def _settle(self, routing: Bytes | None) -> None:
        """Learn where the rows go, and write the routing there."""
        end, geometry = self._end, self._geometry
        if self.proxy is None:
            self.proxy = make_proxy(end, geometry, self._source, self._num_tokens, routing, self._opened_RW)
        plan, places = self.proxy.plan, self._places.addr
        region = row_region(self._routing, self._num_tokens)
        weights_addr = address_of(routing) + region.weights_offset if routing is not None else 0
        end.kernels.scatter_routing(
            plan.idx_addr,
            plan.idx_bytes,
            weights_addr if self._routing.topk_weights else 0,
            0,
            plan.num_tokens,
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
        if self.proxy.tokens is not None:
            span = (0, plan.num_tokens, plan.width, plan.entry_rank_addr, plan.entry_row_addr)
            end.kernels.scatter(address_of(self.proxy.tokens), 4, *span, places[4])

    def _write(self, message: Bytes) -> None:
        """Write a piece's rows where they belong."""
        assert self.proxy is not None
        end, plan, row, places = self._end, self.proxy.plan, self._row, self._places.addr
        begin = self._written * self._chunk_tokens
        count = min(self._chunk_tokens, self._num_tokens - begin)
        first, region = address_of(message), row_region(row, count)
        span = (begin, begin + count, plan.width, plan.entry_rank_addr, plan.entry_row_addr)
        end.kernels.scatter(first - begin * row.x, row.x, *span, places[0])
        if row.scales:
            end.kernels.scatter(first + region.scales_offset - begin * row.scales, row.scales, *span, places[1])
        end.kernels.fence()
        self._written += 1

    def _end_it(self) -> None:
        """Tell the receivers in the source's name."""
        assert self.proxy is not None
        self._ended = True
        post_done(self._end, self._across, self.proxy, self._epoch)


def post_done(end: Endpoint, across: Across, proxy: Proxy, epoch: int) -> None:
    """Say to this host's ranks, in a source's name, that its rows are written, or read."""
    rows_R = proxy.plan.numbers("rank_rows")
    to_R = np.flatnonzero(rows_R > 0).astype(np.int64)
    across.transport.post_for(proxy.source, end.lanes.done, epoch, np.zeros((end.num_ranks, 1), np.int64), to_R)
