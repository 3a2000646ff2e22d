"""Who gets what, and which row that is: how the spec's calls become grids. Legend: kernels/spec.py."""

from __future__ import annotations

import torch

from anyep.kernels.gpu import routing
from anyep.kernels.gpu.grids import NUMBER_BLOCK, SMALL, Launches, parts, power_of_two
from anyep.kernels.spec_device import NO_FAULT

_ROUTE_BLOCK = 4096
_ROUTE_THREADS = 512
_CUBE, _SQUARE = 2048, 1024
"""Pairs of columns that a program compares, or columns that it only reads: those of as many tokens as fit."""


class RoutingLaunches(Launches):
    """The part of :class:`~anyep.kernels.spec_rows.RowKernels` that decides; its docstrings are the spec's."""

    def begin_route(
        self,
        topk_idx_addr: int,
        idx_bytes: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        num_ranks: int,
        expert_rank_addr: int,
        by_expert: int,
        topk_weights_addr: int,
        kept_idx_addr: int,
        kept_weights_addr: int,
        entry_rank_addr: int,
        entry_slot_addr: int,
        compact_rank_addr: int,
        compact_slot_addr: int,
    ) -> None:
        columns = power_of_two(num_topk, 8)
        compact = not by_expert or compact_rank_addr != 0
        tokens = max(1, _CUBE // columns**2 if compact else _SQUARE // columns)
        entries = (entry_rank_addr, entry_slot_addr)
        self._launch(
            routing.find_entries,
            (parts(num_tokens, tokens),),
            *(topk_idx_addr, num_tokens, num_topk, num_experts, _width(num_topk, num_ranks, 0)),
            *(expert_rank_addr, topk_weights_addr, kept_idx_addr, kept_weights_addr, *entries),
            *((compact_rank_addr, compact_slot_addr) if by_expert else entries),
            IDX_BYTES=idx_bytes,
            BY_EXPERT=by_expert,
            COMPACT=int(compact),
            COLUMNS=columns,
            TOKENS=tokens,
        )

    def announce_counts(
        self,
        kept_idx_addr: int,
        idx_bytes: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        num_ranks: int,
        by_expert: int,
        entry_rank_addr: int,
        entry_slot_addr: int,
        compact_rank_addr: int,
        compact_slot_addr: int,
        rank_rows_addr: int,
        expert_rows_addr: int,
        verdict_addr: int,
        peer_message_addr: int,
        capacity: int,
        place0: int,
        place1: int,
        place2: int,
        place3: int,
        place4: int,
    ) -> None:
        compact = not by_expert or compact_rank_addr != 0
        num_entries = num_tokens * _width(num_topk, num_ranks, int(not compact))
        ranks_addr = compact_rank_addr or entry_rank_addr
        self._launch(
            routing.number_entries,
            (num_experts + num_ranks + 1,),
            *(kept_idx_addr, num_tokens * num_topk, ranks_addr, num_entries, num_experts, num_ranks),
            *(entry_slot_addr, compact_slot_addr or entry_slot_addr, rank_rows_addr, expert_rows_addr, verdict_addr),
            *(peer_message_addr, capacity, place0, place1, place2, place3, place4),
            threads=_ROUTE_THREADS,
            IDX_BYTES=idx_bytes,
            BY_EXPERT=by_expert,
            COMPACT=int(compact),
            RANKS=power_of_two(num_ranks, 8),
            BLOCK=_ROUTE_BLOCK,
        )

    def route(
        self,
        topk_idx_addr: int,
        idx_bytes: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        num_ranks: int,
        expert_rank_addr: int,
        by_expert: int,
        entry_rank_addr: int,
        entry_slot_addr: int,
        rank_rows_addr: int,
        expert_rows_addr: int,
        scratch_addr: int,
    ) -> int:
        """As the spec says; waits for the device, as it returns what the device found. ``scratch`` is not used."""
        kept = torch.empty(idx_bytes * num_tokens * num_topk + 8, dtype=torch.uint8, device=self.device)
        verdict, kept_addr = torch.empty(1, dtype=torch.int64, device=self.device), kept.data_ptr()
        sizes = (idx_bytes, num_tokens, num_topk, num_experts, num_ranks)
        entries = (entry_rank_addr, entry_slot_addr)
        self.begin_route(topk_idx_addr, *sizes, expert_rank_addr, by_expert, 0, kept_addr, 0, *entries, 0, 0)
        self.announce_counts(
            *(kept_addr, *sizes, by_expert, *entries, 0, 0, rank_rows_addr, expert_rows_addr, verdict.data_ptr()),
            *(0, 0, -1, -1, -1, -1, -1),
        )
        first_bad = int(verdict.item())
        return -1 if first_bad == NO_FAULT else first_bad

    def place(
        self,
        entry_rank_addr: int,
        entry_slot_addr: int,
        num_tokens: int,
        width: int,
        topk_idx_addr: int,
        idx_bytes: int,
        by_expert: int,
        start_addr: int,
        entry_row_addr: int,
    ) -> None:
        entries = (entry_rank_addr, entry_slot_addr, num_tokens * width)
        self._place_entries(*entries, topk_idx_addr, idx_bytes, by_expert, start_addr, entry_row_addr, 0)

    def _place_entries(
        self,
        entry_rank_addr: int,
        entry_slot_addr: int,
        num_entries: int,
        topk_idx_addr: int,
        idx_bytes: int,
        by_expert: int,
        start_addr: int,
        entry_row_addr: int,
        refusal_addr: int,
    ) -> None:
        self._launch(
            routing.place,
            (parts(num_entries, NUMBER_BLOCK),),
            *(entry_rank_addr, entry_slot_addr, num_entries, topk_idx_addr, start_addr, entry_row_addr, refusal_addr),
            IDX_BYTES=idx_bytes,
            BY_EXPERT=by_expert,
            BLOCK=NUMBER_BLOCK,
        )

    def scatter_routing(
        self,
        topk_idx_addr: int,
        idx_bytes: int,
        topk_weights_addr: int,
        first_token: int,
        last_token: int,
        num_topk: int,
        width: int,
        by_expert: int,
        expert_rank_addr: int,
        expert_local_addr: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_idx_addr: int,
        peer_weights_addr: int,
        peer_token_addr: int,
    ) -> None:
        step = self._step(last_token - first_token, 1)
        self._launch(
            routing.scatter_routing,
            (step,),
            *(topk_idx_addr, topk_weights_addr, first_token, last_token, step, num_topk, width, by_expert),
            *(expert_rank_addr, expert_local_addr, entry_rank_addr, entry_row_addr),
            *(peer_idx_addr, peer_weights_addr, peer_token_addr),
            threads=SMALL,
            IDX_BYTES=idx_bytes,
            COLUMNS=power_of_two(num_topk, 8),
            PLACES=power_of_two(width, 8),
        )


def _width(num_topk: int, num_ranks: int, by_expert: int) -> int:
    return num_topk if by_expert else min(num_topk, num_ranks)
