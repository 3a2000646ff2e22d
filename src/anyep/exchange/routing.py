"""From topk_idx to a plan: who gets which token, decided alone (kernels: route)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anyep.exchange.handle import SendPlan

if TYPE_CHECKING:
    from anyep.exchange.endpoint import Endpoint
    from anyep.exchange.geometry import Geometry


def plan_of(end: Endpoint, geometry: Geometry, idx_addr: int, num_tokens: int) -> SendPlan:
    """Route ``topk_idx`` [n, K]; ValueError for an expert that does not exist."""
    shape, ledger = geometry.plan_shape(num_tokens), geometry.shape
    memory = np.empty(shape.num_words, np.int32)
    first_addr = end.books.keep(memory, ledger.num_words, idx_addr, shape.idx_bytes, ledger.tokens_word, num_tokens)
    plan = SendPlan(geometry, memory, first_addr, num_tokens, shape)
    if geometry.by_expert:  # its numbers of rows a rank are not needed, and overwritten
        _route(end, plan, 1, plan.entry_rank_addr, plan.entry_slot_addr)
    _route(end, plan, 0, plan.compact_rank_addr, plan.compact_slot_addr)
    return plan


def _route(end: Endpoint, plan: SendPlan, by_expert: int, entry_rank_addr: int, entry_slot_addr: int) -> None:
    bytes_at, first = plan.geometry.shape.bytes_at, plan.first_addr
    bad = end.kernels.route(
        plan.idx_addr,
        plan.idx_bytes,
        plan.num_tokens,
        end.num_topk,
        end.placement.num_experts,
        end.num_ranks,
        end.tables.rank_addr,
        by_expert,
        entry_rank_addr,
        entry_slot_addr,
        first + bytes_at["rank_rows"],
        first + bytes_at["expert_rows"],
        first + bytes_at["scratch"],
    )
    if bad >= 0:
        token, column = divmod(bad, end.num_topk)
        raise ValueError(
            f"topk_idx[{token}, {column}] is {int(plan.topk_idx()[token, column])}; experts are 0 to "
            f"{end.placement.num_experts - 1}, and -1 means none"
        )


def order_entries(end: Endpoint, plan: SendPlan) -> None:
    """Let compact entries of a wire with sums by column stand in that order: no other use asks for one."""
    if not end.wire.by_column or plan.geometry.by_expert:
        return
    plan.by_column = True
    routing = (plan.idx_addr, plan.idx_bytes, plan.num_tokens, end.num_topk, end.tables.rank_addr)
    end.books.sort_by_column(*routing, plan.width, plan.entry_rank_addr, plan.entry_slot_addr)
