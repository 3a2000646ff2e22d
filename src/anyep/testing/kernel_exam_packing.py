"""The exam of the kernels that gather rows for the way and spread them after it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anyep.testing.kernel_case import Case
from anyep.testing.kernel_cases import Stretch, draw_starts

_ROW_BYTES = (1, 4, 63, 64, 200, 512, 1024, 1100)


def exam_unpack(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    S, row_bytes = int(rng.integers(0, 9)), int(rng.choice(_ROW_BYTES))
    rows_S = rng.integers(0, 7, S, dtype=np.int32)
    start_S, num_rows = draw_starts(rng, rows_S)
    skipped_S = rng.random(S) < 0.2
    packed = [stretch.cut(f"packed[{s}]", int(n) * row_bytes, int(rng.choice([1, 64]))) for s, n in enumerate(rows_S)]
    base = stretch.cut("base", num_rows * row_bytes, int(rng.choice([1, 64])))
    head = (row_bytes, S, stretch.put("rows", rows_S), stretch.put("start", start_S))
    case.run("unpack", *head, stretch.put_table("table of packed", np.where(skipped_S, 0, packed)), base)


def exam_pack(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    P, B, row_bytes = int(rng.integers(0, 6)), int(rng.integers(1, 6)), int(rng.choice(_ROW_BYTES))
    rows_PB = rng.integers(0, 7, (P, B), dtype=np.int32)
    start_PB, num_rows = draw_starts(rng, rows_PB)
    skipped_P = rng.random(P) < 0.2
    base = stretch.cut("base", num_rows * row_bytes, int(rng.choice([1, 64])))
    totals = rows_PB.sum(axis=1).tolist()
    packed = [stretch.cut(f"packed[{p}]", n * row_bytes, int(rng.choice([1, 64]))) for p, n in enumerate(totals)]
    head = (row_bytes, P, B, stretch.put("rows", rows_PB), stretch.put("start", start_PB), base)
    case.run("pack", *head, stretch.put_table("table of packed", np.where(skipped_P, 0, packed)))


def exam_expand(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    S, K, L = (int(n) for n in (rng.integers(0, 5), rng.integers(1, 10), rng.integers(1, 7)))
    x_bytes, scale_bytes = int(rng.choice(_ROW_BYTES)), int(rng.choice([0, 4, 224]))
    idx_type = np.int32 if rng.random() < 0.5 else np.int64
    rows_S = rng.integers(0, 5, S, dtype=np.int32)
    idx_S = [rng.integers(-1, L if rng.random() < 0.8 else 0, (n, K)).astype(idx_type) for n in rows_S]
    counts = [np.bincount(idx[idx >= 0].astype(np.int64), minlength=L) for idx in idx_S]
    start_SL, num_rows = draw_starts(rng, np.array(counts, np.int32).reshape(S, L))
    skipped_S = rng.random(S) < 0.2
    head = (x_bytes, scale_bytes, K, np.dtype(idx_type).itemsize, S, L)
    scratch = stretch.cut("scratch", 4 * L, 4)
    stretch.leave_undefined(scratch, 4 * L)
    idx_addresses = [stretch.put(f"idx[{s}]", idx) for s, idx in enumerate(idx_S)]
    widths = {"x": x_bytes, "scales": scale_bytes, "weights": 4 * K, "token": 4}
    tables = {name: _put_sources(stretch, name, rows_S, width, skipped_S) for name, width in widths.items()}
    widths["idx"] = head[3] * K
    tables["idx"] = stretch.put_table("table of idx", idx_addresses)
    order = ("x", "scales", "idx", "weights", "token")
    out = {
        name: _maybe_cut(case, f"out_{name}", num_rows * widths[name], head[3] if name == "idx" else 4)
        for name in order
    }
    given = [tables[name] if out[name] or name in ("x", "idx") else 0 for name in order]
    where = (stretch.put("rows", rows_S), stretch.put("start", start_SL), scratch)
    case.run("expand", *head, *where, *given, *(out[name] for name in order))


def _put_sources(
    stretch: Stretch, name: str, rows_S: NDArray[np.int32], width: int, skipped_S: NDArray[np.bool_]
) -> int:
    """Cut every source's array; return the address of their table, with 0 for those to be skipped."""
    cut = [stretch.cut(f"{name}[{s}]", int(n) * width, 4) for s, n in enumerate(rows_S)]
    return stretch.put_table(f"table of {name}", np.where(skipped_S, 0, cut))


def _maybe_cut(case: Case, name: str, num_bytes: int, alignment: int) -> int:
    if case.rng.random() < 0.2:
        return 0
    return case.stretch.cut(name, num_bytes, int(case.rng.choice([alignment, 64])))


def exam_transpose_scales(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    B, columns = int(rng.integers(0, 4)), int(rng.choice([1, 2, 16, 17, 56]))
    block_rows = int(rng.choice([16, 32, 48, int(rng.integers(1, 50))]))
    counts_B = rng.integers(0, block_rows + 1, B, dtype=np.int32)
    arrays = [stretch.cut(name, 4 * B * block_rows * columns, int(rng.choice([4, 64]))) for name in ("source", "there")]
    case.run("transpose_scales", B, block_rows, columns, stretch.put("counts", counts_B), *arrays)


def exam_gather(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    R, n, count = (int(number) for number in (rng.integers(1, 6), rng.integers(0, 9), rng.integers(0, 40)))
    row_bytes, alignment = int(rng.choice((*_ROW_BYTES, 0, 4096))), int(rng.choice([1, 64]))
    peers = [stretch.cut(f"rows[{rank}]", n * row_bytes, alignment) for rank in range(R)]
    index = rng.integers(0, R * n, count) if n else np.zeros(0, np.int64)
    if len(index) and rng.random() < 0.3:
        index[rng.integers(0, len(index), 2)] = rng.choice([-1, R * n, 2**31 - 1])
    index = index.astype(np.int32 if rng.random() < 0.5 else np.int64)
    head = (row_bytes, len(index), stretch.put("index", index), index.itemsize, n, R)
    out = stretch.cut("out", len(index) * row_bytes, alignment)
    case.run("gather", *head, stretch.put("table of rows", np.array(peers, np.int64)), out)
