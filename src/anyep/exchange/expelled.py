"""Operations under way in which a rank has turned out to take no part: as if nothing had been meant for it."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from anyep.exchange import ledger
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.handle import SendPlan
from anyep.exchange.opening import BODY
from anyep.transport.base import Words


def forget_rows_to(end: Endpoint, plan: SendPlan, gone: Collection[int], opened_RW: Words) -> None:
    """Take the ranks out of a dispatch's plan, and of what all announced (a copy), before places are known."""
    experts = np.flatnonzero(np.isin(end.placement.expert_rank_E, [*gone]))
    counts_RC = opened_RW.view(np.int32)[:, 2 * (BODY + ledger.COUNTS) :]
    counts_RC[:, [*gone]] = 0
    counts_RC[:, end.num_ranks + experts] = 0
    plan.numbers("rank_rows")[[*gone]] = 0
    plan.numbers("expert_rows")[experts] = 0
    idx_TK = plan.topk_idx().numpy()
    idx_TK[np.isin(idx_TK, experts)] = -1
    compact = plan.words(plan.compact_rank_addr, plan.num_tokens * plan.compact_width)
    for ranks in (compact, plan.entry_ranks()):
        ranks[np.isin(ranks, [*gone])] = -1


def forget_rows_from(plan: SendPlan, gone: Collection[int]) -> None:
    """Take the ranks out of a dispatch that was, before its rows are combined: none come back from them, none go."""
    ranks_TW = plan.entry_ranks()
    ranks_TW[np.isin(ranks_TW, [*gone])] = -1
    for name in ("rank_entries", "source_entries"):
        plan.numbers(name)[[*gone]] = 0
