"""The oracle's half that moves: routes, and rows as bytes."""

from __future__ import annotations

import torch

from anyep.kernels.reference_memory import IDX_DTYPES, entries, peer, read, write, write_row


class ReferenceRows:
    """:class:`~anyep.kernels.spec_rows.RowKernels`; its docstrings are the spec's."""

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
        topk_idx = read(topk_idx_addr, IDX_DTYPES[idx_bytes], num_tokens, num_topk)
        bad = torch.nonzero(((topk_idx < -1) | (topk_idx >= num_experts)).flatten())
        if len(bad):
            return int(bad[0])
        expert_rank = read(expert_rank_addr, torch.int32, num_experts).tolist()
        width = num_topk if by_expert else min(num_topk, num_ranks)
        entry_rank = torch.full((num_tokens, width), -1, dtype=torch.int32)
        entry_slot = torch.full((num_tokens, width), -1, dtype=torch.int32)
        rank_rows, expert_rows = [0] * num_ranks, [0] * num_experts
        for t, experts in enumerate(topk_idx.tolist()):
            ranks = [expert_rank[e] if e >= 0 else -1 for e in experts]
            entry_ranks = ranks if by_expert else sorted({rank for rank in ranks if rank >= 0})
            for j, rank in enumerate(entry_ranks):
                if rank >= 0:
                    entry_rank[t, j] = rank
                    entry_slot[t, j] = expert_rows[experts[j]] if by_expert else rank_rows[rank]
                    rank_rows[rank] += 1
                    expert_rows[experts[j]] += by_expert
            for e in experts if not by_expert else []:
                expert_rows[e] += e >= 0
        write(entry_rank_addr, entry_rank)
        write(entry_slot_addr, entry_slot)
        write(rank_rows_addr, torch.tensor(rank_rows, dtype=torch.int32))
        write(expert_rows_addr, torch.tensor(expert_rows, dtype=torch.int32))
        return -1

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
        entry_row = torch.full((num_tokens, width), -1, dtype=torch.int32)
        for t, entry in enumerate(entries(0, num_tokens, width, entry_rank_addr, entry_slot_addr)):
            for rank, slot, j in entry:
                bin_ = rank
                if by_expert:
                    bin_ = int(read(topk_idx_addr + (t * width + j) * idx_bytes, IDX_DTYPES[idx_bytes], 1))
                entry_row[t, j] = slot + int(read(start_addr + 4 * bin_, torch.int32, 1))
        write(entry_row_addr, entry_row)

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
        named = entries(first_token, last_token, width, entry_rank_addr, entry_row_addr)
        for t, entry in enumerate(named, start=first_token):
            row = read(x_addr + t * row_bytes, torch.uint8, row_bytes)
            for rank, place, _ in entry:
                write_row(peer_addr, rank, place, row)

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
        K, idx_dtype = num_topk, IDX_DTYPES[idx_bytes]
        named = entries(first_token, last_token, width, entry_rank_addr, entry_row_addr)
        for t, entry in enumerate(named, start=first_token):
            experts = read(topk_idx_addr + t * K * idx_bytes, idx_dtype, K).tolist()
            ranks = [int(read(expert_rank_addr + 4 * e, torch.int32, 1)) if e >= 0 else -1 for e in experts]
            local = [int(read(expert_local_addr + 4 * e, torch.int32, 1)) if e >= 0 else -1 for e in experts]
            for rank, row, j in entry:
                serves = torch.tensor([k == j if by_expert else ranks[k] == rank for k in range(K)])
                idx = torch.where(serves, torch.tensor(local), -1).to(idx_dtype)
                write_row(peer_idx_addr, rank, row, idx)
                if topk_weights_addr:
                    weight_bits = read(topk_weights_addr + t * K * 4, torch.int32, K)
                    write_row(peer_weights_addr, rank, row, torch.where(serves, weight_bits, 0))
                write_row(peer_token_addr, rank, row, torch.tensor([t], dtype=torch.int32))

    def unpack(
        self,
        row_bytes: int,
        num_sources: int,
        rows_addr: int,
        start_addr: int,
        packed_addr: int,
        base_addr: int,
    ) -> None:
        rows, start = (read(address, torch.int32, num_sources).tolist() for address in (rows_addr, start_addr))
        for s, source in enumerate(read(packed_addr, torch.int64, num_sources).tolist()):
            if source:
                write(base_addr + start[s] * row_bytes, read(source, torch.uint8, rows[s] * row_bytes))

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
        rows, start = (read(address, torch.int32, num_peers, num_bins).tolist() for address in (rows_addr, start_addr))
        for p, target in enumerate(read(packed_addr, torch.int64, num_peers).tolist()):
            if target:
                bins = zip(rows[p], start[p], strict=True)
                write(target, torch.cat([_rows(base_addr, row_bytes, first, count) for count, first in bins]))

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
        K, L, idx_dtype = num_topk, num_local, IDX_DTYPES[idx_bytes]
        rows = read(rows_addr, torch.int32, num_sources).tolist()
        for s in range(num_sources):
            following = read(start_addr + 4 * s * L, torch.int32, L).tolist()
            idx_NK = read(peer(idx_addr, s), idx_dtype, rows[s], K).tolist() if peer(x_addr, s) else []
            for n, k, expert in [(n, k, expert) for n, idx_K in enumerate(idx_NK) for k, expert in enumerate(idx_K)]:
                if expert < 0:
                    continue
                row = following[expert]
                following[expert] += 1
                if out_x_addr:
                    write(out_x_addr + row * x_bytes, _rows(peer(x_addr, s), x_bytes, n, 1))
                if out_scales_addr:
                    write(out_scales_addr + row * scale_bytes, _rows(peer(scales_addr, s), scale_bytes, n, 1))
                if out_idx_addr:
                    idx_K = torch.full((K,), -1, dtype=idx_dtype)
                    idx_K[k] = expert
                    write(out_idx_addr + row * K * idx_bytes, idx_K)
                if out_weights_addr:
                    bits_K = torch.zeros(K, dtype=torch.int32)
                    bits_K[k] = read(peer(weights_addr, s) + 4 * (n * K + k), torch.int32, 1)
                    write(out_weights_addr + row * K * 4, bits_K)
                if out_token_addr:
                    write(out_token_addr + 4 * row, _rows(peer(token_addr, s), 4, n, 1))

    def transpose_scales(
        self,
        num_blocks: int,
        block_rows: int,
        columns: int,
        counts_addr: int,
        source_addr: int,
        destination_addr: int,
    ) -> None:
        for b, count in enumerate(read(counts_addr, torch.int32, num_blocks).tolist()):
            first = b * block_rows * columns
            words = read(source_addr + 4 * first, torch.int32, count, columns)
            for c in range(columns):
                write(destination_addr + 4 * (first + c * block_rows), words[:, c])

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
        index = read(index_addr, IDX_DTYPES[idx_bytes], num_rows).tolist()
        for position, number in enumerate(index):
            if not 0 <= number < num_ranks * rows_per_rank:
                return position
        for position, number in enumerate(index):
            rank, row = divmod(number, rows_per_rank)
            write(out_addr + position * row_bytes, _rows(peer(peer_addr, rank), row_bytes, row, 1))
        return -1

    def copy(self, source_addr: int, destination_addr: int, num_bytes: int) -> None:
        write(destination_addr, read(source_addr, torch.uint8, num_bytes))

    def fill_rows(
        self, base_addr: int, row_bytes: int, num_gaps: int, gap_begin_addr: int, gap_end_addr: int, byte: int
    ) -> None:
        begins = read(gap_begin_addr, torch.int32, num_gaps).tolist()
        ends = read(gap_end_addr, torch.int32, num_gaps).tolist()
        for begin, end in zip(begins, ends, strict=True):
            filling = torch.full(((end - begin) * row_bytes,), byte, dtype=torch.uint8)
            write(base_addr + begin * row_bytes, filling)

    def fence(self) -> None:
        """Nothing to do: every store here is an ordinary one, made by calls that the compiler cannot reorder."""


def _rows(base_addr: int, row_bytes: int, first: int, count: int) -> torch.Tensor:
    return read(base_addr + first * row_bytes, torch.uint8, count * row_bytes)
