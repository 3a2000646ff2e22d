"""The exam of what a device sends in one launch: rows beside their routing, and all parts of the rows nobody sends."""

from __future__ import annotations

import numpy as np

from anyep.kernels.spec import Element, ScaleFormat
from anyep.testing.kernel_case import Case, draw_experts
from anyep.testing.kernel_cases import draw_numbers, draw_rows, draw_skipped, put_entries, put_peers

_HIDDEN = (1, 7, 128, 130, 1024, 1040, 2100)
_PART_BYTES = (256, 8, 24, 12, 4)
_ROWS = 60


def exam_send(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    T, K, R, E = (int(n) for n in (rng.integers(0, 9), rng.integers(1, 12), rng.integers(1, 10), 40))
    owner_E, by_expert = rng.integers(0, R, E, dtype=np.int32), int(rng.integers(0, 2))
    idx_TK = draw_experts(rng, T, K, E)
    rank_TW = np.where(idx_TK < 0, -1, owner_E[idx_TK]).astype(np.int32)
    if not by_expert:
        W = min(K, R)
        rows = [sorted(set(ranks) - {-1}) for ranks in rank_TW.tolist()]
        rank_TW = np.array([ranks + [-1] * (W - len(ranks)) for ranks in rows], np.int32).reshape(T, W)
    entries = draw_rows(rng, rank_TW, R)
    element, hidden, form = Element(int(rng.integers(0, 3))), int(rng.choice(_HIDDEN)), int(rng.integers(-1, 3))
    x = stretch.put("x", draw_numbers(rng, T, hidden, element))
    skipped = draw_skipped(rng, entries)
    if form < 0:
        row_bytes = hidden * element.dtype.itemsize
        x_rows, scales = put_peers(stretch, "peer_x", entries, row_bytes, int(rng.choice([1, 16])), skipped)[0], 0
    else:
        row_bytes, columns = hidden, ScaleFormat(form).columns(hidden)
        x_rows = put_peers(stretch, "peer_q", entries, hidden, 1, skipped)[0]
        scales = put_peers(stretch, "peer_scales", entries, 4 * columns, 4, skipped)[0]
    weights = stretch.cut("topk_weights", 4 * T * K, 4) if rng.random() < 0.7 else 0
    tables = [
        put_peers(stretch, name, entries, size, alignment, skipped)[0] if rng.random() < 0.75 else 0
        for name, size, alignment in (
            ("peer_idx", idx_TK.itemsize * K, idx_TK.itemsize),
            ("peer_weights", 4 * K, 4),
            ("peer_token", 4, 4),
        )
    ]
    case.run(
        "send",
        *(x, int(element), row_bytes, form, T, entries.width, *put_entries(stretch, entries), x_rows, scales),
        *(stretch.put("topk_idx", idx_TK), idx_TK.itemsize, weights, K, by_expert),
        *(stretch.put("expert_rank", owner_E), stretch.put("expert_local", np.arange(E, dtype=np.int32)), *tables),
    )


def exam_fill_gaps(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    num_gaps = int(rng.integers(0, 6))
    bounds = np.sort(rng.integers(0, _ROWS, 2 * num_gaps, dtype=np.int32)).reshape(num_gaps, 2)
    begins, ends = stretch.put("gap_begin", bounds[:, 0].copy()), stretch.put("gap_end", bounds[:, 1].copy())
    parts = []
    for part, row_bytes in enumerate(_PART_BYTES):
        wanted = rng.random() < 0.8
        parts += [stretch.cut(f"part {part}", _ROWS * row_bytes, 4) if wanted else 0, row_bytes]
    case.run("fill_gaps", num_gaps, begins, ends, *parts)
