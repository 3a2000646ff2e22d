"""What every operation of one rank stands on: transport, kernels, sizes, lanes, and memory for operations in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.errors import PeerError, PeerLost, PeerTimeout
from anyep.exchange.across import Across
from anyep.exchange.arguments import CPU
from anyep.exchange.crowd import Crowd
from anyep.exchange.desk import Desk, Lanes
from anyep.exchange.eager import EagerRule, EagerSlots
from anyep.exchange.geometry import Geometry, GeometryKey
from anyep.exchange.stats import Counters
from anyep.exchange.way_back import WayBack
from anyep.exchange.wire import Wire
from anyep.exchange.workers import Workers
from anyep.kernels.spec import KernelSet
from anyep.layout.placement import Placement
from anyep.layout.regions import aligned
from anyep.machine.addresses import address_of
from anyep.transport.base import Lane, Place, Transport, Words

Addresses = NDArray[np.int64]


def scale_code(wire: Wire) -> int:
    """Return a wire's scale format as kernels take it; -1 where they have nothing to quantise."""
    return -1 if wire.scale_format is None else int(wire.scale_format)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertTables:
    """The placement as kernels read it: int32 [E] each."""

    rank_addr: int
    local_addr: int
    kept: tuple[NDArray[np.int32], NDArray[np.int32]]

    @classmethod
    def of(cls, placement: Placement) -> ExpertTables:
        kept = (np.ascontiguousarray(placement.expert_rank_E), np.ascontiguousarray(placement.expert_local_E))
        rank_addr, local_addr = (address_of(table) for table in kept)
        return cls(rank_addr=rank_addr, local_addr=local_addr, kept=kept)


class ReturnSlots(NamedTuple):
    """Rows and weights in eager slots on their way back."""

    limit_rows: int
    slot_rows: int
    weights_offset: int
    offsets: Words
    """of rows and weights in a slot"""


class SegmentBases:
    """Addresses of the peers' segments, int64 [R, segments]; 0 where nobody has looked yet."""

    def __init__(self, num_ranks: int) -> None:
        self.base_RS: Addresses = np.zeros((num_ranks, 4), np.int64)
        self._growing = threading.Lock()

    def look_up(self, transport: Transport, rank: int, segment: int) -> None:
        """Map a peer's segment and remember where it lies."""
        address = transport.address(rank, Place(segment=segment, offset=0))
        with self._growing:
            grown = self.base_RS
            if segment >= grown.shape[1]:
                grown = np.pad(grown, ((0, 0), (0, segment + 4 - grown.shape[1])))
            grown[rank, segment] = address
            self.base_RS = np.ascontiguousarray(grown)


