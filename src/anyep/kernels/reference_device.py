"""The oracle of what a device works out by itself; slow and plain, on host memory."""

from __future__ import annotations

import torch

from anyep.kernels.reference import ReferenceKernels
from anyep.kernels.reference_memory import IDX_DTYPES, read, write
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


class ReferenceDeviceKernels(ReferenceKernels):
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
        entry_rank_addr: int,
        entry_slot_addr: int,
        rank_rows_addr: int,
        expert_rows_addr: int,
        verdict_addr: int,
    ) -> None:
        topk_idx = read(topk_idx_addr, IDX_DTYPES[idx_bytes], num_tokens, num_topk)
        bad_TK = (topk_idx < -1) | (topk_idx >= num_experts)
        first_bad = [*bad_TK.flatten().nonzero().flatten().tolist(), NO_FAULT][0]
        write(verdict_addr, read(verdict_addr, torch.int64, 1).clamp(max=first_bad))
        good = torch.where(bad_TK, -1, topk_idx)
        self.route(
            *(good.data_ptr(), idx_bytes, num_tokens, num_topk, num_experts, num_ranks, expert_rank_addr, by_expert),
            *(entry_rank_addr, entry_slot_addr, rank_rows_addr, expert_rows_addr, 0),
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
        send_start_addr: int,
        dense_start_addr: int,
        recv_rows_addr: int,
        recv_start_addr: int,
        counts_addr: int,
        block_start_addr: int,
        filled_rows_addr: int,
        expert_total_addr: int,
        gap_begin_addr: int,
        gap_end_addr: int,
    ) -> None:
        messages = range(board_addr, board_addr + num_ranks * message_bytes, message_bytes)
        told = [read(one + 8 * HEAD_WORDS, torch.int32, num_ranks + num_experts) for one in messages]
        rank_rows_RR, expert_rows_RE = ([one[:num_ranks] for one in told], [one[num_ranks:] for one in told])
        owner_E = read(expert_rank_addr, torch.int32, num_experts).tolist()
        total_E = sum(expert_rows_RE, torch.zeros(num_experts, dtype=torch.int32))
        own = [expert for expert in range(num_experts) if owner_E[expert] == rank]
        _put(expert_total_addr, total_E.tolist())
        _put(counts_addr, total_E[own].tolist())
        if not by_expert:
            start_RR = _before(torch.stack(rank_rows_RR))
            _put(send_start_addr, start_RR[rank].tolist())
            _put(recv_rows_addr, [int(one[rank]) for one in rank_rows_RR])
            _put(recv_start_addr, start_RR[:, rank].tolist())
            _put(filled_rows_addr, sum(rank_rows_RR, torch.zeros(num_ranks, dtype=torch.int32)).tolist())
            return
        rows_E = [block_rows or -(-total // alignment) * alignment for total in total_E.tolist()]
        start_E, filled_R = _one_behind_the_other(rows_E, owner_E, num_ranks)
        dense_E, _ = _one_behind_the_other(total_E.tolist(), owner_E, num_ranks)
        before_RE = _before(torch.stack(expert_rows_RE))
        start_RE = before_RE + torch.tensor(start_E, dtype=torch.int32)
        _put(filled_rows_addr, filled_R)
        _put(send_start_addr, start_RE[rank].tolist())
        if block_rows:
            _put(dense_start_addr, (before_RE[rank] + torch.tensor(dense_E, dtype=torch.int32)).tolist())
        write(recv_rows_addr, torch.stack(expert_rows_RE)[:, own])
        write(recv_start_addr, start_RE[:, own])
        _put(block_start_addr, [start_E[expert] for expert in own])
        _put(gap_begin_addr, [start_E[expert] + int(total_E[expert]) for expert in own])
        filled_E = total_E.tolist() if block_rows else rows_E
        _put(gap_end_addr, [start_E[expert] + filled_E[expert] for expert in own])

    def connect(
        self,
        board_addr: int,
        message_bytes: int,
        rank: int,
        num_ranks: int,
        base_addr: int,
        filled_rows_addr: int,
        static_rows: int,
        expert_total_addr: int,
        num_experts: int,
        block_rows: int,
        tables_addr: int,
        summary_addr: int,
        fault_addr: int,
        num_gaps: int,
        gap_begin_addr: int,
        gap_end_addr: int,
    ) -> None:
        messages = range(board_addr, board_addr + num_ranks * message_bytes, message_bytes)
        heads = [read(one, torch.int64, HEAD_WORDS).tolist() for one in messages]
        filled = read(filled_rows_addr, torch.int32, num_ranks).tolist() if filled_rows_addr else []
        batch = [static_rows if static_rows >= 0 or not filled else rows for rows in filled or [0] * num_ranks]
        guilty = [source for source, head in enumerate(heads) if head[FAULT] != NO_FAULT]
        if guilty:
            code = BAD_EXPERT
        elif not filled:
            code = SETTLED
        elif block_rows and int(read(expert_total_addr, torch.int32, num_experts).max()) > block_rows:
            code = BLOCK_TOO_SMALL
        elif any(rows > room for rows, room in zip(filled, batch, strict=True)):
            code = STATIC_TOO_SMALL
        elif any(rows > head[CAPACITY] for rows, head in zip(batch, heads, strict=True)):
            code = LANDING_TOO_SMALL
        else:
            code = SETTLED
        first = guilty[0] if guilty else num_ranks
        summary = torch.tensor([code, batch[rank], first, heads[first][FAULT] if guilty else NO_FAULT])
        write(summary_addr, summary)
        if fault_addr and code != SETTLED:
            write(fault_addr, summary)
        base = read(base_addr, torch.int64, num_ranks).tolist()
        write(tables_addr, torch.tensor(_tables(heads, base, settled=code == SETTLED)))
        if code != SETTLED:
            _put(gap_begin_addr, [0] * num_gaps)
            _put(gap_end_addr, [0] * num_gaps)
        if static_rows >= 0 and filled:
            _put(gap_begin_addr + 4 * num_gaps, [filled[rank] if code == SETTLED else 0])
            _put(gap_end_addr + 4 * num_gaps, [batch[rank]])

    def withdraw(
        self, summary_addr: int, entry_rank_addr: int, num_entries: int, counts_addr: int, num_local: int
    ) -> None:
        if int(read(summary_addr, torch.int64, 1)) != SETTLED:
            _put(entry_rank_addr, [-1] * num_entries)
            _put(counts_addr, [0] * num_local)

    def tick(self, clock_addr: int, epoch_addr: int) -> None:
        epoch = read(clock_addr, torch.int64, 1) + 1
        write(clock_addr, epoch)
        write(epoch_addr, epoch)

    def signal(self, peer_word_addr: int, num_ranks: int, epoch_addr: int, counts_addr: int) -> None:
        epoch = int(read(epoch_addr, torch.int64, 1))
        counts = read(counts_addr, torch.int32, num_ranks).tolist() if counts_addr else [0] * num_ranks
        for word, count in zip(read(peer_word_addr, torch.int64, num_ranks).tolist(), counts, strict=True):
            if word:
                write(word, torch.tensor([epoch << 32 | count]))

    def wait(
        self,
        words_addr: int,
        num_ranks: int,
        epoch_addr: int,
        limit: int,
        counts_addr: int,
        errors_addr: int,
        error_bytes: int,
    ) -> None:
        epoch = int(read(epoch_addr, torch.int64, 1))
        for rank, word in enumerate(read(words_addr, torch.int64, num_ranks).tolist()):  # nobody writes meanwhile
            if word >> 32 < epoch:
                write(errors_addr + rank * error_bytes, torch.tensor([epoch << 32 | word >> 32]))
            elif counts_addr:
                write(counts_addr + 4 * rank, torch.tensor([word & 0xFFFFFFFF], dtype=torch.int32))


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
