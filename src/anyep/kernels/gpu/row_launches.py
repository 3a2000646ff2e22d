"""Rows as bytes: how the spec's calls become grids. Legend: kernels/spec.py."""

from __future__ import annotations

import torch

from anyep.kernels.gpu import expansion, rows, transposition
from anyep.kernels.gpu.grids import NUMBER_BLOCK, PIECE, parts, power_of_two
from anyep.kernels.gpu.routing_launches import RoutingLaunches
from anyep.kernels.spec_device import NO_FAULT

_KEYS, _FEW_KEYS = 1024, 64
_TILE = 32


class RowLaunches(RoutingLaunches):
    """The part of :class:`~anyep.kernels.spec_rows.RowKernels` that moves; its docstrings are the spec's."""

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
        pieces = parts(row_bytes, PIECE)
        step = self._step(last_token - first_token, pieces)
        self._launch(
            rows.scatter,
            (step, pieces),
            *(x_addr, row_bytes, first_token, last_token, step, width, entry_rank_addr, entry_row_addr, peer_addr),
            PLACES=power_of_two(width, 8),
            PIECE=PIECE,
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
        step = self._share(num_sources * num_local) if out_x_addr or out_scales_addr else 0
        self._launch(
            expansion.expand,
            (num_sources, num_local, step + 1),
            *(x_bytes if out_x_addr else 0, scale_bytes if out_scales_addr else 0, num_topk, num_local),
            *(rows_addr, start_addr, x_addr, scales_addr, idx_addr, weights_addr, token_addr),
            *(out_x_addr, out_scales_addr, out_idx_addr, out_weights_addr, out_token_addr),
            IDX_BYTES=idx_bytes,
            COLUMNS=power_of_two(num_topk, 8),
            KEYS=_KEYS,
            FEW_KEYS=_FEW_KEYS,
            PIECE=PIECE,
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
            (num_blocks, parts(block_rows, _TILE), parts(columns, _TILE)),
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
        step = parts(row_bytes, PIECE)
        numbers = (row_bytes, index_addr, rows_per_rank, peer_addr, out_addr, step)
        self._launch(rows.gather, (num_rows, step), *numbers, IDX_BYTES=idx_bytes, PIECE=PIECE)

    def check_numbers(self, index_addr: int, idx_bytes: int, num_rows: int, most: int, verdict_addr: int) -> None:
        """Let int64 ``verdict`` take the minimum of itself and the first position of a number outside [0, most)."""
        self._launch(
            rows.check_numbers,
            (parts(num_rows, NUMBER_BLOCK),),
            *(index_addr, num_rows, most, verdict_addr),
            IDX_BYTES=idx_bytes,
            BLOCK=NUMBER_BLOCK,
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
        step = min(self._share(1), parts(num_bytes, PIECE))
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
