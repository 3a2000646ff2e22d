"""The exam of a kernel set: every function, bit for bit against the reference, on hundreds of awkward cases.

``check_kernels(MyKernels())`` raises KernelExamError with the function, its arguments and the first wrong byte.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.kernels.reference import ReferenceKernels
from anyep.kernels.spec import Element, KernelSet, ScaleFormat
from anyep.numerics.fp8 import quantise_fp8
from anyep.testing.kernel_cases import (
    Entries,
    Stretch,
    draw_entries,
    draw_numbers,
    draw_range,
    draw_rows,
    put_entries,
    put_peers,
)

_STRETCH_BYTES = 2 << 20
_HIDDEN = (1, 2, 31, 32, 33, 64, 127, 128, 129, 255, 256, 384, 500, 512, 640, 1000, 1024, 1030)


class KernelExamError(AssertionError):
    """A kernel wrote other bytes than the reference, or bytes that are none of its business."""


class _Case:
    """One call of one function, made by both sets on the same memory."""

    def __init__(self, kernels: KernelSet, rng: np.random.Generator, num_bytes: int = _STRETCH_BYTES) -> None:
        self.kernels = kernels
        self.rng = rng
        self.stretch = Stretch(rng, num_bytes)

    def run(self, function: str, *arguments: int) -> int | None:
        """Call both sets and compare the result and all memory. Raises KernelExamError."""
        before = self.stretch.memory.copy()
        expected = getattr(ReferenceKernels(), function)(*arguments)
        expected_memory = self.stretch.memory.copy()
        self.stretch.memory[:] = before
        result: int | None = getattr(self.kernels, function)(*arguments)
        self.kernels.fence()
        name = f"{self.kernels.name}.{function}{arguments}"
        if result != expected:
            raise KernelExamError(f"{name} returned {result}, expected {expected}")
        difference = self.stretch.difference(expected_memory)
        if difference is not None:
            raise KernelExamError(f"{name}: {difference}")
        return result


def check_kernels(kernels: KernelSet, *, seed: int = 0, rounds: int = 60) -> None:
    """Compare every function of ``kernels`` with the reference on ``rounds`` random cases each, and all FP8 codes.

    Raises KernelExamError at the first difference: a wrong bit, or a byte written outside the named rows. The same seed
    draws the same cases.
    """
    for number, exam in enumerate(_EXAMS):
        for case in range(rounds):
            exam(_Case(kernels, np.random.default_rng([seed, number, case])))
    for element in Element:
        for scale_format in ScaleFormat:
            _all_codes(_Case(kernels, np.random.default_rng(seed)), element, scale_format)
            if element is not Element.FP32:
                _all_inputs(_Case(kernels, np.random.default_rng(seed), 16 << 20), element, scale_format)


def _draw_experts(rng: np.random.Generator, T: int, K: int, E: int) -> NDArray[np.signedinteger]:
    idx_TK = rng.integers(-1, E, (T, K))
    if rng.random() < 0.3:
        idx_TK[:] = rng.integers(0, E) if rng.random() < 0.5 else -1
    return idx_TK.astype(np.int32 if rng.random() < 0.5 else np.int64)


def _exam_route(case: _Case) -> None:
    rng, stretch = case.rng, case.stretch
    T, K, E = (int(n) for n in (rng.integers(0, 40), rng.integers(1, 18), rng.integers(1, 129)))
    R = int(rng.choice([1, 2, 3, 8, 9, 31, 32, 33, 64, 70, 1100]))
    by_expert = int(rng.integers(0, 2))
    idx_TK = _draw_experts(rng, T, K, E)
    if T and rng.random() < 0.2:
        idx_TK[rng.integers(0, T), rng.integers(0, K)] = rng.choice([-2, E, np.iinfo(idx_TK.dtype).max])
    W = K if by_expert else min(K, R)
    outputs = [("entry_rank", T * W), ("entry_slot", T * W), ("rank_rows", R), ("expert_rows", E)]
    idx = stretch.put("topk_idx", idx_TK)
    expert_rank = stretch.put("expert_rank", rng.integers(0, R, E, dtype=np.int32))
    addresses = [stretch.cut(name, 4 * count, 4) for name, count in outputs]
    scratch = stretch.cut("scratch", 4 * (R + E), 4)
    stretch.leave_undefined(scratch, 4 * (R + E))
    if ((idx_TK < -1) | (idx_TK >= E)).any():
        for address, (_, count) in zip(addresses, outputs, strict=True):
            stretch.leave_undefined(address, 4 * count)
    case.run("route", idx, idx_TK.itemsize, T, K, E, R, expert_rank, by_expert, *addresses, scratch)


def _exam_place(case: _Case) -> None:
    rng, stretch = case.rng, case.stretch
    T, W, R, E = (int(n) for n in (rng.integers(0, 40), rng.integers(1, 18), rng.integers(1, 10), 50))
    by_expert = int(rng.integers(0, 2))
    rank_TW = rng.integers(-1, R, (T, W), dtype=np.int32)
    slot_TW = np.where(rank_TW < 0, -1, rng.integers(0, 1000, (T, W))).astype(np.int32)
    idx_TK = np.where(rank_TW < 0, -1, rng.integers(0, E, (T, W))).astype(np.int32 if rng.random() < 0.5 else np.int64)
    case.run(
        "place",
        stretch.put("entry_rank", rank_TW),
        stretch.put("entry", slot_TW),
        T,
        W,
        stretch.put("topk_idx", idx_TK) if by_expert else 0,
        idx_TK.itemsize,
        by_expert,
        stretch.put("start", rng.integers(0, 100000, E if by_expert else R, dtype=np.int32)),
    )


def _draw_case_entries(case: _Case, max_tokens: int = 12) -> tuple[Entries, int, int]:
    rng = case.rng
    T, W, R = (int(n) for n in (rng.integers(0, max_tokens + 1), rng.integers(1, 18), rng.integers(1, 10)))
    entries = draw_entries(rng, T, W, R, compact=bool(rng.random() < 0.5))
    return (entries, *draw_range(rng, T))


def _exam_scatter(case: _Case) -> None:
    entries, first, last = _draw_case_entries(case)
    row_bytes = int(case.rng.choice([1, 4, 63, 64, 200, 1023, 1024, 1025, 1088, 2060, 4096]))
    x = case.stretch.cut("x", entries.num_tokens * row_bytes)
    table, _ = put_peers(case.stretch, "peer", entries, row_bytes, int(case.rng.choice([1, 2, 64])))
    addresses = put_entries(case.stretch, entries)
    case.run("scatter", x, row_bytes, first, last, entries.width, *addresses, table)


def _exam_scatter_routing(case: _Case) -> None:
    rng, stretch = case.rng, case.stretch
    T, K, R, E = (int(n) for n in (rng.integers(0, 13), rng.integers(1, 18), rng.integers(1, 10), 40))
    expert_rank_E = rng.integers(0, R, E, dtype=np.int32)
    idx_TK = _draw_experts(rng, T, K, E)
    by_expert = int(rng.integers(0, 2))
    rank_TK = np.where(idx_TK < 0, -1, expert_rank_E[idx_TK]).astype(np.int32)
    if not by_expert:
        rows = [sorted(set(ranks) - {-1})[: min(K, R)] for ranks in rank_TK.tolist()]
        rank_TK = np.array([ranks + [-1] * (min(K, R) - len(ranks)) for ranks in rows], np.int32).reshape(T, min(K, R))
    entries = draw_rows(rng, rank_TK, R)
    first, last = draw_range(rng, T)
    weights = stretch.cut("topk_weights", 4 * T * K, 4) if rng.random() < 0.7 else 0
    idx = stretch.put("topk_idx", idx_TK)
    tables = (stretch.put("expert_rank", expert_rank_E), stretch.put("expert_local", np.arange(E, dtype=np.int32)))
    peer_idx, _ = put_peers(stretch, "peer_idx", entries, idx_TK.itemsize * K, idx_TK.itemsize)
    peer_weights = put_peers(stretch, "peer_weights", entries, 4 * K, 4)[0] if weights else 0
    addresses = put_entries(stretch, entries)
    case.run(
        "scatter_routing",
        *(idx, idx_TK.itemsize, weights, first, last, K, entries.width, by_expert),
        *(*tables, *addresses, peer_idx, peer_weights),
    )


def _exam_quantise_scatter(case: _Case) -> None:
    rng = case.rng
    entries, first, last = _draw_case_entries(case, 6)
    element = Element(int(rng.integers(0, 3)))
    hidden = int(rng.choice(_HIDDEN) if rng.random() < 0.9 else rng.choice([4096, 4097, 4100, 8200]))
    x = draw_numbers(rng, entries.num_tokens, hidden, element)
    _run_quantise_scatter(case, x, element, ScaleFormat(int(rng.integers(0, 3))), entries, first, last)


def _run_quantise_scatter(
    case: _Case,
    x: torch.Tensor,
    element: Element,
    scale_format: ScaleFormat,
    entries: Entries,
    first: int,
    last: int,
) -> None:
    stretch, hidden = case.stretch, x.shape[1]
    x_addr = stretch.put("x", x)
    q, _ = put_peers(stretch, "peer_q", entries, hidden, 1)
    scales, _ = put_peers(stretch, "peer_scales", entries, 4 * scale_format.columns(hidden), 4)
    addresses = put_entries(stretch, entries)
    head = (x_addr, int(element), hidden, int(scale_format), first, last)
    case.run("quantise_scatter", *head, entries.width, *addresses, q, scales)


def _exam_dequantise(case: _Case) -> None:
    rng, stretch = case.rng, case.stretch
    rows, hidden = int(rng.integers(0, 8)), int(rng.choice(_HIDDEN))
    element, scale_format = Element(int(rng.integers(0, 3))), ScaleFormat(int(rng.integers(0, 3)))
    _, scales = quantise_fp8(draw_numbers(rng, rows, hidden, Element.FP32), scale_format)
    q = stretch.cut("q", rows * hidden)
    scales_addr = stretch.put("scales", scales)
    if rng.random() < 0.3:
        stretch.at(scales_addr, scales.nbytes)[:] = rng.integers(0, 256, scales.nbytes, dtype=np.uint8)
    out = stretch.cut("out", rows * hidden * element.num_bytes, int(rng.choice([element.num_bytes, 64])))
    case.run("dequantise", q, scales_addr, int(scale_format), rows, hidden, out, int(element))


def _exam_reduce(case: _Case) -> None:
    rng, stretch = case.rng, case.stretch
    entries, first, last = _draw_case_entries(case)
    element, hidden = Element(int(rng.integers(0, 3))), int(rng.choice(_HIDDEN))
    row_bytes = hidden * element.num_bytes
    table, bases = put_peers(stretch, "peer", entries, row_bytes, element.num_bytes)
    for base, rows in zip(bases, entries.num_rows_R, strict=True):
        _fill(stretch, base, draw_numbers(rng, rows, hidden, element))
    T = entries.num_tokens
    bias = [stretch.put(f"bias{i}", draw_numbers(rng, T, hidden, element)) for i in range(2)]
    given = [address if rng.random() < 0.4 else 0 for address in bias]
    out = stretch.cut("out", T * row_bytes, int(rng.choice([element.num_bytes, 64])))
    addresses = put_entries(stretch, entries)
    head = (int(element), hidden, first, last, entries.width, int(rng.integers(0, 2)))
    case.run("reduce", *head, *addresses, table, *given, out)


def _exam_reduce_weights(case: _Case) -> None:
    rng, stretch = case.rng, case.stretch
    entries, first, last = _draw_case_entries(case)
    K = int(rng.integers(1, 18))
    table, bases = put_peers(stretch, "peer", entries, 4 * K, 4)
    for base, rows in zip(bases, entries.num_rows_R, strict=True):
        _fill(stretch, base, draw_numbers(rng, rows, K, Element.FP32))
    out = stretch.cut("out", 4 * entries.num_tokens * K, 4)
    addresses = put_entries(stretch, entries)
    case.run("reduce_weights", K, first, last, entries.width, int(rng.integers(0, 2)), *addresses, table, out)


def _fill(stretch: Stretch, address: int, values: torch.Tensor) -> None:
    stretch.at(address, values.nbytes)[:] = values.reshape(-1).view(torch.uint8).numpy()


def _exam_copy(case: _Case) -> None:
    num_bytes = int(case.rng.choice([0, 1, 63, 64, 65, 1000, 1024, 1100, 4096, 100_001]))
    alignment = int(case.rng.choice([1, 64]))
    source, destination = (case.stretch.cut(name, num_bytes, alignment) for name in ("source", "destination"))
    case.run("copy", source, destination, num_bytes)


def _exam_fill_rows(case: _Case) -> None:
    rng, stretch = case.rng, case.stretch
    row_bytes, num_gaps = int(rng.choice([1, 4, 56, 257, 1024])), int(rng.integers(0, 6))
    bounds = np.sort(rng.integers(0, 60, 2 * num_gaps, dtype=np.int32)).reshape(num_gaps, 2)
    base = stretch.cut("rows", 60 * row_bytes)
    begins, ends = stretch.put("gap_begin", bounds[:, 0].copy()), stretch.put("gap_end", bounds[:, 1].copy())
    case.run("fill_rows", base, row_bytes, num_gaps, begins, ends, int(rng.choice([0, 255])))


def _all_codes(case: _Case, element: Element, scale_format: ScaleFormat) -> None:
    """Decode each of the 256 codes with 256 scales."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = torch.from_numpy(case.rng.integers(0, 2**32, (256, 2), dtype=np.uint32).view(np.int32))
    if scale_format is ScaleFormat.UE8M0:
        scales = torch.arange(256, dtype=torch.int32).mul(0x0101)[:, None]
    out = case.stretch.cut("out", 256 * 256 * element.num_bytes, 64)
    head = (case.stretch.put("q", codes), case.stretch.put("scales", scales), int(scale_format))
    case.run("dequantise", *head, 256, 256, out, int(element))


def _all_inputs(case: _Case, element: Element, scale_format: ScaleFormat) -> None:
    """Encode each of the 65536 16-bit numbers in a group of its neighbours, and each beside 448."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(element.dtype)
    beside = x.view(-1, 64).repeat(1, 2)
    beside[:, 64:] = 448.0
    for rows in (x.view(-1, 128), beside):
        place = np.arange(len(rows), dtype=np.int32)[:, None]
        entries = Entries(rank_TW=np.zeros_like(place), row_TW=place, num_rows_R=[len(rows)])
        _run_quantise_scatter(case, rows, element, scale_format, entries, 0, len(rows))


_EXAMS: tuple[Callable[[_Case], None], ...] = (
    _exam_route,
    _exam_place,
    _exam_scatter,
    _exam_scatter_routing,
    _exam_quantise_scatter,
    _exam_dequantise,
    _exam_reduce,
    _exam_reduce_weights,
    _exam_copy,
    _exam_fill_rows,
)
