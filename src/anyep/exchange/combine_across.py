"""Combine between hosts, at an origin that is a forwarder too: what crosses both ways, and what is summed meanwhile.

Neighbours' rows are summed where they lie, as on one host; what comes back from another host stands beside them as the
rows of one more rank (exchange/fold.py), a piece at a time: tokens are summed as soon as all their rows are here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyep.exchange import ledger
from anyep.exchange.across import Across
from anyep.exchange.courier import Part, carry
from anyep.exchange.crossing import Crossing
from anyep.exchange.desk import AddressTable
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.opening import BODY
from anyep.exchange.proxy import Proxy
from anyep.exchange.scatter import place_at
from anyep.exchange.straight_back import StraightBack
from anyep.exchange.sums_in import Summing, SumsHere, SumsIn, Supply, cut
from anyep.exchange.sums_out import SumsOut, back_row, each_by_itself, terms_of
from anyep.exchange.wire import ELEMENTS
from anyep.machine.addresses import address_of
from anyep.transport.base import Words

if TYPE_CHECKING:
    from anyep.exchange.returning import Returning


class Entries(NamedTuple):
    """Which rows a token's sum takes: int32 [T, W] ranks and rows."""

    by_rank: int
    rank_addr: int
    row_addr: int


class NearRows(NamedTuple):
    """Where rows of ranks lie that are summed here."""

    tables: AddressTable
    """of rows and of weights, [R]"""
    rows_TW: NDArray[np.int32]
    """the entries' rows there"""
    straight: StraightBack
    """ranks of other hosts whose rows are brought here like a neighbour's"""


AddUp = Callable[[Entries, list[int], int, int], None]
"""Sum tokens: (entries, addresses of the tables of rows and of weights, first token, last token)."""


