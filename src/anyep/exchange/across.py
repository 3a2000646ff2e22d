"""What an endpoint on several hosts has besides: who lives where, and the tables with which tokens cross."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyep.exchange.ledger import NEAR
from anyep.layout.hosts import HostMap, group_ranks
from anyep.layout.placement import Placement
from anyep.transport.base import Words
from anyep.transport.hierarchical import HierarchicalTransport

CHUNK_BYTES = 1 << 20
"""Rows cross in pieces of about this size; at 1 Gbit/s one takes 8 ms."""
WINDOW = 2
"""Pieces of one pair of ranks on their way: one crosses while the other is packed, or unpacked."""


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
    nobody_R: Words
    """[R]: NEAR for ranks of this host, 0 for others"""

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
    def num_far_pairs(self) -> int:
        """Pairs of ranks, both ways, between which rows cross here."""
        rank = self.transport.rank
        return len(self.hosts.far_hosts(rank)) + len(self.hosts.sources_of(rank))

    @property
    def chunk_memory_bytes(self) -> int:
        """What the pieces that are on their way take at most, in one operation."""
        return self.num_far_pairs * WINDOW * CHUNK_BYTES


def look_across(transport: HierarchicalTransport, placement: Placement) -> Across:
    """Return the tables of one rank."""
    hosts = transport.hosts
    near_R = hosts.host_R == hosts.host_R[transport.rank]
    return Across(
        transport=transport,
        host_E=np.ascontiguousarray(hosts.host_R[placement.expert_rank_E]),
        number_E=np.arange(placement.num_experts, dtype=np.int32),
        first_M=np.array([members[0] for members in hosts.members], np.int32),
        nobody_R=np.where(near_R, NEAR, 0).astype(np.int64),
    )
