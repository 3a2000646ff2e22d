"""The exam of the LogFMT-10 kernels: rows of which some groups are coded and some are raw, and every BF16 number."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.kernels.reference import ReferenceKernels
from anyep.kernels.spec import Element
from anyep.numerics.logfmt import CHANNELS, logfmt_row_bytes
from anyep.testing.kernel_case import Case, draw_case_entries
from anyep.testing.kernel_cases import Stretch, draw_numbers, draw_starts, put_entries, put_peers

_HIDDEN = (1, 32, 33, 127, 128, 129, 224, 256, 384, 500, 1024)


def exam_logfmt_encode(case: Case) -> None:
    rng = case.rng
    B, hidden = int(rng.integers(0, 4)), int(rng.choice(_HIDDEN))
    rows_B = rng.integers(0, 4, B, dtype=np.int32)
    start_B, num_rows = draw_starts(rng, rows_B)
    _run_encode(case, _draw_outputs(rng, num_rows, hidden), rows_B, start_B)


def exam_all_logfmt_inputs(case: Case) -> None:
    """Encode every BF16 number among its neighbours, and beside one that makes the range wide."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, CHANNELS)
    for beside in (None, 0.75):
        given = x.clone()
        if beside is not None:
            given[:, 0] = beside
        _run_encode(case, given.view(-1, 16 * CHANNELS), np.array([32], np.int32), np.zeros(1, np.int32))


def exam_reduce_logfmt(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    entries, first, last = draw_case_entries(case, 6)
    hidden = int(rng.choice(_HIDDEN))
    table, bases = put_peers(stretch, "peer", entries, logfmt_row_bytes(hidden), 4)
    for base, rows in zip(bases, entries.num_rows_R, strict=True):
        _fill(stretch, base, _draw_outputs(rng, rows, hidden))
    T = entries.num_tokens
    bias = [stretch.put(f"bias{i}", draw_numbers(rng, T, hidden, Element.BF16)) for i in range(2)]
    given = [address if rng.random() < 0.4 else 0 for address in bias]
    weights = stretch.put("weights", draw_numbers(rng, T, entries.width, Element.FP32)) if rng.random() < 0.5 else 0
    out = stretch.cut("out", 2 * T * hidden, int(rng.choice([2, 64])))
    head = (hidden, first, last, entries.width, int(rng.integers(0, 2)))
    case.run("reduce_logfmt", *head, *put_entries(stretch, entries), table, weights, *given, out)


def _draw_outputs(rng: np.random.Generator, rows: int, hidden: int) -> torch.Tensor:
    """Draw BF16 rows; those of half of the cases are what experts return: mostly below 1."""
    x = draw_numbers(rng, rows, hidden, Element.BF16)
    return x if rng.random() < 0.5 else x.float().mul(1e-4).bfloat16()


def _run_encode(case: Case, x: torch.Tensor, rows_B: NDArray[np.int32], start_B: NDArray[np.int32]) -> None:
    stretch, hidden = case.stretch, x.shape[1]
    wire = stretch.cut("wire", int(rows_B.sum()) * logfmt_row_bytes(hidden), int(case.rng.choice([4, 64])))
    bins = (stretch.put("rows", rows_B), stretch.put("start", start_B))
    case.run("logfmt_encode", stretch.put("x", x), hidden, len(rows_B), *bins, wire)


def _fill(stretch: Stretch, wire_addr: int, x: torch.Tensor) -> None:
    """Write wire rows."""
    bins = (np.array([x.shape[0]], np.int32), np.zeros(1, np.int32))
    rows, start = (one.ctypes.data for one in bins)
    ReferenceKernels().logfmt_encode(x.data_ptr(), x.shape[1], 1, rows, start, wire_addr)
