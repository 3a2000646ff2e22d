"""Which ranks share a host, and who passes on what comes from another host. Pure integers.

A token crosses the network once for each destination host. There the *forwarder* takes it: the rank with the same index
in its host as the sender has in its own (the same *rail*), so that all ranks of a host share the work.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class HostMap:
    """Hosts are numbered in the order of their first ranks."""

    host_R: NDArray[np.int32]
    """the host of each rank"""
    members: tuple[tuple[int, ...], ...]
    """the ranks of each host that take part, ascending"""

    @property
    def num_hosts(self) -> int:
        return len(self.members)

    def near(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that share memory with ``rank``, itself included."""
        return self.members[self.host_R[rank]]

    def far_hosts(self, rank: int) -> tuple[int, ...]:
        """Return the other hosts where anybody is, the next one first, so that not all ranks begin with the same."""
        own, count = int(self.host_R[rank]), self.num_hosts
        others = ((own + step) % count for step in range(1, count))
        return tuple(host for host in others if self.members[host])

    def far_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of other hosts, ascending."""
        return tuple(sorted(other for host in self.far_hosts(rank) for other in self.members[host]))

    def forwarder(self, source: int, host: int) -> int:
        """Return who takes at ``host`` what ``source``, a rank of another host, sends there."""
        index = self.near(source).index(source)
        return self.members[host][index % len(self.members[host])]

    def sources_of(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of other hosts for which ``rank`` forwards, ascending."""
        own = int(self.host_R[rank])
        return tuple(source for source in self.far_ranks(rank) if self.forwarder(source, own) == rank)

    def without(self, ranks: Collection[int]) -> HostMap:
        """Return the same hosts with these ranks left out: the others forward for each other.

        >>> hosts = map_hosts(["a", "a", "a", "b", "b"])
        >>> left = hosts.without([0, 4])
        >>> left.members, left.forwarder(2, 1), left.sources_of(3)
        (((1, 2), (3,)), 3, (1, 2))
        """
        members = tuple(tuple(rank for rank in one if rank not in ranks) for one in self.members)
        return HostMap(host_R=self.host_R, members=members)


def map_hosts(names: Sequence[str]) -> HostMap:
    """Group ranks by the name of their host, one name a rank.

    >>> hosts = map_hosts(["a", "a", "a", "b", "b"])
    >>> hosts.members, hosts.forwarder(2, 1), hosts.sources_of(3)
    (((0, 1, 2), (3, 4)), 3, (0, 2))
    """
    numbers: dict[str, int] = {}
    host_R = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)
    members = tuple(tuple(np.flatnonzero(host_R == host).tolist()) for host in range(len(numbers)))
    return HostMap(host_R=host_R, members=members)


def group_ranks(num_ranks: int, ranks_per_host: int) -> HostMap:
    """Let consecutive ranks play hosts of ``ranks_per_host``, the last perhaps a smaller one.

    >>> group_ranks(5, 2).members
    ((0, 1), (2, 3), (4,))
    """
    return map_hosts([str(rank // ranks_per_host) for rank in range(num_ranks)])