@dataclass(frozen=True, kw_only=True)
class Books:
    """The compiled bookkeeping of operations: exchange/halves.py, settle.py, connect.py, ordering.py."""

    begin: Callable[..., None]
    size_up: Callable[..., int]
    find_rows: Callable[..., int]
    agree: Callable[..., int]
    keep: Callable[..., int]
    settle: Callable[..., int]
    connect: Callable[..., int]
    connect_back: Callable[..., int]
    fold: Callable[..., None]
    sort_by_column: Callable[..., None]
    order_by_column: Callable[..., None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Endpoint:
    """One rank's side of a buffer. Lives as long as the buffer; operations borrow it."""

    transport: Transport
    kernels: KernelSet
    books: Books
    placement: Placement
    tables: ExpertTables
    lanes: Lanes
    wire: Wire
    scale_code: int
    """the wire's scale format as kernels take it; -1 without scales"""
    hidden: int
    num_topk: int
    max_tokens: int
    expert_alignment: int
    static_rows: int | None
    source_tokens: bool
    """whether rows of every layout say which token of their source they are"""
    max_in_flight: int
    workers: Workers
    counters: Counters
    bases: SegmentBases
    slots: EagerSlots
    rule: EagerRule
    desks: tuple[Desk, ...]
    crowd: Crowd
    far_R: Words
    """[R]: NEAR for ranks of this host, 0 for those of others"""
    across: Across | None = None
    """what there is besides on several hosts"""
    geometries: dict[tuple[GeometryKey, int], Geometry] = field(default_factory=dict)
    returns: dict[tuple[int, int], ReturnSlots] = field(default_factory=dict)
    ways: dict[tuple[object, ...], WayBack] = field(default_factory=dict)

    @cached_property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def where(self) -> torch.device:
        """Where a caller's tensors must lie."""
        return CPU

    @cached_property
    def num_ranks(self) -> int:
        return self.transport.size

    @property
    def num_counts(self) -> int:
        """How many numbers a rank announces: rows for each rank, pairs of each expert."""
        return self.num_ranks + self.placement.num_experts

    def variant(
        self, *, wire: Wire, num_topk: int, max_tokens: int, static_rows: int | None, source_tokens: bool
    ) -> Endpoint:
        """Return an endpoint for rows of another kind on the same transport, slots and desks."""
        return replace(
            self,
            wire=wire,
            scale_code=scale_code(wire),
            hidden=wire.hidden,
            num_topk=num_topk,
            max_tokens=max_tokens,
            expert_alignment=1,
            static_rows=static_rows,
            source_tokens=source_tokens,
            geometries={},
            returns={},
            ways={},
        )

    def desk(self, epoch: int) -> Desk:
        return self.desks[epoch % len(self.desks)]

    def geometry(self, layout: str, idx_bytes: int, has_weights: bool) -> Geometry:
        """Return the sizes and offsets of a kind of dispatch, made once."""
        return self.geometry_of(GeometryKey(layout, idx_bytes, has_weights), self.rank)

    def geometry_of(self, key: GeometryKey, rank: int) -> Geometry:
        """Return the same as another rank sees it."""
        known = self.geometries.get((key, rank))
        if known is None:
            known = self.geometries[key, rank] = self.new_geometry(
                key, rank, alignment=self.expert_alignment, static_rows=self.static_rows
            )
        return known

    def new_geometry(self, key: GeometryKey, rank: int, *, alignment: int, static_rows: int | None) -> Geometry:
        """Make one as ``rank`` sees it, for batches with another alignment or number of rows than this buffer's."""
        return Geometry(
            key,
            self.placement,
            rank,
            self.wire,
            num_topk=self.num_topk,
            max_tokens=self.max_tokens,
            alignment=alignment,
            static_rows=static_rows,
            source_tokens=self.source_tokens,
            slots=self.slots,
            rule=self.rule,
        )

    def return_slots(self, row_bytes: int, weights_bytes: int) -> ReturnSlots:
        """Return how eager slots hold rows and weights of these sizes on their way back, worked out once."""
        known = self.returns.get((row_bytes, weights_bytes))
        if known is None:
            capacity = self.slots.capacity(row_bytes + weights_bytes)
            weights_offset = aligned(capacity * row_bytes)
            known = self.returns[row_bytes, weights_bytes] = ReturnSlots(
                limit_rows=self.rule.limit_rows(row_bytes + weights_bytes, capacity),
                slot_rows=capacity,
                weights_offset=weights_offset,
                offsets=np.array([0, weights_offset], np.int64),
            )
        return known

    def announce(self, epoch: int, words_RW: Words, *, claim: bool = False) -> None:
        """Post the first message of an operation to every rank that takes part.

        ``claim``: say before that this rank does; PeerLost where the others have gone on without it.
        """
        if claim and not self.transport.claim(epoch):
            raise PeerLost(
                f"rank {self.rank} (this rank) did not come in time to an operation up to epoch {epoch}, and the "
                "others went on without it; close this buffer",
                ranks=[self.rank],
                step="announcement",
            )
        self.transport.post(self.lanes.open, epoch, words_RW)

    def hear(self, epoch: int, step: str, header: Words) -> Words:
        """Await the first message of every rank that takes part; the others are spoken for."""
        opened_RW = self.transport.wait(self.lanes.open, epoch, f"{step}: announcement")
        return self.crowd.speak_for_absent(opened_RW, header) if self.crowd.absent else opened_RW

    def hear_or_expel(self, epoch: int, step: str, header: Words) -> Words:
        """The same; who does not come takes no part any more."""
        late = False
        while True:
            try:
                return self.hear(epoch, step, header)
            except PeerError as error:
                if self.crowd.expel(self.transport, error.ranks, epoch):
                    continue
                if late or not isinstance(error, PeerTimeout):
                    raise
                late = True  # they began as time ran out: what they post is about to come

    def wait(self, lane: Lane, epoch: int, step: str, ranks: Words | None = None) -> Words:
        """Await messages of all ranks, or of some."""
        return self.transport.wait(lane, epoch, f"{step}: {lane.name}", ranks)
