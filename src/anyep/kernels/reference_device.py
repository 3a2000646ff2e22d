"""The oracle of what a device works out by itself; slow and plain, on host memory."""

from __future__ import annotations

import torch

from anyep.kernels.reference_memory import IDX_DTYPES, read, write
from anyep.kernels.reference_sending import ReferenceSending
from anyep.kernels.spec_device import (
    BAD,
    BAD_EXPERT,
    BLOCK_TOO_SMALL,
    CAPACITY,
    FAULT,
    FIRST_PLACE,
    HEAD_WORDS,
    LANDING_TOO_SMALL,
    NO_FAULT,
    NUM_PLACES,
    SETTLED,
    STATIC_TOO_SMALL,
)

Lists = list[list[int]]


class ReferenceDeviceKernels(ReferenceSending):
    """A :class:`~anyep.kernels.spec_device.DeviceKernels` whose device is the host; its docstrings are the spec's."""

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
    ) -> None:
        topk_idx = read(topk_idx_addr, IDX_DTYPES[idx_bytes], num_tokens, num_topk)
        if kept_weights_addr:
            write(kept_weights_addr, read(topk_weights_addr, torch.float32, num_tokens, num_topk))
        kept = torch.where((topk_idx < -1) | (topk_idx >= num_experts), BAD, topk_idx)
        write(kept_idx_addr, kept)
        owner_E = [*read(expert_rank_addr, torch.int32, num_experts).tolist(), -1]
        ranks_TK = [[owner_E[max(expert, -1)] for expert in experts] for experts in kept.tolist()]
        width = num_topk if by_expert else min(num_topk, num_ranks)
        for token, ranks in enumerate(ranks_TK):
            entry = ranks if by_expert else sorted({rank for rank in ranks if rank >= 0})
            entry += [-1] * (width - len(entry))
            _put(entry_rank_addr + 4 * token * width, entry)
            for column, rank in enumerate(entry):
                if rank < 0:
                    _put(entry_slot_addr + 4 * (token * width + column), [-1])

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
        width = num_topk if by_expert else min(num_topk, num_ranks)
        ranks = read(entry_rank_addr, torch.int32, num_tokens * width).tolist()
        rows = dict.fromkeys(range(num_ranks), 0), dict.fromkeys(range(num_experts), 0)
        for expert in (one for one in flat if one >= 0):
            rows[1][expert] += 1
        seen: dict[int, int] = {}
        for entry, rank in enumerate(ranks):
            if rank >= 0:
                bin_ = flat[entry] if by_expert else rank
                _put(entry_slot_addr + 4 * entry, [seen.get(bin_, 0)])
                seen[bin_] = seen.get(bin_, 0) + 1
                rows[0][rank] += 1
        _put(rank_rows_addr, list(rows[0].values()))
        _put(expert_rows_addr, list(rows[1].values()))
        write(verdict_addr, torch.tensor([flat.index(BAD) if BAD in flat else NO_FAULT]))
        if peer_message_addr:
            counts = torch.tensor([*rows[0].values(), *rows[1].values()], dtype=torch.int32)
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

    def settle(
        self,
        board_addr: int,
        message_bytes: int,
        rank: int,
        num_ranks: int,
        num_experts: int,
        num_local: int,
        expert_rank_addr: int,
        expert_local_addr: int,
        by_expert: int,
        alignment: int,
        block_rows: int,
        static_rows: int,
        withdraws: int,
        base_addr: int,
        tables_addr: int,
        summary_addr: int,
        fault_addr: int,
        send_start_addr: int,
        dense_start_addr: int,
        recv_rows_addr: int,
        recv_start_addr: int,
        counts_addr: int,
        block_start_addr: int,
        filled_rows_addr: int,
        gap_begin_addr: int,
        gap_end_addr: int,
        source_begin_addr: int,
        source_count_addr: int,
        num_tokens: int,
        width: int,
        topk_idx_addr: int,
        idx_bytes: int,
        entry_rank_addr: int,
        entry_slot_addr: int,
        entry_row_addr: int,
    ) -> None:
        messages = range(board_addr, board_addr + num_ranks * message_bytes, message_bytes)
        told = [read(one + 8 * HEAD_WORDS, torch.int32, num_ranks + num_experts) for one in messages]
        rank_rows_RR, expert_rows_RE = (
            torch.stack([one[:num_ranks] for one in told]),
            torch.stack([one[num_ranks:] for one in told]),
        )
        owner_E = read(expert_rank_addr, torch.int32, num_experts).tolist()
        total_E = expert_rows_RE.sum(dim=0, dtype=torch.int32)
        own = [expert for expert in range(num_experts) if owner_E[expert] == rank]
        _put(counts_addr, total_E[own].tolist())
        if by_expert:
            rows_E = [block_rows or -(-total // alignment) * alignment for total in total_E.tolist()]
            start_E, filled_R = _one_behind_the_other(rows_E, owner_E, num_ranks)
            dense_E, _ = _one_behind_the_other(total_E.tolist(), owner_E, num_ranks)
            before_RE = _before(expert_rows_RE)
            start_RE = before_RE + torch.tensor(start_E, dtype=torch.int32)
            _put(send_start_addr, start_RE[rank].tolist())
            write(recv_rows_addr, expert_rows_RE[:, own])
            write(recv_start_addr, start_RE[:, own])
            _put(block_start_addr, [start_E[expert] for expert in own])
            _put(gap_begin_addr, [start_E[expert] + int(total_E[expert]) for expert in own])
            filled_E = total_E.tolist() if block_rows else rows_E
            _put(gap_end_addr, [start_E[expert] + filled_E[expert] for expert in own])
        else:
            filled_R = rank_rows_RR.sum(dim=0, dtype=torch.int32).tolist()
            start_RR = _before(rank_rows_RR)
            _put(send_start_addr, start_RR[rank].tolist())
            _put(recv_rows_addr, rank_rows_RR[:, rank].tolist())
            _put(recv_start_addr, start_RR[:, rank].tolist())
        if block_rows:
            _put(dense_start_addr, (before_RE[rank] + torch.tensor(dense_E, dtype=torch.int32)).tolist())
        if by_expert and source_begin_addr:
            write(source_begin_addr, before_RE[:, own].T)
            write(source_count_addr, expert_rows_RE[:, own].T)
        _put(filled_rows_addr, filled_R)
        self.place(
            *(entry_rank_addr, entry_slot_addr, num_tokens, width, topk_idx_addr, idx_bytes, by_expert),
            *(send_start_addr, entry_row_addr),
        )
        heads = [read(one, torch.int64, HEAD_WORDS).tolist() for one in messages]
        batch_R = filled_R if static_rows < 0 else [static_rows] * num_ranks
        if block_rows and int(total_E.max()) > block_rows:
            code = BLOCK_TOO_SMALL
        elif any(rows > room for rows, room in zip(filled_R, batch_R, strict=True)):
            code = STATIC_TOO_SMALL
        elif any(rows > head[CAPACITY] for rows, head in zip(batch_R, heads, strict=True)):
            code = LANDING_TOO_SMALL
        else:
            code = SETTLED
        code = _conclude(heads, code, batch_R[rank], base_addr, tables_addr, summary_addr, fault_addr)
        if code != SETTLED and by_expert:
            _put(gap_begin_addr, [0] * num_local)
            _put(gap_end_addr, [0] * num_local)
        if static_rows >= 0:
            _put(gap_begin_addr + 4 * num_local, [filled_R[rank] if code == SETTLED else 0])
            _put(gap_end_addr + 4 * num_local, [static_rows])
        if withdraws and code != SETTLED:
            _put(entry_rank_addr, [-1] * num_tokens * width)
            _put(counts_addr, [0] * num_local)

    def connect(
        self,
        board_addr: int,
        message_bytes: int,
        num_ranks: int,
        base_addr: int,
        num_rows: int,
        tables_addr: int,
        summary_addr: int,
        fault_addr: int,
        entry_rank_addr: int,
        num_entries: int,
    ) -> None:
        messages = range(board_addr, board_addr + num_ranks * message_bytes, message_bytes)
        heads = [read(one, torch.int64, HEAD_WORDS).tolist() for one in messages]
        code = _conclude(heads, SETTLED, num_rows, base_addr, tables_addr, summary_addr, fault_addr)
        if code != SETTLED:
            _put(entry_rank_addr, [-1] * num_entries)


def _conclude(
    heads: Lists,
    code: int,
    num_rows: int,
    base_addr: int,
    tables_addr: int,
    summary_addr: int,
    fault_addr: int,
) -> int:
    """Write tables and summary, and return what was found: ``code``, or BAD_EXPERT before all else."""
    num_ranks = len(heads)
    first = next((source for source, head in enumerate(heads) if head[FAULT] != NO_FAULT), num_ranks)
    code = code if first == num_ranks else BAD_EXPERT
    verdict = NO_FAULT if first == num_ranks else heads[first][FAULT]
    summary = torch.tensor([code, num_rows, first, verdict])
    write(summary_addr, summary)
    if fault_addr and code != SETTLED:
        write(fault_addr, summary)
    base = read(base_addr, torch.int64, num_ranks).tolist()
    write(tables_addr, torch.tensor(_tables(heads, base, settled=code == SETTLED)))
    return code


def _tables(heads: Lists, base: list[int], *, settled: bool) -> Lists:
    def address(head: list[int], origin: int, part: int) -> int:
        place = head[FIRST_PLACE + part]
        return origin + place if settled and place >= 0 else 0

    return [[address(head, origin, p) for head, origin in zip(heads, base, strict=True)] for p in range(NUM_PLACES)]


def _before(rows: torch.Tensor) -> torch.Tensor:
    """Return how many rows earlier sources have in each bin."""
    return (rows.cumsum(dim=0) - rows).int()


def _one_behind_the_other(rows_E: list[int], owner_E: list[int], num_ranks: int) -> tuple[list[int], list[int]]:
    """Return where each expert begins at its owner, and how many rows each owner has."""
    filled, starts = [0] * num_ranks, []
    for rows, owner in zip(rows_E, owner_E, strict=True):
        starts.append(filled[owner])
        filled[owner] += rows
    return starts, filled


def _put(address: int, numbers: list[int]) -> None:
    write(address, torch.tensor(numbers, dtype=torch.int32))
