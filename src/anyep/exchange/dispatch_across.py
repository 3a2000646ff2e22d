"""Dispatch between hosts, at a rank that is a forwarder too: its rows to other hosts, theirs to its neighbours.

Rows that go straight to a rank of another host lie in their messages as eager rows lie in a slot: the same kernels
write and unpack them.
"""

from __future__ import annotations

import numpy as np

from anyep.exchange import ledger
from anyep.exchange.across import Across
from anyep.exchange.courier import Part, carry, piece_memory
from anyep.exchange.crossing import address_of
from anyep.exchange.endpoint import Desk, Endpoint
from anyep.exchange.opening import BODY
from anyep.exchange.outgoing import Outgoing
from anyep.exchange.proxy import Proxy
from anyep.exchange.rows_across import RowsOut
from anyep.exchange.rows_in import RowsIn
from anyep.exchange.rows_near import RowsNear
from anyep.exchange.straight import StraightIn, StraightOut, straight_sources
from anyep.layout.pieces import pack_rows
from anyep.transport.base import Words


class DispatchAcross:
    """One dispatch of one rank, as far as it crosses. It keeps what came straight until that is unpacked."""

    def __init__(self, end: Endpoint, across: Across, out: Outgoing, epoch: int) -> None:
        assert out.plan.crossing is not None, "plans of several hosts have one"
        self._end = end
        self._across = across
        self._out = out
        self._crossing = out.plan.crossing
        self._epoch = epoch
        self._rows_out: list[RowsOut] = []
        self._straight_out: StraightOut | None = None
        self._straight_in: StraightIn | None = None
        self.proxies: tuple[Proxy, ...] = ()
        """ranks of other hosts for which this rank forwards"""
        self.straight_from: tuple[int, ...] = ()
        """ranks of other hosts whose rows came straight"""

    def open(self, desk: Desk) -> bool:
        """Let rows that go straight be written into their messages like eager ones; False where there are none."""
        rows_R, row = self._out.plan.numbers("rank_rows"), self._out.geometry.eager_row
        packed = {rank: pack_rows(row, int(rows_R[rank])) for rank in self._crossing.straight_ranks}
        if not packed:
            return False
        sizes = {rank: one.num_bytes for rank, one in packed.items()}
        self._straight_out = StraightOut(self._across.transport, sizes, self._epoch)
        for rank, memory in self._straight_out.memory.items():
            desk.eager.values[:, rank] = address_of(memory) + np.array(packed[rank].parts())
        return True

    def begin(self) -> None:
        """Send other hosts what needs no answer: the routing, and as many rows as may be on their way."""
        end, across, crossing = self._end, self._across, self._crossing
        if self._straight_out is not None:
            self._straight_out.send()
            end.counters.add(straight_rows=int(self._out.plan.numbers("rank_rows")[crossing.straight_ranks].sum()))
        self._rows_out = [
            RowsOut(end, across, self._out, crossing, host, self._epoch)
            for host in across.hosts.far_hosts(end.rank)
            if crossing.tokens_M[host] and not crossing.straight_M[host]
        ]
        for part in self._rows_out:
            part.advance()

    def cross(self, opened_RW: Words, desk: Desk, near: RowsNear | None, step: str) -> None:
        """Send the rest, pass on what comes to this host's ranks, and write them ``near``, this rank's own."""
        incoming = self._rows_in(opened_RW, desk)
        straight = self._straight_in = self._await_straight(opened_RW)
        parts: list[Part] = [*self._rows_out, *incoming, straight]
        parts += [part for part in (self._straight_out, near) if part is not None]
        carry(parts, self._across.transport, self._epoch, step)
        self._find_straight(desk, straight)
        self._rows_out, self._straight_out = [], None
        self.proxies = tuple(part.proxy for part in incoming if part.proxy is not None)

    def _rows_in(self, opened_RW: Words, desk: Desk) -> list[RowsIn]:
        end, across, cached = self._end, self._across, self._out.cached
        known = {} if cached is None else {proxy.source: proxy for proxy in cached.proxies}
        return [
            RowsIn(
                end,
                across,
                end.geometry_of(self._out.geometry.key, source),
                source,
                int(opened_RW[source, BODY + ledger.WAY]),
                self._epoch,
                opened_RW=opened_RW,
                places=desk.forwarded,
                known=known.get(source),
            )
            for source in across.hosts.sources_of(end.rank)
            if opened_RW[source, BODY + ledger.WAY] > 0
        ]

    def _await_straight(self, opened_RW: Words) -> StraightIn:
        """Ask for the rows of other hosts' ranks that come straight."""
        rows_R, row = self._out.plan.numbers("source_rows"), self._out.geometry.eager_row
        self.straight_from = tuple(straight_sources(self._across, opened_RW, rows_R))
        memory = {source: piece_memory(pack_rows(row, int(rows_R[source])).num_bytes) for source in self.straight_from}
        return StraightIn(self._across.transport, memory, self._epoch)

    def _find_straight(self, desk: Desk, straight: StraightIn) -> None:
        """Let them be unpacked like eager ones."""
        rows_R, row = self._out.plan.numbers("source_rows"), self._out.geometry.eager_row
        for source, memory in straight.memory.items():
            packed = pack_rows(row, int(rows_R[source]))
            desk.arrived.values[:, source] = address_of(memory) + np.array(packed.parts())
