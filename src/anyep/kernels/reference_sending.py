"""The oracle of what a device does with rows and words in one launch; slow and plain, on host memory."""

from __future__ import annotations

import torch

from anyep.kernels.reference import ReferenceKernels
from anyep.kernels.reference_memory import read, write


class ReferenceSending(ReferenceKernels):
    """Part of :class:`~anyep.kernels.spec_device.DeviceKernels`; its docstrings are the spec's."""

    def fill_gaps(self, num_gaps: int, gap_begin_addr: int, gap_end_addr: int, *parts: int) -> None:
        for part, (base, row_bytes) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
            if base:
                self.fill_rows(base, row_bytes, num_gaps, gap_begin_addr, gap_end_addr, 0xFF if part == 2 else 0)

    def send(
        self,
        x_addr: int,
        element: int,
        hidden: int,
        scale_format: int,
        num_tokens: int,
        width: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_x_addr: int,
        peer_scales_addr: int,
        topk_idx_addr: int,
        idx_bytes: int,
        topk_weights_addr: int,
        num_topk: int,
        by_expert: int,
        expert_rank_addr: int,
        expert_local_addr: int,
        peer_idx_addr: int,
        peer_weights_addr: int,
        peer_token_addr: int,
    ) -> None:
        where = (0, num_tokens, width, entry_rank_addr, entry_row_addr, peer_x_addr)
        if scale_format < 0:
            self.scatter(x_addr, hidden, *where)
        else:
            self.quantise_scatter(x_addr, element, hidden, scale_format, *where, peer_scales_addr)
        self.scatter_routing(
            *(topk_idx_addr, idx_bytes, topk_weights_addr, 0, num_tokens, num_topk, width, by_expert),
            *(expert_rank_addr, expert_local_addr, entry_rank_addr, entry_row_addr),
            *(peer_idx_addr, peer_weights_addr, peer_token_addr),
        )

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

    def meet(
        self,
        peer_word_addr: int,
        words_addr: int,
        num_ranks: int,
        epoch_addr: int,
        limit: int,
        errors_addr: int,
        error_bytes: int,
    ) -> None:
        self.signal(peer_word_addr, num_ranks, epoch_addr, 0)
        self.wait(words_addr, num_ranks, epoch_addr, limit, 0, errors_addr, error_bytes)
