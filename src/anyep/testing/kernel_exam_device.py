"""The exam of what a device works out by itself: routes that nobody waits for, boards, places, peer tables."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from anyep.kernels.reference_device import ReferenceDeviceKernels
from anyep.kernels.spec_device import HEAD_WORDS, NO_FAULT, NUM_PLACES, SUMMARY_WORDS, DeviceKernels, message_bytes
from anyep.testing.kernel_case import Case, draw_experts
from anyep.testing.kernel_memory import ExamMemory

_ROOM = 1 << 20


class _DeviceCase(Case):
    oracle = ReferenceDeviceKernels


def exam_begin_route(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    T, K, E = (int(n) for n in (rng.integers(0, 40), rng.integers(1, 18), rng.integers(1, 129)))
    R, by_expert = int(rng.choice([1, 2, 3, 8, 33])), int(rng.integers(0, 2))
    idx_TK = draw_experts(rng, T, K, E)
    if T and rng.random() < 0.5:
        idx_TK[rng.integers(0, T), rng.integers(0, K)] = rng.choice([-2, E, np.iinfo(idx_TK.dtype).max])
    W = K if by_expert else min(K, R)
    idx = stretch.put("topk_idx", idx_TK)
    expert_rank = stretch.put("expert_rank", rng.integers(0, R, E, dtype=np.int32))
    outputs = [("entry_rank", T * W), ("entry_slot", T * W), ("rank_rows", R), ("expert_rows", E)]
    addresses = [stretch.cut(name, 4 * count, 4) for name, count in outputs]
    verdict = stretch.put("verdict", np.array([int(rng.choice([NO_FAULT, 3]))], np.int64))
    case.run("begin_route", idx, idx_TK.itemsize, T, K, E, R, expert_rank, by_expert, *addresses, verdict)


def exam_announce(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    R, num_counts = int(rng.choice([1, 2, 8, 33])), int(rng.choice([0, 1, 40, 300, 600]))
    messages = [stretch.cut(f"message {rank}", 8 * HEAD_WORDS + 4 * num_counts, 8) for rank in range(R)]
    table = stretch.put_table("peer_message", [0 if rng.random() < 0.2 else one for one in messages])
    places = rng.integers(-1, 1 << 40, NUM_PLACES).tolist()
    verdict = stretch.put("verdict", rng.integers(0, 99, 1)) if rng.random() < 0.5 else 0
    counts = stretch.put("counts", rng.integers(0, 1000, num_counts, dtype=np.int32))
    case.run("announce", R, table, int(rng.integers(0, _ROOM)), *places, verdict, counts, num_counts)


class _World:
    """R ranks, E experts and a board of what they announced."""

    def __init__(self, case: Case) -> None:
        rng, stretch = case.rng, case.stretch
        self.R, self.E = (
            int(rng.choice([1, 2, 3, 8, 9, 33])),
            int(rng.choice([1, 2, 7, 20, 64, 257], p=[0.2, 0.2, 0.25, 0.2, 0.1, 0.05])),
        )
        self.rank = int(rng.integers(0, self.R))
        owner_E = rng.integers(0, self.R, self.E, dtype=np.int32)
        local_E = np.array([int((owner_E[:e] == owner_E[e]).sum()) for e in range(self.E)], np.int32)
        self.L = int((owner_E == self.rank).sum())
        self.placement = stretch.put("expert_rank", owner_E), stretch.put("expert_local", local_E)
        self.bytes = message_bytes(self.R, self.E)
        board = rng.integers(0, 256, (self.R, self.bytes), dtype=np.uint8)
        self.counts = rng.integers(0, 6, (self.R, self.R + self.E), dtype=np.int32)
        self.counts[rng.random(self.R) < 0.2] = 0
        first = 8 * HEAD_WORDS
        board[:, first : first + 4 * (self.R + self.E)] = self.counts.view(np.uint8)
        self.heads = np.zeros((self.R, HEAD_WORDS), np.int64)
        self.heads[:, 0] = rng.integers(0, 40, self.R) if rng.random() < 0.3 else _ROOM
        self.heads[:, 1:-1] = rng.integers(-1, 1 << 30, (self.R, NUM_PLACES))
        self.heads[:, -1] = NO_FAULT
        if rng.random() < 0.2:
            self.heads[rng.integers(0, self.R, 2), -1] = rng.integers(0, 99, 2)
        board[:, : 8 * (HEAD_WORDS)] = self.heads.view(np.uint8)
        self.board = stretch.put("board", board.view(np.int64))


def exam_settle(case: Case) -> None:
    rng, stretch, world = case.rng, case.stretch, _World(case)
    by_expert = int(rng.integers(0, 2))
    block_rows = int(rng.choice([0, 200])) if by_expert else 0
    bins, own_bins = (world.E, world.L) if by_expert else (world.R, 1)
    sizes = {
        "send_start": bins,
        "dense_start": world.E,
        "recv_rows": world.R * own_bins,
        "recv_start": world.R * own_bins,
        "counts": world.L,
        "block_start": world.L,
        "filled_rows": world.R,
        "expert_total": world.E,
        "gap_begin": world.L,
        "gap_end": world.L,
    }
    outputs = [stretch.cut(name, 4 * count, 4) for name, count in sizes.items()]
    case.run(
        "settle",
        *(world.board, world.bytes, world.rank, world.R, world.E, world.L, *world.placement),
        *(by_expert, int(rng.choice([1, 4, 7, 128])), block_rows, *outputs),
    )


def exam_connect(case: Case) -> None:
    rng, stretch, world = case.rng, case.stretch, _World(case)
    filled_R: NDArray[np.int32] = world.counts[:, : world.R].sum(axis=0, dtype=np.int32)
    total_E: NDArray[np.int32] = world.counts[:, world.R :].sum(axis=0, dtype=np.int32)
    static_rows = int(rng.choice([-1, filled_R.max(), filled_R.max() + 9, filled_R.max() - 1]))
    block_rows = int(rng.choice([0, 0, total_E.max(), max(1, total_E.max() - 1)]))
    filled = stretch.put("filled_rows", filled_R) if rng.random() < 0.8 else 0
    totals = stretch.put("expert_total", total_E)
    base = stretch.put("base", rng.integers(0, 1 << 40, world.R))
    tables = stretch.cut("tables", 8 * NUM_PLACES * world.R, 8)
    summary = stretch.cut("summary", 8 * SUMMARY_WORDS, 8)
    fault = stretch.cut("fault", 8 * SUMMARY_WORDS, 8) if rng.random() < 0.7 else 0
    num_gaps = int(rng.choice([0, 3, 300]))
    gaps = [stretch.cut(name, 4 * (num_gaps + 1), 4) for name in ("gap_begin", "gap_end")]
    case.run(
        "connect",
        *(world.board, world.bytes, world.rank, world.R, base, filled, max(static_rows, -1)),
        *(totals, world.E, block_rows, tables, summary, fault, num_gaps, *gaps),
    )


def exam_withdraw(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    entries, local = (int(n) for n in rng.choice([0, 1, 700, 3000], 2))
    summary = stretch.put("summary", np.array([rng.integers(0, 3), 0, 0, 0], np.int64))
    where = stretch.cut("entry_rank", 4 * entries, 4), stretch.cut("counts", 4 * local, 4)
    case.run("withdraw", summary, where[0], entries, where[1], local)


def exam_signal(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    R = int(rng.choice([1, 2, 8, 33]))
    words = [stretch.cut(f"word {rank}", 8, 8) for rank in range(R)]
    table = stretch.put_table("peer_word", [0 if rng.random() < 0.2 else one for one in words])
    counts = stretch.put("counts", rng.integers(0, 1 << 31, R, dtype=np.int32)) if rng.random() < 0.5 else 0
    case.run("signal", table, R, stretch.put("epoch", rng.integers(1, 1 << 30, 1)), counts)


def exam_tick(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    case.run("tick", stretch.put("clock", rng.integers(0, 1 << 30, 1)), stretch.cut("epoch", 8, 8))


def exam_wait(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    R, epoch = int(rng.choice([1, 2, 8, 33])), int(rng.integers(2, 1 << 30))
    seen_R = rng.choice([0, epoch - 1, epoch, epoch + 1], R)
    words = stretch.put("words", (seen_R.astype(np.int64) << 32) | rng.integers(0, 1 << 31, R))
    counts = stretch.cut("counts", 4 * R, 4) if rng.random() < 0.5 else 0
    error_bytes = int(rng.choice([8, 1120]))
    errors = stretch.cut("errors", R * error_bytes, 8)
    case.run("wait", words, R, stretch.put("epoch", np.array([epoch], np.int64)), 3, counts, errors, error_bytes)


_EXAMS: dict[str, Callable[[Case], None]] = {
    "begin_route": exam_begin_route,
    "announce": exam_announce,
    "settle": exam_settle,
    "connect": exam_connect,
    "withdraw": exam_withdraw,
    "tick": exam_tick,
    "signal": exam_signal,
    "wait": exam_wait,
}
DEVICE_FUNCTIONS = tuple(_EXAMS)


def check_device_kernels(
    kernels: DeviceKernels,
    *,
    seed: int = 0,
    rounds: int = 60,
    only: Collection[str] = DEVICE_FUNCTIONS,
    memory: ExamMemory | None = None,
) -> None:
    """Compare what a device works out by itself with the reference, as ``check_kernels`` does; the same arguments."""
    for number, (name, exam) in enumerate(_EXAMS.items()):
        for case in range(rounds if name in only else 0):
            exam(_DeviceCase(kernels, np.random.default_rng([seed, 100 + number, case]), memory=memory))
