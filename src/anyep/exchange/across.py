"""What an endpoint on several hosts has besides: who lives where, and the tables with which tokens cross."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyep.exchange.ledger import NEAR
from anyep.exchange.straight_rule import StraightRule
from anyep.layout.hosts import HostMap, group_ranks
from anyep.layout.pieces import CHUNK_BYTES, WINDOW
from anyep.layout.placement import Placement
from anyep.layout.regions import ALIGNMENT_BYTES, RowBytes
from anyep.transport.base import Words
from anyep.transport.hierarchical import HierarchicalTransport

PIECE_GAPS = 3 * ALIGNMENT_BYTES
"""Between the parts of a piece, at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Across:
    """Lives as long as the endpoint. ``hosts`` [M] are seen from ``transport.rank``."""

    transport: HierarchicalTransport
    host_E: NDArray[np.int32]
    """the host of each expert, as kernels read it"""
    number_E: NDArray[np.int32]
    """each expert's own number: between hosts experts keep it"""
    first_M: NDArray[np.int32]
    """the first rank of each host"""
    far_R: Words
    """as :func:`far_ranks`"""
    chunk_bytes: int
    """what a piece has at most, unless a single token has more"""
    straight: StraightRule
    """which rows are not forwarded"""

    @property
    def hosts(self) -> HostMap:
        return self.transport.hosts

    @property
    def own_host(self) -> int:
        return int(self.hosts.host_R[self.transport.rank])

    def has_groups_of(self, ranks_per_host: int) -> bool:
        """Whether hosts are ranges of so many ranks, the last perhaps of fewer."""
        return self.hosts.members == group_ranks(self.transport.size, ranks_per_host).members

    @property
    def num_streams(self) -> int:
        """Streams of rows of one operation that begin or end here."""
        return num_streams(self.hosts, self.transport.rank)

    @property
    def window(self) -> int:
        """Pieces of one stream on their way."""
        return WINDOW

    def bound_bytes(self, row: RowBytes, num_topk: int, max_tokens: int) -> int:
        """Return what one operation keeps of rows that cross, at most."""
        sizes = {"num_topk": num_topk, "max_tokens": max_tokens, "straight_bytes": self.straight.most_bytes}
        return bound_bytes(self.hosts, self.transport.rank, row, chunk_bytes=self.chunk_bytes, **sizes)


def far_ranks(hosts: HostMap, rank: int) -> Words:
    """Return int64 [R]: NEAR for ranks of the host of ``rank``, 0 for those of others."""
    return np.where(hosts.host_R == hosts.host_R[rank], NEAR, 0).astype(np.int64)


def num_streams(hosts: HostMap, rank: int) -> int:
    """Count the streams of rows of one operation that begin or end at ``rank``, were all rows forwarded."""
    return len(hosts.far_hosts(rank)) + len(hosts.sources_of(rank))


def bound_bytes(
    hosts: HostMap,
    rank: int,
    row: RowBytes,
    *,
    num_topk: int,
    max_tokens: int,
    straight_bytes: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> int:
    """Return what one operation keeps of rows that cross on one rank, at most.

    Pieces of all streams, each of ``chunk_bytes`` or of a single token: as many rows as it has columns; for each stream
    that is summed here as if it crossed, one more. The columns of the tokens of the sources for which this rank
    forwards, for a plan is made of whole batches. And what goes straight and comes straight, up to ``straight_bytes`` a
    host and a rank; twice that, as experts may return rows that are twice as wide as expected.
    """
    if hosts.num_hosts == 1:
        return 0
    streams = num_streams(hosts, rank)
    widest = max(row.sent, num_topk * (row.y + row.topk_weights))
    pieces = (streams * WINDOW + hosts.num_hosts) * (max(chunk_bytes, widest) + PIECE_GAPS)
    columns = len(hosts.sources_of(rank)) * max_tokens * row.topk_idx
    far_ranks = len(hosts.host_R) - len(hosts.near(rank))
    return pieces + columns + 2 * straight_bytes * (hosts.num_hosts - 1 + far_ranks)


def look_across(transport: HierarchicalTransport, placement: Placement, straight: StraightRule) -> Across:
    """Return the tables of one rank."""
    hosts = transport.hosts
    return Across(
        transport=transport,
        host_E=np.ascontiguousarray(hosts.host_R[placement.expert_rank_E]),
        number_E=np.arange(placement.num_experts, dtype=np.int32),
        first_M=np.array([members[0] for members in hosts.members], np.int32),
        far_R=far_ranks(hosts, transport.rank),
        chunk_bytes=CHUNK_BYTES,
        straight=straight,
    )
