"""Dispatch between hosts: which rows are forwarded, which go straight, and what comes from other hosts meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anyep.exchange import ledger
from anyep.exchange.across import Across
from anyep.exchange.courier import Part, carry, piece_memory
from anyep.exchange.opening import BODY
from anyep.exchange.proxy import Proxy
from anyep.exchange.retract import retract
from anyep.exchange.rows_across import RowsOut
from anyep.exchange.rows_in import RowsIn
from anyep.exchange.straight import StraightIn, StraightOut, straight_sources
from anyep.layout.pieces import pack_rows
from anyep.machine.addresses import address_of
from anyep.transport.base import Words

if TYPE_CHECKING:
    from anyep.exchange.desk import AddressTable, Desk
    from anyep.exchange.endpoint import Endpoint
    from anyep.exchange.outgoing import Outgoing


class DispatchAcross:
    """One dispatch of one rank, as far as it crosses: :meth:`open`, :meth:`begin`, then :meth:`cross`.

    Keeps what came straight until it is let go of: it is unpacked when everything has come.
    """

    def __init__(self, end: Endpoint, across: Across, out: Outgoing, epoch: int) -> None:
        assert out.plan.crossing is not None, "plans of several hosts have one"
        self._end = end
        self._across = across
        self._out = out
        self._epoch = epoch
        self._crossing = out.plan.crossing
        self._row = out.geometry.eager_row
        self._rows_out: list[RowsOut] = []
        self._straight_out = StraightOut(across.transport, {}, epoch)
        self._straight_in = StraightIn(across.transport, {}, epoch)
        self.proxies: tuple[Proxy, ...] = ()
        """sources for which this rank has forwarded"""
        self.straight_from: tuple[int, ...] = ()
        """sources whose rows came straight"""

    def open(self, eager: AddressTable) -> bool:
        """Let rows that go straight be written into their messages like eager ones; return whether there are any."""
        rows_R = self._out.plan.numbers("rank_rows")
        packed = {rank: pack_rows(self._row, int(rows_R[rank])) for rank in self._crossing.straight_ranks}
        sizes = {rank: one.num_bytes for rank, one in packed.items()}
        self._straight_out = StraightOut(self._across.transport, sizes, self._epoch)
        for rank, memory in self._straight_out.memory.items():
            eager.values[:, rank] = address_of(memory) + np.array(packed[rank].parts())
        return bool(packed)

    def begin(self) -> None:
        """Send what needs no answer: straight rows, and routing; pack the first rows that are forwarded."""
        end, across, crossing = self._end, self._across, self._crossing
        self._straight_out.send()
        end.counters.add(straight_rows=int(self._out.plan.numbers("rank_rows")[crossing.straight_ranks].sum()))
        self._rows_out = [
            RowsOut(end, across, self._out, crossing, host, self._epoch)
            for host in across.hosts.far_hosts(end.rank)
            if crossing.tokens_M[host] and not crossing.straight_M[host]
        ]
        for part in self._rows_out:
            part.begin()

    def cross(self, opened_RW: Words, desk: Desk, near: Part | None, step: str) -> None:
        """Send the rest, pass on what comes, and do ``near`` meanwhile; say where straight rows are to be unpacked."""
        incoming = self._incoming(opened_RW, desk.forwarded)
        rows_R = self._out.plan.numbers("source_rows")
        self.straight_from = tuple(straight_sources(self._across, opened_RW, rows_R))
        packed = {source: pack_rows(self._row, int(rows_R[source])) for source in self.straight_from}
        memory = {source: piece_memory(one.num_bytes) for source, one in packed.items()}
        self._straight_in = StraightIn(self._across.transport, memory, self._epoch)
        parts: list[Part] = [*self._rows_out, *incoming, self._straight_in, self._straight_out]
        carry(parts if near is None else [*parts, near], self._across.transport, self._epoch, step)
        for source, message in memory.items():
            desk.arrived.values[:, source] = address_of(message) + np.array(packed[source].parts())
        self.proxies = tuple(part.proxy for part in incoming if part.proxy is not None)

    def retract(self) -> None:
        """All ranks refuse: take what was sent out of the way."""
        retract(self._across.transport, self._epoch, [*self._rows_out, self._straight_out])

    def _incoming(self, opened_RW: Words, places: AddressTable) -> list[RowsIn]:
        """Open the streams of sources of other hosts for which this rank forwards."""
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
                places=places,
                known=known.get(source),
            )
            for source in across.hosts.sources_of(end.rank)
            if opened_RW[source, BODY + ledger.WAY] > 0
        ]
