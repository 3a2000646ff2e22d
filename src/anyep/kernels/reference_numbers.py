"""The oracle's half that computes: formats and sums."""

from __future__ import annotations

import torch

from anyep.kernels.reference_memory import entries, peer, read, write, write_row
from anyep.numerics.formats import Element, ScaleFormat
from anyep.numerics.fp8 import dequantise_fp8, quantise_fp8
from anyep.numerics.rounding import round_to


class ReferenceNumbers:
    """:class:`~anyep.kernels.spec_numbers.NumberKernels`; its docstrings are the spec's."""

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
                write_row(peer_q_addr, rank, place, q)
                write_row(peer_scales_addr, rank, place, scales)

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
        weights_addr: int,
        bias0_addr: int,
        bias1_addr: int,
        out_addr: int,
    ) -> None:
        dtype = Element(element).dtype
        row_bytes = hidden * dtype.itemsize
        named = entries(first_token, last_token, width, entry_rank_addr, entry_row_addr)
        for t, entry in enumerate(named, start=first_token):
            biases = [bias + t * row_bytes for bias in (bias0_addr, bias1_addr) if bias]
            terms = [read(bias, dtype, hidden).to(torch.float32) for bias in biases]
            for rank, row, j in _in_order(entry, by_rank):
                term = read(peer(peer_addr, rank) + row * row_bytes, dtype, hidden).to(torch.float32)
                terms.append(term * _weight(weights_addr, t * width + j) if weights_addr else term)
            write(out_addr + t * row_bytes, round_to(_sum(terms, hidden), dtype))

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
            0,
            out_addr,
        )


def _in_order(entry: list[tuple[int, int, int]], by_rank: int) -> list[tuple[int, int, int]]:
    return sorted(entry, key=lambda triple: (triple[0], triple[2])) if by_rank else entry


def _weight(weights_addr: int, entry: int) -> torch.Tensor:
    return read(weights_addr + 4 * entry, torch.float32, 1)


def _sum(terms: list[torch.Tensor], hidden: int) -> torch.Tensor:
    if not terms:
        return torch.zeros(hidden)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