class CombineAcross:
    """One combine of one rank, as far as it crosses."""

    def __init__(self, end: Endpoint, across: Across, back: Returning, epoch: int, step: str) -> None:
        self._end = end
        self._across = across
        self._back = back
        self._epoch = epoch
        self._step = step
        self._row = back_row(end, back)
        self._each = each_by_itself(back)
        self._tables = AddressTable(2, end.num_ranks + across.hosts.num_hosts)
        """of rows and of weights: ranks, then hosts"""

    def run(self, opened_RW: Words, near: NearRows, add_up: AddUp) -> None:
        """Send back what this rank forwards, and sum what comes back to it together with its neighbours' rows."""
        end, across, plan = self._end, self._across, self._back.handle.send
        self._tables.values[:, : end.num_ranks] = near.tables.values
        outgoing = [self._forward(proxy, opened_RW) for proxy in self._back.handle.proxies]
        incoming, straight = self._incoming(near.straight), near.straight
        assert straight.incoming is not None
        assert straight.outgoing is not None
        supplies: dict[int, Supply] = dict(incoming)
        for host in self._summed_hosts(straight):
            supplies |= self._summed_here(host, near)
        entries, kept = self._fold(near)
        summing = Summing(
            plan.num_tokens,
            supplies,
            (self._tables.values[0], self._tables.values[1]),
            end.num_ranks,
            lambda first, last: add_up(entries, self._tables.addr, first, last),
            begin=lambda: straight.incoming is None or straight.incoming.arrived,
        )
        parts: list[Part] = [*outgoing, *incoming.values(), straight.outgoing, straight.incoming, summing]
        carry(parts, across.transport, self._epoch, self._step)
        del kept  # until here: entries point into it

    def _crossing(self) -> Crossing:
        crossing = self._back.handle.send.crossing
        assert crossing is not None, "plans of several hosts have one"
        return crossing

    def _summed_hosts(self, straight: StraightBack) -> list[int]:
        """Return the hosts whose ranks' rows are summed here as if they crossed."""
        return [self._across.own_host] * bool(self._back.way.group) + ([] if self._each else straight.hosts)

    def _incoming(self, straight: StraightBack) -> dict[int, SumsIn]:
        """Open the streams from other hosts that have rows of this rank's tokens."""
        end, across = self._end, self._across
        supplies = {}
        for host in set(across.hosts.far_hosts(end.rank)).difference(straight.hosts):
            rows_T = self._rows_of(host)
            if rows_T.any():
                cuts = cut(rows_T, self._row, across.chunk_bytes)
                supplies[host] = SumsIn(across, across.hosts.forwarder(end.rank, host), self._row, cuts, self._epoch)
        return supplies

    def _rows_of(self, host: int) -> NDArray[np.int64]:
        """Return how many rows come from ``host`` for each token, [T]."""
        ranks_TW, hosts = self._back.handle.send.entry_ranks(), self._across.hosts
        if self._each:
            named = (hosts.host_R[ranks_TW] == host) & (ranks_TW >= 0)
        else:
            named = (self._crossing().entry_host_TW == host).any(axis=1, keepdims=True)
        rows_T: NDArray[np.int64] = named.sum(axis=1)
        return rows_T

    def _fold(self, near: NearRows) -> tuple[Entries, NDArray[np.int32]]:
        """Return what a token's sum takes, and the memory in which that stands."""
        across, plan, straight = self._across, self._back.handle.send, near.straight
        here_M = np.zeros(across.hosts.num_hosts, np.int32)
        here_M[[across.own_host, *straight.hosts]] = 1
        here_M[self._summed_hosts(straight)] = 0
        terms = np.empty((3, max(1, plan.num_tokens * plan.width)), np.int32)
        keys, ranks, rows = (address_of(one) for one in terms)
        self._end.books.fold(
            plan.num_tokens,
            plan.width,
            plan.entry_rank_addr,
            address_of(near.rows_TW),
            across.hosts.host_R,
            across.first_M,
            here_M,
            int(self._each),
            int(self._back.way.reduce == "column" and not self._each),
            np.zeros(across.hosts.num_hosts, np.int32),
            keys,
            ranks,
            rows,
        )
        by_rank = int(self._each and self._back.way.reduce == "rank")
        if by_rank:
            self._rename(straight, terms)
        return Entries(by_rank=by_rank, rank_addr=ranks, row_addr=rows), terms

    def _rename(self, straight: StraightBack, terms: NDArray[np.int32]) -> None:
        """Let rows that came straight stand where they would if they had been forwarded: as their host's, by column."""
        _, ranks, rows = terms
        for host in straight.hosts:
            theirs = np.isin(ranks, self._across.hosts.members[host])
            rows[theirs] += straight.first_row_R[ranks[theirs]]
            ranks[theirs] = self._end.num_ranks + host
            self._tables.values[0, self._end.num_ranks + host] = straight.first_address(host)

    def _summed_here(self, host: int, near: NearRows) -> dict[int, Supply]:
        """Sum a host's rows of the tokens that it serves here, as if the sums crossed."""
        end, across, plan = self._end, self._across, self._back.handle.send
        rows_T = self._rows_of(host)
        tokens = np.flatnonzero(rows_T)
        if not len(tokens):
            return {}
        ranks = plan.entry_ranks()[tokens]
        ranks = np.where(across.hosts.host_R[ranks] == host, ranks, np.int32(-1))
        rows = near.rows_TW[tokens]
        entries = (plan.width, int(self._back.way.reduce == "rank"), address_of(ranks), address_of(rows))
        element = int(ELEMENTS[self._back.y.dtype])
        row, kept = self._row, (ranks, rows)

        def add_up(first: int, last: int, rows_addr: int, weights_addr: int) -> None:
            """Kernels count from row 0."""
            rows_table, weights_table = near.tables.addr
            out_addr = rows_addr - first * row.row
            end.kernels.reduce(element, end.hidden, first, last, *entries, rows_table, 0, 0, 0, out_addr)
            if row.weights:
                out_addr = weights_addr - first * row.weights
                end.kernels.reduce_weights(end.num_topk, first, last, *entries, weights_table, out_addr)
            end.kernels.fence()
            assert kept

        return {host: SumsHere(row, cut(rows_T, row, across.chunk_bytes), add_up)}

    def _forward(self, proxy: Proxy, opened_RW: Words) -> SumsOut:
        """Find the rows of a rank of another host at this host's ranks."""
        end, across, plan = self._end, self._across, proxy.plan
        lent, moved_rows = AddressTable(2, end.num_ranks), None
        starts = np.zeros(end.num_ranks + end.placement.num_experts, np.int32)
        ranks_R, tally = np.zeros(end.num_ranks, np.int64), np.zeros(ledger.NUM_TALLY, np.int64)
        while True:
            unknown = end.books.connect_back(
                opened_RW,
                BODY,
                end.bases.base_RS,
                plan.geometry.shape.dims,
                plan.geometry.shape.offsets,
                plan.first_addr,
                end.tables.rank_addr,
                -1,
                ranks_R,
                0,
                lent.values,
                address_of(starts),
                ranks_R,
                ranks_R.copy(),
                end.far_R,
                tally,
            )
            if unknown < 0:
                break
            end.bases.look_up(end.transport, unknown >> 32, unknown & 0xFFFFFFFF)
        if tally[ledger.EAGER_ROWS]:
            moved_rows = np.empty(plan.num_tokens * plan.width, np.int32)
            place_at(end, plan, address_of(starts), address_of(moved_rows))
        terms = terms_of(proxy, self._back, moved_rows)
        return SumsOut(end, across, self._back, proxy, terms, lent, self._epoch)
