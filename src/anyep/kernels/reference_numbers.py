"""The oracle's half that computes: formats and sums."""

from __future__ import annotations

import torch

from anyep.kernels.reference_memory import entries, peer, read, write, write_row
from anyep.numerics.formats import Element, ScaleFormat, num_scale_groups
from anyep.numerics.fp8 import dequantise_fp8, quantise_fp8
from anyep.numerics.logfmt import (
    CODE_BYTES,
    RAW_BYTES,
    LogfmtRows,
    decode_logfmt,
    encode_logfmt,
    header_bytes,
    logfmt_coded_bytes,
    logfmt_row_bytes,
)
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

    def logfmt_encode(
        self, x_addr: int, hidden: int, num_bins: int, rows_addr: int, start_addr: int, wire_addr: int
    ) -> None:
        wire = wire_addr
        rows, start = (read(address, torch.int32, num_bins).tolist() for address in (rows_addr, start_addr))
        for count, first in zip(rows, start, strict=True):
            for row in range(first, first + count):
                x = read(x_addr + row * 2 * hidden, torch.bfloat16, 1, hidden)
                _write_logfmt(wire, hidden, encode_logfmt(x))
                wire += logfmt_row_bytes(hidden)

    def reduce_logfmt(
        self,
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
        named = entries(first_token, last_token, width, entry_rank_addr, entry_row_addr)
        for t, entry in enumerate(named, start=first_token):
            biases = [bias + 2 * t * hidden for bias in (bias0_addr, bias1_addr) if bias]
            terms = [read(bias, torch.bfloat16, hidden).to(torch.float32) for bias in biases]
            for rank, row, j in _in_order(entry, by_rank):
                term = _read_logfmt(peer(peer_addr, rank) + row * logfmt_row_bytes(hidden), hidden)
                terms.append(term * _weight(weights_addr, t * width + j) if weights_addr else term)
            write(out_addr + 2 * t * hidden, round_to(_sum(terms, hidden), torch.bfloat16))


def _write_logfmt(address: int, hidden: int, row: LogfmtRows) -> None:
    """Write one wire row, and of a coded group its codes only."""
    write(address, row.header)
    for g, (header, group) in enumerate(zip(row.header[0].tolist(), row.groups[0], strict=True)):
        write(address + header_bytes(hidden) + g * CODE_BYTES, group[:CODE_BYTES])
        if header == 0:
            rest = group[CODE_BYTES:]
            write(address + logfmt_coded_bytes(hidden) + g * rest.nbytes, rest)


def _read_logfmt(address: int, hidden: int) -> torch.Tensor:
    groups = num_scale_groups(hidden)
    header = read(address, torch.int32, 1, groups)
    codes = read(address + header_bytes(hidden), torch.uint8, 1, groups, CODE_BYTES)
    rest = read(address + logfmt_coded_bytes(hidden), torch.uint8, 1, groups, RAW_BYTES - CODE_BYTES)
    return decode_logfmt(LogfmtRows(header=header, groups=torch.cat([codes, rest], dim=2)), hidden)[0]


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
