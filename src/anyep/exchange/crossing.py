"""Which tokens of a batch cross to which host: routed like rows to ranks, with hosts in the place of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anyep.exchange.across import Across
from anyep.exchange.ledger import NEAR, STRAIGHT
from anyep.kernels.spec import KernelSet
from anyep.machine.addresses import address_of
from anyep.transport.base import Words

if TYPE_CHECKING:
    from anyep.exchange.handle import SendPlan


class Crossing:
    """One batch's tokens by host; stays with the plan. W = min(K, M) entries a token."""

    def __init__(self, across: Across, kernels: KernelSet, plan: SendPlan, output_bytes: int) -> None:
        """``output_bytes``: of a row of the experts' outputs, in the dtype in which they are expected."""
        hosts, num_topk = across.hosts, plan.geometry.num_topk
        self.hosts = hosts
        """as they were when this was routed: ranks that are left out since forwarded for others"""
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
        tokens_R = self.tokens_M[hosts.host_R].astype(np.int64)
        self.straight_M = straight_hosts(across, plan, self, output_bytes)
        """hosts to whose ranks rows go straight; nothing is forwarded there"""
        straight_R = self.straight_M[hosts.host_R]
        self.far_tokens_R: Words = np.where(across.far_R == NEAR, NEAR, np.where(straight_R, STRAIGHT, tokens_R))
        self.straight_ranks: list[int] = np.flatnonzero(straight_R & (plan.numbers("rank_rows") > 0)).tolist()
        """those that get rows straight"""

    def tokens_for(self, host: int) -> NDArray[np.int64]:
        """Return the numbers of the tokens that cross to ``host``, ascending."""
        return np.flatnonzero((self.entry_host_TW == host).any(axis=1))


def check_forwarders(across: Across | None, crossing: Crossing | None) -> None:
    """Raise ValueError where others forward now than when a handle was made."""
    if across is not None and crossing is not None and crossing.hosts.members != across.hosts.members:
        raise ValueError(
            "others were left out when this handle was made, and between hosts ranks forward for each other: dispatch "
            "again, with topk_idx"
        )


def straight_hosts(across: Across, plan: SendPlan, crossing: Crossing, output_bytes: int) -> NDArray[np.bool_]:
    """Return to which hosts this batch's rows go straight, [M]."""
    geometry, hosts = plan.geometry, across.hosts
    chosen_M = np.zeros(hosts.num_hosts, np.bool_)
    row_bytes, back_bytes = geometry.eager_row.sent, output_bytes + geometry.row.topk_weights
    rows_R = plan.numbers("rank_rows")
    for host in hosts.far_hosts(across.transport.rank):
        rows, tokens, pairs = (
            int(rows_R[list(hosts.members[host])].sum()),
            crossing.tokens_M[host],
            crossing.rows_M[host],
        )
        there = rows * row_bytes, int(tokens) * row_bytes
        straight_back = int(pairs) if geometry.by_expert else rows
        forwarded_back = int(pairs if geometry.padded else tokens)
        back = straight_back * back_bytes, forwarded_back * back_bytes
        chosen_M[host] = rows > 0 and across.straight.pays(there, back)
    return chosen_M
