"""Which tokens of a batch cross to which host: routed like rows to ranks, with hosts in the place of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anyep.exchange.across import Across
from anyep.exchange.ledger import NEAR
from anyep.kernels.spec import KernelSet
from anyep.transport.base import Words

if TYPE_CHECKING:
    from anyep.exchange.handle import SendPlan


class Crossing:
    """One batch's tokens by host; stays with the plan. W = min(K, M) entries a token."""

    def __init__(self, across: Across, kernels: KernelSet, plan: SendPlan) -> None:
        hosts, num_topk = across.hosts, plan.geometry.num_topk
        num_experts = across.host_E.size
        self.width = min(num_topk, hosts.num_hosts)
        self.entry_host_TW = np.empty((plan.num_tokens, self.width), np.int32)
        self.entry_slot_TW = np.empty((plan.num_tokens, self.width), np.int32)
        self.tokens_M = np.empty(hosts.num_hosts, np.int32)
        """tokens for each host, its own included, which do not cross"""
        counts_E, scratch = np.empty(num_experts, np.int32), np.empty(hosts.num_hosts + num_experts, np.int32)
        kernels.route(
            plan.idx_addr,
            plan.idx_bytes,
            plan.num_tokens,
            num_topk,
            num_experts,
            hosts.num_hosts,
            address_of(across.host_E),
            0,
            address_of(self.entry_host_TW),
            address_of(self.entry_slot_TW),
            address_of(self.tokens_M),
            address_of(counts_E),
            address_of(scratch),
        )
        self.rows_M = np.bincount(across.host_E, counts_E, hosts.num_hosts).astype(np.int64)
        """(token, column) pairs for each host"""
        self.copies_M = np.bincount(hosts.host_R, plan.numbers("rank_rows"), hosts.num_hosts).astype(np.int64)
        """(token, rank) pairs for each host"""
        tokens_R = self.tokens_M[hosts.host_R].astype(np.int64)
        self.far_tokens_R: Words = np.where(across.nobody_R == NEAR, NEAR, tokens_R)

    def tokens_for(self, host: int) -> NDArray[np.int64]:
        """Return the numbers of the tokens that cross to ``host``, ascending."""
        return np.flatnonzero((self.entry_host_TW == host).any(axis=1))


def address_of(array: NDArray[np.int32] | NDArray[np.int64] | NDArray[np.uint8]) -> int:
    """Return where an array's first element lies."""
    address: int = array.__array_interface__["data"][0]
    return address
