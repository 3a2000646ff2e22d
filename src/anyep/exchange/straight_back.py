"""Combine, where rows between hosts go straight: owners send each origin its rows in one message, unsummed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anyep.exchange.courier import piece_memory
from anyep.exchange.ledger import COMES_STRAIGHT, GOES_STRAIGHT, NEAR
from anyep.exchange.retract import retract
from anyep.exchange.straight import StraightIn, StraightOut
from anyep.exchange.sums_out import back_row
from anyep.machine.addresses import address_of
from anyep.transport.base import Words
from anyep.transport.engine import Bytes

if TYPE_CHECKING:
    from anyep.exchange.across import Across
    from anyep.exchange.desk import AddressTable
    from anyep.exchange.endpoint import Endpoint
    from anyep.exchange.returning import Returning


class StraightBack:
    """One combine's straight rows, both ways: back to the sources they came from, and from where this rank's went."""

    def __init__(self, end: Endpoint, across: Across, back: Returning, epoch: int) -> None:
        self._end = end
        self._across = across
        self._back = back
        self._epoch = epoch
        self._row = back_row(end, back)
        plan = back.handle.send
        assert plan.crossing is not None, "plans of several hosts have one"
        self.hosts: list[int] = np.flatnonzero(plan.crossing.straight_M).tolist()
        """those from which rows come straight"""
        self._to = back.handle.straight_from
        self._rows_of_R = plan.numbers("source_entries")
        self._rows_at_R = plan.numbers("rank_entries")
        self.far_R: Words = across.far_R.copy()
        """as exchange/connect.py reads it"""
        self.far_R[list(self._to)] |= GOES_STRAIGHT
        self.far_R[plan.crossing.straight_M[across.hosts.host_R] & (across.far_R != NEAR)] |= COMES_STRAIGHT
        self.outgoing: StraightOut | None = None
        self.incoming: StraightIn | None = None
        self.first_row_R: NDArray[np.int32] = np.zeros(end.num_ranks, np.int32)
        """[R]: where a rank's rows begin among those of its host, where no weights come with them"""
        self._host_memory: dict[int, Bytes] = {}

    def open(self, back: AddressTable) -> int:
        """Make the messages, and say where their rows and weights go; return how many rows."""
        rows = {rank: int(self._rows_of_R[rank]) for rank in self._to}
        sizes = {rank: self._row.piece_bytes(count) for rank, count in rows.items()}
        self.outgoing = StraightOut(self._across.transport, sizes, self._epoch)
        for rank, memory in self.outgoing.memory.items():
            first = address_of(memory)
            back.values[:, rank] = first, first + self._row.weights_offset(rows[rank])
        return sum(rows.values())

    def encode(self) -> None:
        """Write LogFMT rows into the messages."""
        assert self.outgoing is not None
        end, back, plan = self._end, self._back, self._back.handle.send
        num_bins = plan.geometry.shape.num_recv_bins
        for rank, memory in self.outgoing.memory.items():
            counts, starts = (plan.field(name) + 4 * rank * num_bins for name in ("recv_rows", "recv_start"))
            end.kernels.logfmt_encode(back.y.data_ptr(), end.hidden, num_bins, counts, starts, address_of(memory))

    def send(self) -> None:
        assert self.outgoing is not None
        self._end.kernels.fence()
        self.outgoing.send()
        self._end.counters.add(straight_rows=int(self._rows_of_R[list(self._to)].sum()))

    def retract(self) -> None:
        """All ranks refuse: take what was sent out of the way."""
        assert self.outgoing is not None
        retract(self._across.transport, self._epoch, [self.outgoing])

    def ask(self) -> None:
        """Ask for this rank's rows: those of one host's ranks lie one behind the other."""
        memory: dict[int, Bytes] = {}
        for host in self.hosts:
            ranks = [rank for rank in self._across.hosts.members[host] if self._rows_at_R[rank]]
            sizes = [self._row.piece_bytes(int(self._rows_at_R[rank])) for rank in ranks]
            whole = self._host_memory[host] = piece_memory(sum(sizes))
            begins = np.cumsum([0, *sizes])
            for rank, begin, size in zip(ranks, begins[:-1].tolist(), sizes, strict=True):
                memory[rank] = whole[begin : begin + size]
                self.first_row_R[rank] = begin // self._row.row
        self.incoming = StraightIn(self._across.transport, memory, self._epoch)

    def find(self, lent: AddressTable) -> None:
        """Put where they lie beside where neighbours' rows lie."""
        assert self.incoming is not None
        for rank, memory in self.incoming.memory.items():
            first = address_of(memory)
            lent.values[:, rank] = first, first + self._row.weights_offset(int(self._rows_at_R[rank]))

    def first_address(self, host: int) -> int:
        """Return where the rows of a host begin."""
        return address_of(self._host_memory[host])
