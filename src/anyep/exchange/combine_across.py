"""Combine between hosts, at an origin that is a forwarder too: what crosses both ways, and what is then summed.

Neighbours' rows are summed where they lie, as on one host; what came back from another host stands beside them as the
rows of one more rank (exchange/fold.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyep.exchange import ledger
from anyep.exchange.across import Across
from anyep.exchange.courier import carry
from anyep.exchange.crossing import Crossing, address_of
from anyep.exchange.endpoint import AddressTable, Endpoint
from anyep.exchange.opening import BODY
from anyep.exchange.proxy import Proxy
from anyep.exchange.scatter import place_at
from anyep.exchange.sums_across import SumsIn, SumsOut, each_by_itself, rows_from, terms_of
from anyep.exchange.wire import ELEMENTS
from anyep.transport.base import Words

if TYPE_CHECKING:
    from anyep.exchange.returning import Returning


class Entries(NamedTuple):
    """Which rows a token's sum takes: int32 [T, W] ranks and rows."""

    by_rank: int
    rank_addr: int
    row_addr: int


class Together(NamedTuple):
    """All rows of an origin's tokens, here."""

    entries: Entries
    tables: AddressTable
    """of rows and of weights, [R + M]: ranks, then hosts"""
    kept: tuple[object, ...]
    """what the addresses point into"""


class CombineAcross:
    """One combine of one rank, as far as it crosses."""

    def __init__(self, end: Endpoint, across: Across, back: Returning, epoch: int, step: str) -> None:
        self._end = end
        self._across = across
        self._back = back
        self._epoch = epoch
        self._step = step

    def bring_together(
        self, opened_RW: Words, lent: AddressTable, rows_addr: int, moved_rows: NDArray[np.int32] | None
    ) -> Together:
        """Send back what this rank forwards, and bring what comes back to it beside its neighbours' rows.

        ``lent`` and ``rows_addr``: where neighbours' rows lie, and the entries' rows int32 [T, W] (``moved_rows``: the
        same, where they do not lie as the dispatch placed them).
        """
        end, across, back, plan = self._end, self._across, self._back, self._back.handle.send
        each, crossing = each_by_itself(back), plan.crossing
        assert crossing is not None, "plans of several hosts have one"
        outgoing = [self._forward(proxy, opened_RW, each=each) for proxy in back.handle.proxies]
        counts = {host: rows_from(crossing, back, host) for host in across.hosts.far_hosts(end.rank)}
        incoming = {
            host: SumsIn(end, across, back, host, count, self._epoch) for host, count in counts.items() if count
        }
        carry([*outgoing, *incoming.values()], across.transport, self._epoch, self._step)
        folded = AddressTable(2, end.num_ranks + across.hosts.num_hosts)
        folded.values[:, : end.num_ranks] = lent.values
        own_sums = self._sum_neighbours(crossing, lent, moved_rows) if back.group else None
        if own_sums is not None:
            folded.values[:, end.num_ranks + across.own_host] = [address_of(one) for one in own_sums]
        for host, part in incoming.items():
            folded.values[:, end.num_ranks + host] = address_of(part.rows), address_of(part.weights)
        terms = np.empty((3, max(1, plan.num_tokens * plan.width)), np.int32)
        keys, ranks, rows = (address_of(one) for one in terms)
        end.books.fold(
            plan.num_tokens,
            plan.width,
            plan.entry_rank_addr,
            rows_addr,
            across.hosts.host_R,
            across.first_M,
            across.own_host if own_sums is None else -1,
            int(each),
            int(back.reduce == "column" and not each),
            np.zeros(across.hosts.num_hosts, np.int32),
            keys,
            ranks,
            rows,
        )
        by_rank = int(each and back.reduce == "rank")
        entries = Entries(by_rank=by_rank, rank_addr=ranks, row_addr=rows)
        return Together(entries=entries, tables=folded, kept=(terms, own_sums, *incoming.values()))

    def _sum_neighbours(
        self, crossing: Crossing, lent: AddressTable, moved_rows: NDArray[np.int32] | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return this host's sums of the tokens that it serves, rows [n, H] and weights [n, K], as if they crossed."""
        end, across, back, plan = self._end, self._across, self._back, self._back.handle.send
        tokens = crossing.tokens_for(across.own_host)
        ranks_TW = plan.entry_ranks()
        ranks = ranks_TW[tokens]
        ranks = np.where(across.hosts.host_R[ranks] == across.own_host, ranks, np.int32(-1))
        all_rows = plan.words(plan.entry_row_addr, ranks_TW.size) if moved_rows is None else moved_rows
        rows = all_rows.reshape(ranks_TW.shape)[tokens]
        sums = np.empty(len(tokens) * back.row_bytes, np.uint8)
        weights = np.empty(0 if back.topk_weights is None else len(tokens) * 4 * end.num_topk, np.uint8)
        entries = (plan.width, int(back.reduce == "rank"), address_of(ranks), address_of(rows))
        rows_table, weights_table = lent.addr
        element = int(ELEMENTS[back.y.dtype])
        end.kernels.reduce(element, end.hidden, 0, len(tokens), *entries, rows_table, 0, 0, 0, address_of(sums))
        if weights.size:
            end.kernels.reduce_weights(end.num_topk, 0, len(tokens), *entries, weights_table, address_of(weights))
        end.kernels.fence()
        return sums, weights

    def _forward(self, proxy: Proxy, opened_RW: Words, *, each: bool) -> SumsOut:
        """Find the rows of a rank of another host at this host's ranks."""
        end, across, plan = self._end, self._across, proxy.plan
        lent, moved_rows = AddressTable(2, end.num_ranks), None
        starts, ranks_R = (
            np.zeros(end.num_ranks + end.placement.num_experts, np.int32),
            np.zeros(end.num_ranks, np.int64),
        )
        tally = np.zeros(6, np.int64)
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
        return SumsOut(end, across, self._back, proxy, terms_of(proxy, self._back, moved_rows), lent, self._epoch)
