"""The oracle of what a rank tells the others of its tokens; slow and plain, on host memory."""

from __future__ import annotations

import torch

from anyep.kernels.reference_memory import IDX_DTYPES, put, read, write
from anyep.kernels.reference_sending import ReferenceSending
from anyep.kernels.spec_device import BAD, HEAD_WORDS, NO_FAULT


class ReferenceAnnouncing(ReferenceSending):
    """Part of :class:`~anyep.kernels.spec_device.DeviceKernels`; its docstrings are the spec's."""

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
        topk_idx = read(topk_idx_addr, IDX_DTYPES[idx_bytes], num_tokens, num_topk)
        if kept_weights_addr:
            write(kept_weights_addr, read(topk_weights_addr, torch.float32, num_tokens, num_topk))
        kept = torch.where((topk_idx < -1) | (topk_idx >= num_experts), BAD, topk_idx)
        write(kept_idx_addr, kept)
        owner_E = [*read(expert_rank_addr, torch.int32, num_experts).tolist(), -1]
        ranks_TK = [[owner_E[max(expert, -1)] for expert in experts] for experts in kept.tolist()]
        compact_TW = [sorted({rank for rank in ranks if rank >= 0}) for ranks in ranks_TK]
        _put_entries(
            ranks_TK if by_expert else compact_TW,
            _width(num_topk, num_ranks, by_expert),
            entry_rank_addr,
            entry_slot_addr,
        )
        if compact_rank_addr:
            _put_entries(compact_TW, _width(num_topk, num_ranks, 0), compact_rank_addr, compact_slot_addr)

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
        flat = read(kept_idx_addr, IDX_DTYPES[idx_bytes], num_tokens * num_topk).tolist()
        ranks = read(entry_rank_addr, torch.int32, num_tokens * _width(num_topk, num_ranks, by_expert)).tolist()
        keys = [expert if rank >= 0 else -1 for expert, rank in zip(flat, ranks, strict=True)] if by_expert else ranks
        _number(keys, entry_slot_addr)
        if compact_rank_addr:
            ranks = read(compact_rank_addr, torch.int32, num_tokens * _width(num_topk, num_ranks, 0)).tolist()
            _number(ranks, compact_slot_addr)
        rows = [ranks.count(rank) for rank in range(num_ranks)], [flat.count(expert) for expert in range(num_experts)]
        put(rank_rows_addr, rows[0])
        put(expert_rows_addr, rows[1])
        write(verdict_addr, torch.tensor([flat.index(BAD) if BAD in flat else NO_FAULT]))
        if peer_message_addr:
            counts = torch.tensor([*rows[0], *rows[1]], dtype=torch.int32)
            self.announce(
                *(num_ranks, peer_message_addr, capacity, place0, place1, place2, place3, place4),
                *(verdict_addr, counts.data_ptr(), len(counts)),
            )

    def announce(
        self,
        num_ranks: int,
        peer_message_addr: int,
        capacity: int,
        place0: int,
        place1: int,
        place2: int,
        place3: int,
        place4: int,
        verdict_addr: int,
        counts_addr: int,
        num_counts: int,
    ) -> None:
        verdict = int(read(verdict_addr, torch.int64, 1)) if verdict_addr else NO_FAULT
        head = torch.tensor([capacity, place0, place1, place2, place3, place4, verdict])
        for message in read(peer_message_addr, torch.int64, num_ranks).tolist():
            if message:
                write(message, head)
                write(message + 8 * HEAD_WORDS, read(counts_addr, torch.int32, num_counts))


def _width(num_topk: int, num_ranks: int, by_expert: int) -> int:
    return num_topk if by_expert else min(num_topk, num_ranks)


def _put_entries(ranks_TW: list[list[int]], width: int, rank_addr: int, slot_addr: int) -> None:
    """Write the ranks of entries, filled up with -1, and -1 in the slots beside those."""
    for token, ranks in enumerate(ranks_TW):
        entry = ranks + [-1] * (width - len(ranks))
        put(rank_addr + 4 * token * width, entry)
        for column, rank in enumerate(entry):
            if rank < 0:
                put(slot_addr + 4 * (token * width + column), [-1])


def _number(keys: list[int], slot_addr: int) -> None:
    """Give equal keys their numbers in order; -1 has none."""
    seen: dict[int, int] = {}
    for entry, key in enumerate(keys):
        if key >= 0:
            put(slot_addr + 4 * entry, [seen.get(key, 0)])
            seen[key] = seen.get(key, 0) + 1
