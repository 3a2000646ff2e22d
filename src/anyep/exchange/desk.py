"""The messages of an operation, and the memory on which it writes them: a desk for each operation in flight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyep.exchange.eager import EagerSlots
from anyep.exchange.ledger import COUNTS, NUM_TALLY, PARTS, ROUTING_OFFSET
from anyep.exchange.opening import BODY
from anyep.layout.placement import Placement
from anyep.machine.addresses import address_of
from anyep.transport.base import Lane, Words

OFFER_WORDS = ROUTING_OFFSET + 1
"""A status, rows that fit, segment and offset of the rows, segment and offset of their routing."""


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """The messages of an operation: what I am about to do, where to put it if that was not said yet, done."""

    open: Lane
    offer: Lane
    done: Lane

    def all(self) -> tuple[Lane, Lane, Lane]:
        return self.open, self.offer, self.done


def lanes_for(placement: Placement) -> Lanes:
    """Size the lanes: the first message holds a rank's counts for every rank and expert, and of its tokens."""
    num_counts = placement.num_ranks + placement.num_experts + 1
    return Lanes(
        open=Lane(index=0, name="announcement", words=BODY + COUNTS + (num_counts + 1) // 2),
        offer=Lane(index=1, name="offer", words=OFFER_WORDS),
        done=Lane(index=2, name="rows", words=1),
    )


class AddressTable:
    """Peer tables for one operation, int64 [n, R]; ``addr[i]`` is where table i begins."""

    def __init__(self, num_tables: int, num_ranks: int) -> None:
        self.values: NDArray[np.int64] = np.zeros((num_tables, num_ranks), np.int64)
        first = address_of(self.values)
        self.addr = [first + 8 * num_ranks * i for i in range(num_tables)]


class Desk:
    """Memory that an operation in flight writes on; the operation ``ring`` epochs later uses it again."""

    def __init__(self, index: int, slots: EagerSlots, lanes: Lanes, num_experts: int) -> None:
        ranks = slots.num_ranks
        self.send_slots_R = slots.sending(index)
        self.recv_slots_R = slots.receiving(index)
        self.words_RW: Words = np.zeros((ranks, lanes.open.words), np.int64)
        self.places_RW: Words = np.zeros((ranks, BODY + COUNTS), np.int64)
        """the shorter messages, without counts"""
        self.eager = AddressTable(PARTS, ranks)
        self.direct = AddressTable(PARTS, ranks)
        self.arrived = AddressTable(PARTS, ranks)
        self.offers_RW: Words = np.zeros((ranks, OFFER_WORDS), np.int64)
        self.back = AddressTable(2, ranks)
        """slots at the origins for rows and weights that go back"""
        self.done_RW: Words = np.zeros((ranks, 1), np.int64)
        self.lent = AddressTable(2, ranks)
        """where this rank's rows and weights lie at their owners"""
        self._starts = np.zeros(ranks + num_experts, np.int32)
        self.starts_addr = address_of(self._starts)
        """int32 [R + E], for whatever an operation needs"""
        self.to_R: Words = np.zeros(ranks, np.int64)
        self.from_R: Words = np.zeros(ranks, np.int64)
        self.tally: Words = np.zeros(NUM_TALLY, np.int64)
        self.forwarded = AddressTable(PARTS, ranks)
        """final places at this host's ranks, for rows that are forwarded"""
        self.spare = AddressTable(PARTS, ranks)
        self.spare_R: Words = np.zeros(ranks, np.int64)
        self.spare_tally: Words = np.zeros(NUM_TALLY, np.int64)
        """what connecting also says, and forwarders know already"""
