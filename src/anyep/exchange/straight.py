"""Small batches between hosts: rows that go straight to the ranks of another host, so that nobody forwards them.

Forwarded, a token crosses once a host, however many of its ranks want it; straight, once a rank, and its rank waits for
one message instead of for a neighbour who has to route it first. Each sender decides for each host alone
(exchange/straight_rule.py), and announces it; rows go back as they came. They travel as rows do that come along with an
announcement inside a host, and are unpacked alike (exchange/receive.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anyep.exchange import ledger
from anyep.exchange.courier import STRAIGHT, piece_memory
from anyep.exchange.opening import BODY
from anyep.transport.base import Words
from anyep.transport.engine import Bytes, Transfer
from anyep.transport.hierarchical import HierarchicalTransport, tag_of

if TYPE_CHECKING:
    from anyep.exchange.across import Across


def straight_sources(across: Across, opened_RW: Words, rows_R: NDArray[np.int32]) -> list[int]:
    """Return the ranks of other hosts whose rows for this rank come straight."""
    is_far_R = across.far_R != ledger.NEAR
    straight_R = is_far_R & (opened_RW[:, BODY + ledger.WAY] <= ledger.STRAIGHT) & (rows_R > 0)
    return [int(rank) for rank in np.flatnonzero(straight_R)]


class StraightOut:
    """One message for each of some ranks of other hosts; a part of the operation (exchange/courier.py)."""

    def __init__(self, transport: HierarchicalTransport, sizes: Mapping[int, int], epoch: int) -> None:
        self._transport = transport
        self._epoch = epoch
        self.memory: dict[int, Bytes] = {rank: piece_memory(size) for rank, size in sizes.items()}
        """rank -> its message, to be filled before it is sent"""
        self._sent: list[Transfer] = []

    def send(self) -> None:
        tag = tag_of(STRAIGHT, self._epoch)
        self._sent = [self._transport.engine.send(rank, tag, memory) for rank, memory in self.memory.items()]

    def sent_to(self) -> dict[int, tuple[int, int, int]]:
        """See exchange/retract.py."""
        return {transfer.rank: (0, 0, 1) for transfer in self._sent}

    def advance(self) -> bool:
        return False

    def pending(self) -> list[Transfer]:
        return [transfer for transfer in self._sent if not self._transport.is_done(transfer)]


class StraightIn:
    """The same from some ranks of other hosts. ``memory``: rank -> where its message arrives."""

    def __init__(self, transport: HierarchicalTransport, memory: Mapping[int, Bytes], epoch: int) -> None:
        self._transport = transport
        tag = tag_of(STRAIGHT, epoch)
        self.memory = dict(memory)
        self._asked = [self._transport.engine.receive(rank, tag, where) for rank, where in self.memory.items()]

    @property
    def arrived(self) -> bool:
        return not self.pending()

    def advance(self) -> bool:
        return False

    def pending(self) -> list[Transfer]:
        self._asked = [transfer for transfer in self._asked if not self._transport.is_done(transfer)]
        return self._asked
