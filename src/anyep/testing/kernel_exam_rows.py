"""The exam of the kernels that move: routes, and rows as bytes."""

from __future__ import annotations

import numpy as np

from anyep.testing.kernel_case import Case, draw_case_entries, draw_experts
from anyep.testing.kernel_cases import Entries, draw_range, draw_rows, draw_skipped, put_entries, put_peers


def exam_route(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    T, K, E = (int(n) for n in (rng.integers(0, 40), rng.integers(1, 18), rng.integers(1, 129)))
    R = int(rng.choice([1, 2, 3, 8, 9, 31, 32, 33, 64, 70, 1100]))
    by_expert = int(rng.integers(0, 2))
    idx_TK = draw_experts(rng, T, K, E)
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


def exam_place(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    T, W, R, E = (int(n) for n in (rng.integers(0, 40), rng.integers(1, 18), rng.integers(1, 10), 50))
    by_expert = int(rng.integers(0, 2))
    rank_TW = rng.integers(-1, R, (T, W), dtype=np.int32)
    slot_TW = np.where(rank_TW < 0, -1, rng.integers(0, 1000, (T, W))).astype(np.int32)
    idx_TK = np.where(rank_TW < 0, -1, rng.integers(0, E, (T, W))).astype(np.int32 if rng.random() < 0.5 else np.int64)
    case.run(
        "place",
        stretch.put("entry_rank", rank_TW),
        stretch.put("entry_slot", slot_TW),
        T,
        W,
        stretch.put("topk_idx", idx_TK) if by_expert else 0,
        idx_TK.itemsize,
        by_expert,
        stretch.put("start", rng.integers(0, 100000, E if by_expert else R, dtype=np.int32)),
        stretch.cut("entry_row", 4 * T * W, 4),
    )


def exam_scatter(case: Case) -> None:
    entries, first, last = draw_case_entries(case)
    row_bytes = int(case.rng.choice([1, 4, 63, 64, 200, 1023, 1024, 1025, 1088, 2060, 4096]))
    x = case.stretch.cut("x", entries.num_tokens * row_bytes)
    skipped = draw_skipped(case.rng, entries)
    table, _ = put_peers(case.stretch, "peer", entries, row_bytes, int(case.rng.choice([1, 2, 64])), skipped)
    addresses = put_entries(case.stretch, entries)
    case.run("scatter", x, row_bytes, first, last, entries.width, *addresses, table)


def exam_scatter_routing(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    T, K, R, E = (int(n) for n in (rng.integers(0, 13), rng.integers(1, 18), rng.integers(1, 10), 40))
    expert_rank_E = rng.integers(0, R, E, dtype=np.int32)
    idx_TK = draw_experts(rng, T, K, E)
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
    skipped = draw_skipped(rng, entries)
    peer_idx = _maybe_peers(case, "peer_idx", entries, idx_TK.itemsize * K, idx_TK.itemsize, skipped)
    peer_weights = put_peers(stretch, "peer_weights", entries, 4 * K, 4, skipped)[0] if weights else 0
    peer_token = _maybe_peers(case, "peer_token", entries, 4, 4, skipped)
    addresses = put_entries(stretch, entries)
    case.run(
        "scatter_routing",
        *(idx, idx_TK.itemsize, weights, first, last, K, entries.width, by_expert),
        *(*tables, *addresses, peer_idx, peer_weights, peer_token),
    )


def _maybe_peers(
    case: Case, name: str, entries: Entries, row_bytes: int, alignment: int, skipped: frozenset[int]
) -> int:
    """Return the address of a peer table that one case in four does without."""
    return put_peers(case.stretch, name, entries, row_bytes, alignment, skipped)[0] if case.rng.random() < 0.75 else 0


def exam_copy(case: Case) -> None:
    num_bytes = int(case.rng.choice([0, 1, 63, 64, 65, 1000, 1024, 1100, 4096, 100_001]))
    alignment = int(case.rng.choice([1, 64]))
    source, destination = (case.stretch.cut(name, num_bytes, alignment) for name in ("source", "destination"))
    case.run("copy", source, destination, num_bytes)


def exam_fill_rows(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    row_bytes, num_gaps = int(rng.choice([1, 4, 56, 257, 1024])), int(rng.integers(0, 6))
    bounds = np.sort(rng.integers(0, 60, 2 * num_gaps, dtype=np.int32)).reshape(num_gaps, 2)
    base = stretch.cut("rows", 60 * row_bytes)
    begins, ends = stretch.put("gap_begin", bounds[:, 0].copy()), stretch.put("gap_end", bounds[:, 1].copy())
    case.run("fill_rows", base, row_bytes, num_gaps, begins, ends, int(rng.choice([0, 255])))
