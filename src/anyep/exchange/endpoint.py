"""What every operation of one rank stands on: transport, kernels, placement, sizes and lanes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.exchange.opening import BODY
from anyep.exchange.stats import Counters
from anyep.exchange.wire import Wire
from anyep.kernels.spec import KernelSet
from anyep.layout.placement import Placement
from anyep.layout.regions import RowBytes
from anyep.transport.base import Lane, Place, Transport, Words

OFFER_WORDS = 8
"""Status, rows, segment and offset of x, offset of scales, segment and offset of topk_idx, offset of weights."""

_COPY_UNIT_BYTES = 1 << 16
_GRAIN_BYTES = 1 << 16
"""Handing work to a thread takes as long as moving this much."""


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """The three messages of an operation: what I am about to do, where to put it, done."""

    open: Lane
    offer: Lane
    done: Lane

    def all(self) -> tuple[Lane, Lane, Lane]:
        return self.open, self.offer, self.done


def lanes_for(placement: Placement) -> Lanes:
    """Size the lanes: counts and first rows of every local expert must fit."""
    most = placement.max_local_experts
    return Lanes(
        open=Lane(index=0, name="announcement", words=BODY + max(OFFER_WORDS, 1 + most)),
        offer=Lane(index=1, name="offer", words=OFFER_WORDS + max(1, most)),
        done=Lane(index=2, name="rows", words=1),
    )


class Workers:
    """Splits a loop over tokens between threads; each token's result is the same whatever the split."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="anyep-rows") if num_threads > 1 else None

    def over(self, num_tokens: int, token_bytes: int, loop: Callable[[int, int], None]) -> None:
        """Call ``loop(first, last)`` over ranges that cover [0, num_tokens), none much smaller than a grain."""
        num_parts = min(self.num_threads, num_tokens, num_tokens * token_bytes // _GRAIN_BYTES)
        if self._pool is None or num_parts < 2:
            loop(0, num_tokens)
            return
        edges = [num_tokens * i // num_parts for i in range(num_parts + 1)]
        for future in [self._pool.submit(loop, a, b) for a, b in pairwise(edges)]:
            future.result()

    def copy(self, kernels: KernelSet, source_addr: int, destination_addr: int, num_bytes: int) -> None:
        """Copy bytes into the arena, in parallel where there are threads for it."""
        num_pages = -(-num_bytes // _COPY_UNIT_BYTES)

        def pages(first: int, last: int) -> None:
            begin, end = first * _COPY_UNIT_BYTES, min(last * _COPY_UNIT_BYTES, num_bytes)
            kernels.copy(source_addr + begin, destination_addr + begin, end - begin)
            kernels.fence()

        self.over(num_pages, _COPY_UNIT_BYTES, pages)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertTables:
    """The placement as kernels read it: int32 [E] each."""

    rank_E: torch.Tensor
    local_E: torch.Tensor

    @classmethod
    def of(cls, placement: Placement) -> ExpertTables:
        return cls(rank_E=torch.from_numpy(placement.expert_rank_E), local_E=torch.from_numpy(placement.expert_local_E))


@dataclass(frozen=True, kw_only=True, eq=False)
class Endpoint:
    """One rank's side of a buffer. Lives as long as the buffer; operations borrow it."""

    transport: Transport
    kernels: KernelSet
    placement: Placement
    tables: ExpertTables
    lanes: Lanes
    wire: Wire
    row: RowBytes
    hidden: int
    num_topk: int
    max_tokens: int
    expert_alignment: int
    workers: Workers
    counters: Counters
    bases: SegmentBases

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def num_ranks(self) -> int:
        return self.transport.size

    def exchange(self, lane: Lane, epoch: int, words_RW: Words, step: str) -> Words:
        """Post a row to every rank and await theirs."""
        self.transport.post(lane, epoch, words_RW)
        return self.await_all(lane, epoch, step)

    def await_all(self, lane: Lane, epoch: int, step: str) -> Words:
        """Await every rank's message; the time goes to the statistics."""
        begin = time.perf_counter()
        try:
            return self.transport.wait(lane, epoch, f"{step}: {lane.name}")
        finally:
            self.counters.waiting_s += time.perf_counter() - begin

    def peer_tables(self, segments_nR: Words, offsets_nR: Words) -> PeerTables:
        """Return n peer tables: where place (segment, offset) of each rank lies here; 0 where the segment is -1."""
        bases_nR = self.bases.of(self.transport, segments_nR)
        return PeerTables(np.where(segments_nR < 0, 0, bases_nR + offsets_nR))


class SegmentBases:
    """Addresses of the peers' segments, int64 [R, segments], looked up once each: most steps use the same few."""

    def __init__(self, num_ranks: int) -> None:
        self._ranks_R = np.arange(num_ranks)
        self._base_RS = np.zeros((num_ranks, 1), np.int64)

    def of(self, transport: Transport, segments_nR: Words) -> Words:
        """Return the base of segment ``segments_nR[i, r]`` of rank r; anything where that is -1."""
        most = int(segments_nR.max())
        if most >= self._base_RS.shape[1]:
            self._base_RS = np.pad(self._base_RS, ((0, 0), (0, most + 1 - self._base_RS.shape[1])))
        bases_nR = self._base_RS[self._ranks_R, segments_nR]
        if not bases_nR.all():
            self._look_up(transport, segments_nR)
            bases_nR = self._base_RS[self._ranks_R, segments_nR]
        return bases_nR

    def _look_up(self, transport: Transport, segments_nR: Words) -> None:
        for row in segments_nR.tolist():
            for rank, segment in enumerate(row):
                if segment >= 0 and not self._base_RS[rank, segment]:
                    self._base_RS[rank, segment] = transport.address(rank, Place(segment=segment, offset=0))


class PeerTables:
    """Peer tables as kernels read them, int64 [n, R]."""

    def __init__(self, addresses: NDArray[np.int64]) -> None:
        self._addresses = addresses  # keeps the memory that the numbers below point to
        first: int = addresses.__array_interface__["data"][0]
        self._addr = [first + row * addresses.strides[0] for row in range(len(addresses))]

    def __getitem__(self, column: int) -> int:
        """Return where a column's table begins."""
        return self._addr[column]
