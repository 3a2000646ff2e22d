"""The half of the GPU set that moves: how the spec's calls become grids. Legend: kernels/spec.py."""

from __future__ import annotations

import torch
import triton

from anyep.kernels.gpu import expansion, routing, rows, transposition
from anyep.kernels.gpu.launch import Constants, Launch
from anyep.kernels.gpu.target import Target

NO_FAULT = 2**63 - 1
"""The verdict where every expert is one."""
PIECE = 2048
"""Bytes of a row that a program moves: 16 for each of its 128 threads."""
_NUM_THREADS = 128
_SMALL = 64
_ROUTE_BLOCK = 4096
_ROUTE_THREADS = 512
_PLACE_BLOCK = 1024
_CUBE, _SQUARE = 2048, 1024
"""Pairs of columns that a program compares, or columns that it only reads: those of as many tokens as fit."""
_KEYS, _FEW_KEYS = 1024, 128
_TILE = 32


def power_of_two(n: int, least: int) -> int:
    """Return the least power of two that is at least ``n`` and ``least``, so that few numbers make few kernels."""
    return max(least, int(triton.next_power_of_2(n)))


class RowLaunches:
    """:class:`~anyep.kernels.spec_rows.RowKernels`; its docstrings are the spec's."""

    def __init__(self, device: torch.device, target: Target, launch: Launch) -> None:
        self.device = device
        self.target = target
        self._launch_one = launch

    def _launch(
        self,
        kernel: object,
        grid: tuple[int, ...],
        *numbers: int,
        threads: int = _NUM_THREADS,
        **constants: int,
    ) -> None:
        if 0 not in grid:
            self._launch_one(kernel, grid, numbers, constants, threads)

    def _share(self, num_stretches: int) -> int:
        """Return how many programs share a stretch whose length only the device knows."""
        return max(1, self.target.programs // max(1, num_stretches))

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
            (triton.cdiv(num_tokens * width, _PLACE_BLOCK),),
            *(entry_rank_addr, entry_slot_addr, num_tokens * width, topk_idx_addr, start_addr, entry_row_addr),
            IDX_BYTES=idx_bytes,
            BY_EXPERT=by_expert,
            BLOCK=_PLACE_BLOCK,
        )

    def scatter(
        self,
        x_addr: int,
        row_bytes: int,
        first_token: int,
        last_token: int,
        width: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_addr: int,
    ) -> None:
        self._launch(
            rows.scatter,
            (last_token - first_token, triton.cdiv(row_bytes, PIECE)),
            *(x_addr, row_bytes, first_token, width, entry_rank_addr, entry_row_addr, peer_addr),
            PLACES=power_of_two(width, 8),
            PIECE=PIECE,
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
        self._launch(
            routing.scatter_routing,
            (last_token - first_token,),
            *(topk_idx_addr, topk_weights_addr, first_token, num_topk, width, expert_rank_addr, expert_local_addr),
            *(entry_rank_addr, entry_row_addr, peer_idx_addr, peer_weights_addr, peer_token_addr),
            threads=_SMALL,
            IDX_BYTES=idx_bytes,
            BY_EXPERT=by_expert,
            COLUMNS=power_of_two(num_topk, 8),
            PLACES=power_of_two(width, 8),
        )

    def unpack(
        self, row_bytes: int, num_sources: int, rows_addr: int, start_addr: int, packed_addr: int, base_addr: int
    ) -> None:
        step = self._share(num_sources)
        numbers = (row_bytes, rows_addr, start_addr, packed_addr, base_addr, step)
        self._launch(rows.unpack, (num_sources, step), *numbers, PIECE=PIECE)

    def pack(
        self,
        row_bytes: int,
        num_peers: int,
        num_bins: int,
        rows_addr: int,
        start_addr: int,
        base_addr: int,
        packed_addr: int,
    ) -> None:
        step = self._share(num_peers * num_bins)
        self._launch(
            rows.pack,
            (num_peers, num_bins, step),
            *(row_bytes, num_bins, rows_addr, start_addr, base_addr, packed_addr, step),
            BINS=power_of_two(num_bins, 8),
            PIECE=PIECE,
        )

    def expand(
        self,
        x_bytes: int,
        scale_bytes: int,
        num_topk: int,
        idx_bytes: int,
        num_sources: int,
        num_local: int,
        rows_addr: int,
        start_addr: int,
        scratch_addr: int,
        x_addr: int,
        scales_addr: int,
        idx_addr: int,
        weights_addr: int,
        token_addr: int,
        out_x_addr: int,
        out_scales_addr: int,
        out_idx_addr: int,
        out_weights_addr: int,
        out_token_addr: int,
    ) -> None:
        step = self._share(num_sources * num_local)
        for row_bytes, table_addr, out_addr in (
            (x_bytes, x_addr, out_x_addr),
            (scale_bytes, scales_addr, out_scales_addr),
        ):
            if out_addr and row_bytes:
                self._launch(
                    expansion.expand_rows,
                    (num_sources, num_local, step),
                    *(row_bytes, num_topk, num_local, rows_addr, start_addr, x_addr, table_addr, idx_addr, out_addr),
                    step,
                    IDX_BYTES=idx_bytes,
                    KEYS=_KEYS,
                    PIECE=PIECE,
                )
        if out_idx_addr or out_weights_addr or out_token_addr:
            self._launch(
                expansion.expand_routing,
                (num_sources, num_local),
                *(num_topk, num_local, rows_addr, start_addr, x_addr, idx_addr, weights_addr, token_addr),
                *(out_idx_addr, out_weights_addr, out_token_addr),
                IDX_BYTES=idx_bytes,
                COLUMNS=power_of_two(num_topk, 8),
                KEYS=_FEW_KEYS,
            )

    def transpose_scales(
        self,
        num_blocks: int,
        block_rows: int,
        columns: int,
        counts_addr: int,
        source_addr: int,
        destination_addr: int,
    ) -> None:
        self._launch(
            transposition.transpose_scales,
            (num_blocks, triton.cdiv(block_rows, _TILE), triton.cdiv(columns, _TILE)),
            *(block_rows, columns, counts_addr, source_addr, destination_addr),
            TILE=_TILE,
        )

    def begin_gather(
        self,
        row_bytes: int,
        num_rows: int,
        index_addr: int,
        idx_bytes: int,
        rows_per_rank: int,
        peer_addr: int,
        out_addr: int,
    ) -> None:
        """Do what ``gather`` does with numbers that are right, without waiting for the device."""
        step = triton.cdiv(row_bytes, PIECE)
        numbers = (row_bytes, index_addr, rows_per_rank, peer_addr, out_addr, step)
        self._launch(rows.gather, (num_rows, step), *numbers, IDX_BYTES=idx_bytes, PIECE=PIECE)

    def check_numbers(self, index_addr: int, idx_bytes: int, num_rows: int, most: int, verdict_addr: int) -> None:
        """Let int64 ``verdict`` take the minimum of itself and the first position of a number outside [0, most)."""
        self._launch(
            rows.check_numbers,
            (triton.cdiv(num_rows, _PLACE_BLOCK),),
            *(index_addr, num_rows, most, verdict_addr),
            IDX_BYTES=idx_bytes,
            BLOCK=_PLACE_BLOCK,
        )

    def gather(
        self,
        row_bytes: int,
        num_rows: int,
        index_addr: int,
        idx_bytes: int,
        rows_per_rank: int,
        num_ranks: int,
        peer_addr: int,
        out_addr: int,
    ) -> int:
        """As the spec says; waits for the device between looking at the numbers and fetching rows."""
        verdict = torch.full((1,), NO_FAULT, dtype=torch.int64, device=self.device)
        self.check_numbers(index_addr, idx_bytes, num_rows, num_ranks * rows_per_rank, verdict.data_ptr())
        first_bad = int(verdict.item())
        if first_bad != NO_FAULT:
            return first_bad
        self.begin_gather(row_bytes, num_rows, index_addr, idx_bytes, rows_per_rank, peer_addr, out_addr)
        return -1

    def copy(self, source_addr: int, destination_addr: int, num_bytes: int) -> None:
        step = min(self.target.programs, triton.cdiv(num_bytes, PIECE))
        self._launch(rows.copy, (step,), source_addr, destination_addr, num_bytes, step, PIECE=PIECE)

    def fill_rows(
        self, base_addr: int, row_bytes: int, num_gaps: int, gap_begin_addr: int, gap_end_addr: int, byte: int
    ) -> None:
        step = self._share(num_gaps)
        numbers = (base_addr, row_bytes, gap_begin_addr, gap_end_addr, byte, step)
        self._launch(rows.fill_rows, (num_gaps, step), *numbers, PIECE=PIECE)

    def fence(self) -> None:
        """Nothing to do: what a kernel wrote is visible to kernels that come after it on its stream.

        For other devices, the kernel that signals releases it (kernels/gpu/flags.py).
        """
