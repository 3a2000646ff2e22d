"""The exam of the kernels that compute: formats and sums."""

from __future__ import annotations

import numpy as np
import torch

from anyep.kernels.spec import Element, ScaleFormat
from anyep.numerics.fp8 import quantise_fp8
from anyep.testing.kernel_case import Case, draw_case_entries
from anyep.testing.kernel_cases import Entries, Stretch, draw_numbers, draw_skipped, put_entries, put_peers

HIDDEN = (1, 2, 31, 32, 33, 64, 127, 128, 129, 255, 256, 384, 500, 512, 640, 1000, 1024, 1030)


def exam_quantise_scatter(case: Case) -> None:
    rng = case.rng
    entries, first, last = draw_case_entries(case, 6)
    element = Element(int(rng.integers(0, 3)))
    hidden = int(rng.choice(HIDDEN) if rng.random() < 0.9 else rng.choice([4096, 4097, 4100, 8200]))
    x = draw_numbers(rng, entries.num_tokens, hidden, element)
    _run_quantise_scatter(case, x, element, ScaleFormat(int(rng.integers(0, 3))), entries, first, last)


def _run_quantise_scatter(
    case: Case,
    x: torch.Tensor,
    element: Element,
    scale_format: ScaleFormat,
    entries: Entries,
    first: int,
    last: int,
) -> None:
    stretch, hidden = case.stretch, x.shape[1]
    x_addr = stretch.put("x", x)
    skipped = draw_skipped(case.rng, entries)
    q, _ = put_peers(stretch, "peer_q", entries, hidden, 1, skipped)
    scales, _ = put_peers(stretch, "peer_scales", entries, 4 * scale_format.columns(hidden), 4, skipped)
    addresses = put_entries(stretch, entries)
    head = (x_addr, int(element), hidden, int(scale_format), first, last)
    case.run("quantise_scatter", *head, entries.width, *addresses, q, scales)


def exam_dequantise(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    rows, hidden = int(rng.integers(0, 8)), int(rng.choice(HIDDEN))
    element, scale_format = Element(int(rng.integers(0, 3))), ScaleFormat(int(rng.integers(0, 3)))
    _, scales = quantise_fp8(draw_numbers(rng, rows, hidden, Element.FP32), scale_format)
    q = stretch.cut("q", rows * hidden)
    scales_addr = stretch.put("scales", scales)
    if rng.random() < 0.3:
        stretch.at(scales_addr, scales.nbytes)[:] = rng.integers(0, 256, scales.nbytes, dtype=np.uint8)
    out = stretch.cut("out", rows * hidden * element.num_bytes, int(rng.choice([element.num_bytes, 64])))
    case.run("dequantise", q, scales_addr, int(scale_format), rows, hidden, out, int(element))


def exam_reduce(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    entries, first, last = draw_case_entries(case)
    element, hidden = Element(int(rng.integers(0, 3))), int(rng.choice(HIDDEN))
    row_bytes = hidden * element.num_bytes
    table, bases = put_peers(stretch, "peer", entries, row_bytes, element.num_bytes)
    for base, rows in zip(bases, entries.num_rows_R, strict=True):
        fill(stretch, base, draw_numbers(rng, rows, hidden, element))
    T = entries.num_tokens
    bias = [stretch.put(f"bias{i}", draw_numbers(rng, T, hidden, element)) for i in range(2)]
    given = [address if rng.random() < 0.4 else 0 for address in bias]
    out = stretch.cut("out", T * row_bytes, int(rng.choice([element.num_bytes, 64])))
    addresses = put_entries(stretch, entries)
    weights = stretch.put("weights", draw_numbers(rng, T, entries.width, Element.FP32)) if rng.random() < 0.5 else 0
    head = (int(element), hidden, first, last, entries.width, int(rng.integers(0, 2)))
    case.run("reduce", *head, *addresses, table, weights, *given, out)


def exam_reduce_weights(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    entries, first, last = draw_case_entries(case)
    K = int(rng.integers(1, 18))
    table, bases = put_peers(stretch, "peer", entries, 4 * K, 4)
    for base, rows in zip(bases, entries.num_rows_R, strict=True):
        fill(stretch, base, draw_numbers(rng, rows, K, Element.FP32))
    out = stretch.cut("out", 4 * entries.num_tokens * K, 4)
    addresses = put_entries(stretch, entries)
    case.run("reduce_weights", K, first, last, entries.width, int(rng.integers(0, 2)), *addresses, table, out)


def fill(stretch: Stretch, address: int, values: torch.Tensor) -> None:
    stretch.at(address, values.nbytes)[:] = values.reshape(-1).view(torch.uint8).numpy()


def exam_all_codes(case: Case, element: Element, scale_format: ScaleFormat) -> None:
    """Decode each of the 256 codes with 256 scales."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = torch.from_numpy(case.rng.integers(0, 2**32, (256, 2), dtype=np.uint32).view(np.int32))
    if scale_format is ScaleFormat.UE8M0:
        scales = torch.arange(256, dtype=torch.int32).mul(0x0101)[:, None]
    out = case.stretch.cut("out", 256 * 256 * element.num_bytes, 64)
    head = (case.stretch.put("q", codes), case.stretch.put("scales", scales), int(scale_format))
    case.run("dequantise", *head, 256, 256, out, int(element))


def exam_all_inputs(case: Case, element: Element, scale_format: ScaleFormat) -> None:
    """Encode each of the 65536 16-bit numbers in a group of its neighbours, and each beside 448."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(element.dtype)
    beside = x.view(-1, 64).repeat(1, 2)
    beside[:, 64:] = 448.0
    for rows in (x.view(-1, 128), beside):
        place = np.arange(len(rows), dtype=np.int32)[:, None]
        entries = Entries(rank_TW=np.zeros_like(place), row_TW=place, num_rows_R=[len(rows)])
        _run_quantise_scatter(case, rows, element, scale_format, entries, 0, len(rows))
