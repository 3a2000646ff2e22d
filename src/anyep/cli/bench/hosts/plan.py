"""What is to be measured between hosts, and the least that has to cross."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.cli.bench.ours import DTYPES
from anyep.cli.bench.plan import WIRE_BYTES, Plan, Workload
from anyep.layout.hosts import HostMap, map_hosts
from anyep.numerics.formats import num_scale_groups
from anyep.testing.oracle import Exchange

_LARGE_ROUNDS, _SMALL_ROUNDS = 5, 21
_WEIGHT_BYTES, _SCALE_BYTES = 4, 4


@dataclass(frozen=True, kw_only=True)
class HostsPlan:
    """One set of hosts, and what its ranks do."""

    base: Plan
    ranks_per_host: tuple[int, ...]
    link_mbit: float | None
    """of each host, each way; None: as fast as this machine copies"""

    @property
    def hosts(self) -> HostMap:
        return map_hosts([str(host) for host, count in enumerate(self.ranks_per_host) for _ in range(count)])

    @property
    def link(self) -> str:
        """How fast the links are, for people."""
        return "links without a limit" if self.link_mbit is None else f"links of {self.link_mbit / 1e3:g} Gbit/s"

    def rounds_of(self, workload: Workload) -> int:
        """Return the timed rounds of a workload."""
        return self.base.rounds or (_SMALL_ROUNDS if workload.is_small else _LARGE_ROUNDS)


def far_tokens(exchange: Exchange, hosts: HostMap) -> NDArray[np.int64]:
    """Return [M, M]: how many tokens of each host (first index) have an expert on each other one; 0 for its own."""
    host_E = torch.from_numpy(hosts.host_R)[torch.tensor(exchange.expert_rank)]
    crossing = np.zeros((hosts.num_hosts, hosts.num_hosts), np.int64)
    for rank, routing in enumerate(exchange.routing):
        host_TK = host_E[routing.topk_idx.long()]
        for host in hosts.far_hosts(rank):
            crossing[hosts.host_R[rank], host] += int((host_TK == host).any(dim=1).sum())
    return crossing


def least_bytes(workload: Workload, exchange: Exchange, hosts: HostMap, op: str) -> int:
    """Return the bytes that have to cross in an operation, all hosts together, without any headers.

    Dispatch: once for each (token, other host) the token in the wire format with its scales, and for each of its K
    columns the expert in the fewest whole bytes and the weight in fp32. Combine: once a row of what experts return.
    """
    index_bytes = -(-(workload.experts - 1).bit_length() // 8)
    there = workload.hidden * WIRE_BYTES[workload.wire] + workload.topk * (index_bytes + _WEIGHT_BYTES)
    there += _SCALE_BYTES * num_scale_groups(workload.hidden) if workload.wire == "fp8" else 0
    back = workload.hidden * DTYPES[workload.wire].itemsize
    row = {"dispatch": there, "combine": back}.get(op, there + back)
    return row * int(far_tokens(exchange, hosts).sum())
