"""The exam of the kernels that gather rows for the way and spread them after it."""

from __future__ import annotations

import numpy as np

from anyep.testing.kernel_case import Case
from anyep.testing.kernel_cases import draw_bins

_ROW_BYTES = (1, 4, 63, 64, 200, 512, 1024, 1100)


def exam_unpack(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    S, row_bytes = int(rng.integers(0, 9)), int(rng.choice(_ROW_BYTES))
    rows_S, start_S, num_rows = draw_bins(rng, S)
    skipped_S = rng.random(S) < 0.2
    packed = [stretch.cut(f"packed[{s}]", int(n) * row_bytes, int(rng.choice([1, 64]))) for s, n in enumerate(rows_S)]
    base = stretch.cut("base", num_rows * row_bytes, int(rng.choice([1, 64])))
    head = (row_bytes, S, stretch.put("rows", rows_S), stretch.put("start", start_S))
    case.run("unpack", *head, stretch.put("table of packed", np.where(skipped_S, 0, packed).astype(np.int64)), base)


def exam_pack(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    P, B, row_bytes = int(rng.integers(0, 6)), int(rng.integers(1, 6)), int(rng.choice(_ROW_BYTES))
    rows, start, num_rows = draw_bins(rng, P * B)
    rows_PB, start_PB = rows.reshape(P, B), start.reshape(P, B)
    skipped_P = rng.random(P) < 0.2
    base = stretch.cut("base", num_rows * row_bytes, int(rng.choice([1, 64])))
    totals = rows_PB.sum(axis=1).tolist()
    packed = [stretch.cut(f"packed[{p}]", n * row_bytes, int(rng.choice([1, 64]))) for p, n in enumerate(totals)]
    head = (row_bytes, P, B, stretch.put("rows", rows_PB), stretch.put("start", start_PB), base)
    case.run("pack", *head, stretch.put("table of packed", np.where(skipped_P, 0, packed).astype(np.int64)))
