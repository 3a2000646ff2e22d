"""Dispatch between hosts, at a rank that is a forwarder too: its rows to other hosts, theirs to its neighbours."""

from __future__ import annotations

from anyep.exchange import ledger
from anyep.exchange.across import Across
from anyep.exchange.courier import carry
from anyep.exchange.endpoint import AddressTable, Endpoint
from anyep.exchange.opening import BODY
from anyep.exchange.outgoing import Outgoing
from anyep.exchange.proxy import Proxy
from anyep.exchange.rows_across import RowsIn, RowsOut
from anyep.transport.base import Words


class DispatchAcross:
    """One dispatch of one rank, as far as it crosses."""

    def __init__(self, end: Endpoint, across: Across, out: Outgoing, epoch: int, step: str) -> None:
        self._end = end
        self._across = across
        self._out = out
        self._epoch = epoch
        self._step = step
        self._outgoing: list[RowsOut] = []

    def begin(self) -> None:
        """Send other hosts what needs no answer: the routing, and as many rows as may be on their way."""
        end, across, crossing = self._end, self._across, self._out.plan.crossing
        assert crossing is not None, "plans of several hosts have one"
        self._outgoing = [
            RowsOut(end, across, self._out, crossing, host, self._epoch)
            for host in across.hosts.far_hosts(end.rank)
            if crossing.tokens_M[host]
        ]
        for part in self._outgoing:
            part.advance()

    def cross(self, opened_RW: Words, places: AddressTable) -> tuple[Proxy, ...]:
        """Send the rest, and pass on what comes to this host's ranks at ``places``; return for whom."""
        end, across, cached = self._end, self._across, self._out.cached
        known = {} if cached is None else {proxy.source: proxy for proxy in cached.proxies}
        incoming = [
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
            if opened_RW[source, BODY + ledger.WAY]
        ]
        carry([*self._outgoing, *incoming], across.transport, self._epoch, self._step)
        return tuple(part.proxy for part in incoming if part.proxy is not None)
