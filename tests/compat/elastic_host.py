"""The smallest heir of the collective calls, on rank threads."""

from __future__ import annotations

import anyep
from anyep.compat.deep_ep.elastic_collectives import ElasticCollectives


class Host(ElasticCollectives):
    def __init__(self, member, num_bytes=4 << 20, num_cpu_bytes=2 << 20, timeout_s=20.0):
        self.group = member
        self.rank_idx = member.rank
        self.num_ranks = member.size
        self.num_bytes = num_bytes
        self.num_cpu_bytes = num_cpu_bytes
        self.timeout_s = timeout_s


def on_ranks(num_ranks, function, **sizes):
    """Return what ``function(host)`` returns on each rank."""

    def rank_main(member):
        host = Host(member, **sizes)
        try:
            return function(host)
        finally:
            host.close_collectives()
            host.close_collectives()

    return anyep.local_group(num_ranks).run(rank_main)
