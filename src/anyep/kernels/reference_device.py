"""The oracle of what a device works out by itself; slow and plain, on host memory."""

from __future__ import annotations

import torch

from anyep.kernels.reference_announcing import ReferenceAnnouncing
from anyep.kernels.reference_memory import put, read, write
from anyep.kernels.spec_device import (
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


class ReferenceDeviceKernels(ReferenceAnnouncing):
    """A :class:`~anyep.kernels.spec_device.DeviceKernels` whose device is the host; its docstrings are the spec's."""

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
        source_rows_addr: int,
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
        rank_rows_RR = torch.stack([one[:num_ranks] for one in told])
        expert_rows_RE = torch.stack([one[num_ranks:] for one in told])
        owner_E = read(expert_rank_addr, torch.int32, num_experts).tolist()
        total_E = expert_rows_RE.sum(dim=0, dtype=torch.int32)
        own = [expert for expert in range(num_experts) if owner_E[expert] == rank]
        put(counts_addr, total_E[own].tolist())
        if by_expert:
            rows_E = [block_rows or -(-total // alignment) * alignment for total in total_E.tolist()]
            start_E, filled_R = _one_behind_the_other(rows_E, owner_E, num_ranks)
            dense_E, _ = _one_behind_the_other(total_E.tolist(), owner_E, num_ranks)
            before_RE = _before(expert_rows_RE)
            start_RE = before_RE + torch.tensor(start_E, dtype=torch.int32)
            put(send_start_addr, start_RE[rank].tolist())
            write(recv_rows_addr, expert_rows_RE[:, own])
            write(recv_start_addr, start_RE[:, own])
            put(block_start_addr, [start_E[expert] for expert in own])
            put(gap_begin_addr, [start_E[expert] + int(total_E[expert]) for expert in own])
            filled_E = total_E.tolist() if block_rows else rows_E
            put(gap_end_addr, [start_E[expert] + filled_E[expert] for expert in own])
        else:
            filled_R = rank_rows_RR.sum(dim=0, dtype=torch.int32).tolist()
            start_RR = _before(rank_rows_RR)
            put(send_start_addr, start_RR[rank].tolist())
            put(recv_rows_addr, rank_rows_RR[:, rank].tolist())
            put(recv_start_addr, start_RR[:, rank].tolist())
        if block_rows:
            put(dense_start_addr, (before_RE[rank] + torch.tensor(dense_E, dtype=torch.int32)).tolist())
        if by_expert and source_begin_addr:
            write(source_begin_addr, before_RE[:, own].T)
            write(source_count_addr, expert_rows_RE[:, own].T)
        put(filled_rows_addr, filled_R)
        self.place(
            *(entry_rank_addr, entry_slot_addr, num_tokens, width, topk_idx_addr, idx_bytes, by_expert),
            *(send_start_addr, entry_row_addr),
        )
        heads = [read(one, torch.int64, HEAD_WORDS).tolist() for one in messages]
        batch_R = filled_R if static_rows < 0 else [static_rows] * num_ranks
        crowded = block_rows and int(total_E.max()) > block_rows
        code = BLOCK_TOO_SMALL if crowded else _fit(filled_R, batch_R, heads)
        code = _conclude(heads, code, batch_R[rank], base_addr, tables_addr, summary_addr, fault_addr)
        if code != SETTLED and by_expert:
            put(gap_begin_addr, [0] * num_local)
            put(gap_end_addr, [0] * num_local)
        if static_rows >= 0:
            put(gap_begin_addr + 4 * num_local, [filled_R[rank] if code == SETTLED else 0])
            put(gap_end_addr + 4 * num_local, [static_rows])
        withdrawn = withdraws and code != SETTLED
        if by_expert and source_rows_addr:
            put(source_rows_addr, [0] * num_ranks if withdrawn else rank_rows_RR[:, rank].tolist())
        if withdrawn:
            put(entry_rank_addr, [-1] * num_tokens * width)
            put(counts_addr, [0] * num_local)

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
            put(entry_rank_addr, [-1] * num_entries)


def _fit(filled_R: list[int], batch_R: list[int], heads: Lists) -> int:
    """Return whether every rank's rows fit its batch, and every batch the memory that its rank offers."""
    if any(rows > room for rows, room in zip(filled_R, batch_R, strict=True)):
        return STATIC_TOO_SMALL
    if any(rows > head[CAPACITY] for rows, head in zip(batch_R, heads, strict=True)):
        return LANDING_TOO_SMALL
    return SETTLED


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
