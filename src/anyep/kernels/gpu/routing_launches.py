"""Who gets what, and which row that is: how the spec's calls become grids. Legend: kernels/spec.py."""

from __future__ import annotations

import torch
import triton

from anyep.kernels.gpu import routing
from anyep.kernels.gpu.grids import NUMBER_BLOCK, SMALL, Launches, power_of_two
from anyep.kernels.gpu.launch import Constants
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
        entry_rank_addr: int,
        entry_slot_addr: int,
        rank_rows_addr: int,
        expert_rows_addr: int,
        verdict_addr: int,
    ) -> None:
        """Do what ``route`` does without waiting for the device: int64 ``verdict`` takes the minimum of itself and the
        flat index of the first expert outside. Whoever calls sets it to ``NO_FAULT`` before.
        """
        width = num_topk if by_expert else min(num_topk, num_ranks)
        columns = power_of_two(num_topk, 8)
        constants: Constants = {"IDX_BYTES": idx_bytes, "BY_EXPERT": by_expert}
        tokens = max(1, _SQUARE // columns if by_expert else _CUBE // columns**2)
        self._launch(
            routing.find_entries,
            (triton.cdiv(num_tokens, tokens),),
            *(topk_idx_addr, num_tokens, num_topk, num_experts, width),
            *(expert_rank_addr, entry_rank_addr, entry_slot_addr, verdict_addr),
            **constants,
            COLUMNS=columns,
            TOKENS=tokens,
        )
        self._launch(
            routing.number_entries,
            (num_experts + num_ranks,),
            *(topk_idx_addr, num_tokens * num_topk, entry_rank_addr, num_tokens * width, num_experts),
            *(entry_slot_addr, rank_rows_addr, expert_rows_addr),
            threads=_ROUTE_THREADS,
            **constants,
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
        verdict = torch.full((1,), NO_FAULT, dtype=torch.int64, device=self.device)
        self.begin_route(
            *(topk_idx_addr, idx_bytes, num_tokens, num_topk, num_experts, num_ranks, expert_rank_addr, by_expert),
            *(entry_rank_addr, entry_slot_addr, rank_rows_addr, expert_rows_addr, verdict.data_ptr()),
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
        self._launch(
            routing.place,
            (triton.cdiv(num_tokens * width, NUMBER_BLOCK),),
            *(entry_rank_addr, entry_slot_addr, num_tokens * width, topk_idx_addr, start_addr, entry_row_addr),
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
            *(
                topk_idx_addr,
                topk_weights_addr,
                first_token,
                last_token,
                step,
                num_topk,
                width,
                expert_rank_addr,
                expert_local_addr,
            ),
            *(entry_rank_addr, entry_row_addr, peer_idx_addr, peer_weights_addr, peer_token_addr),
            threads=SMALL,
            IDX_BYTES=idx_bytes,
            BY_EXPERT=by_expert,
            COLUMNS=power_of_two(num_topk, 8),
            PLACES=power_of_two(width, 8),
        )
