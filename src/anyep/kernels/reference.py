"""The oracle: every kernel as the plainest NumPy and torch that says what the spec says. Slow, portable, complete.

Memory is read by copy and written by copy, so that a kernel touches exactly the bytes that its lines name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from math import prod

import torch

from anyep.kernels.spec import Element, ScaleFormat
from anyep.numerics.fp8 import dequantise_fp8, quantise_fp8
from anyep.numerics.rounding import round_to

_IDX_DTYPES = {4: torch.int32, 8: torch.int64}


def read(address: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a copy of the dense array of ``shape`` at ``address``, which need not be aligned."""
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(ctypes.string_at(address, num_bytes)), dtype=dtype).view(shape)


def write(address: int, values: torch.Tensor) -> None:
    """Put the bytes of ``values``, row-major, at ``address``."""
    dense = values.contiguous()
    if dense.nbytes:
        ctypes.memmove(address, dense.data_ptr(), dense.nbytes)


def entries(
    first_token: int, last_token: int, width: int, entry_rank_addr: int, entry_row_addr: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Yield for each token of [first, last) its (rank, row, column) triples in column order, without rank -1."""
    skip = 4 * first_token * width
    ranks = read(entry_rank_addr + skip, torch.int32, last_token - first_token, width).tolist()
    rows = read(entry_row_addr + skip, torch.int32, last_token - first_token, width).tolist()
    for rank_W, row_W in zip(ranks, rows, strict=True):
        yield [(rank, row, j) for j, (rank, row) in enumerate(zip(rank_W, row_W, strict=True)) if rank >= 0]


class ReferenceKernels:
    """A :class:`~anyep.kernels.spec.KernelSet`; its docstrings are the spec's."""

    name = "reference"

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
        topk_idx = read(topk_idx_addr, _IDX_DTYPES[idx_bytes], num_tokens, num_topk)
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
        entry_addr: int,
        num_tokens: int,
        width: int,
        topk_idx_addr: int,
        idx_bytes: int,
        by_expert: int,
        start_addr: int,
    ) -> None:
        for t, entry in enumerate(entries(0, num_tokens, width, entry_rank_addr, entry_addr)):
            for rank, slot, j in entry:
                bin_ = rank
                if by_expert:
                    bin_ = int(read(topk_idx_addr + (t * width + j) * idx_bytes, _IDX_DTYPES[idx_bytes], 1))
                start = read(start_addr + 4 * bin_, torch.int32, 1)
                write(entry_addr + 4 * (t * width + j), start + slot)

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
                write(_peer(peer_addr, rank) + place * row_bytes, row)

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
    ) -> None:
        K, idx_dtype = num_topk, _IDX_DTYPES[idx_bytes]
        named = entries(first_token, last_token, width, entry_rank_addr, entry_row_addr)
        for t, entry in enumerate(named, start=first_token):
            experts = read(topk_idx_addr + t * K * idx_bytes, idx_dtype, K).tolist()
            ranks = [int(read(expert_rank_addr + 4 * e, torch.int32, 1)) if e >= 0 else -1 for e in experts]
            local = [int(read(expert_local_addr + 4 * e, torch.int32, 1)) if e >= 0 else -1 for e in experts]
            for rank, row, j in entry:
                serves = torch.tensor([k == j if by_expert else ranks[k] == rank for k in range(K)])
                idx = torch.where(serves, torch.tensor(local), -1).to(idx_dtype)
                write(_peer(peer_idx_addr, rank) + row * K * idx_bytes, idx)
                if topk_weights_addr:
                    weight_bits = read(topk_weights_addr + t * K * 4, torch.int32, K)
                    bits = torch.where(serves, weight_bits, torch.zeros_like(weight_bits))
                    write(_peer(peer_weights_addr, rank) + row * K * 4, bits)

    def quantise_scatter(
        self,
        x_addr: int,
        element: int,
        hidden: int,
        scale_format: int,
        first_token: int,
        last_token: int,
        width: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_q_addr: int,
        peer_scales_addr: int,
    ) -> None:
        dtype, form = Element(element).dtype, ScaleFormat(scale_format)
        named = entries(first_token, last_token, width, entry_rank_addr, entry_row_addr)
        for t, entry in enumerate(named, start=first_token):
            row = read(x_addr + t * hidden * dtype.itemsize, dtype, 1, hidden)
            q, scales = quantise_fp8(row, form)
            for rank, place, _ in entry:
                write(_peer(peer_q_addr, rank) + place * q.nbytes, q)
                write(_peer(peer_scales_addr, rank) + place * scales.nbytes, scales)

    def dequantise(
        self,
        q_addr: int,
        scales_addr: int,
        scale_format: int,
        num_rows: int,
        hidden: int,
        out_addr: int,
        element: int,
    ) -> None:
        form = ScaleFormat(scale_format)
        q = read(q_addr, torch.float8_e4m3fn, num_rows, hidden)
        scales = read(scales_addr, form.dtype, num_rows, form.columns(hidden))
        write(out_addr, dequantise_fp8(q, scales, form, Element(element).dtype))

    def reduce(
        self,
        element: int,
        hidden: int,
        first_token: int,
        last_token: int,
        width: int,
        by_rank: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_addr: int,
        bias0_addr: int,
        bias1_addr: int,
        out_addr: int,
    ) -> None:
        dtype = Element(element).dtype
        row_bytes = hidden * dtype.itemsize
        named = entries(first_token, last_token, width, entry_rank_addr, entry_row_addr)
        for t, entry in enumerate(named, start=first_token):
            addresses = [bias + t * row_bytes for bias in (bias0_addr, bias1_addr) if bias]
            addresses += [_peer(peer_addr, rank) + row * row_bytes for rank, row, _ in _in_order(entry, by_rank)]
            total = _sum([read(address, dtype, hidden).to(torch.float32) for address in addresses], hidden)
            write(out_addr + t * row_bytes, round_to(total, dtype))

    def reduce_weights(
        self,
        num_topk: int,
        first_token: int,
        last_token: int,
        width: int,
        by_rank: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_addr: int,
        out_addr: int,
    ) -> None:
        self.reduce(
            Element.FP32,
            num_topk,
            first_token,
            last_token,
            width,
            by_rank,
            entry_rank_addr,
            entry_row_addr,
            peer_addr,
            0,
            0,
            out_addr,
        )

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


def _peer(table_addr: int, rank: int) -> int:
    return int(read(table_addr + 8 * rank, torch.int64, 1))


def _in_order(entry: list[tuple[int, int, int]], by_rank: int) -> list[tuple[int, int, int]]:
    return sorted(entry, key=lambda triple: (triple[0], triple[2])) if by_rank else entry


def _sum(terms: list[torch.Tensor], hidden: int) -> torch.Tensor:
    if not terms:
        return torch.zeros(hidden)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
