"""The exam of what a device works out by itself: routes that nobody waits for, boards, places, peer tables."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from anyep.kernels.reference_device import ReferenceDeviceKernels
from anyep.kernels.spec_device import BAD, HEAD_WORDS, NO_FAULT, NUM_PLACES, SUMMARY_WORDS, DeviceKernels, message_bytes
from anyep.testing.kernel_case import Case, draw_experts
from anyep.testing.kernel_exam_sending import exam_fill_gaps, exam_send
from anyep.testing.kernel_memory import ExamMemory

_ROOM = 1 << 20


class _DeviceCase(Case):
    oracle = ReferenceDeviceKernels


class _Routing:
    """Experts that a rank's tokens name, some of them none, and who owns them."""

    def __init__(self, case: Case) -> None:
        rng, stretch = case.rng, case.stretch
        self.T, self.K, self.E = (int(n) for n in (rng.integers(0, 40), rng.integers(1, 18), rng.integers(1, 129)))
        self.R, self.by_expert = int(rng.choice([1, 2, 3, 8, 33])), int(rng.integers(0, 2))
        self.W = self.K if self.by_expert else min(self.K, self.R)
        self.idx_TK = draw_experts(rng, self.T, self.K, self.E)
        self.owner_E = rng.integers(0, self.R, self.E, dtype=np.int32)
        self.owner = stretch.put("expert_rank", self.owner_E)
        self.sizes = (self.idx_TK.itemsize, self.T, self.K, self.E, self.R)

    def cut_compact(self, case: Case) -> tuple[int, int]:
        """Make room for compact entries beside those by expert, in half of the cases."""
        if not self.by_expert or case.rng.random() < 0.5:
            return 0, 0
        size = 4 * self.T * min(self.K, self.R)
        return case.stretch.cut("compact_rank", size, 4), case.stretch.cut("compact_slot", size, 4)

    def spoil(self, case: Case, *experts: int) -> None:
        """Let one pair name one of ``experts``, in half of the cases."""
        if self.T and case.rng.random() < 0.5:
            self.idx_TK[case.rng.integers(0, self.T), case.rng.integers(0, self.K)] = case.rng.choice(experts)


def exam_begin_route(case: Case) -> None:
    stretch, routing = case.stretch, _Routing(case)
    routing.spoil(case, -2, routing.E, int(np.iinfo(routing.idx_TK.dtype).max))
    T, K, width = routing.T, routing.K, routing.idx_TK.itemsize
    idx = stretch.put("topk_idx", routing.idx_TK)
    weighted = case.rng.random() < 0.5
    weights, kept = (stretch.cut(name, 4 * T * K, 4) if weighted else 0 for name in ("topk_weights", "kept_weights"))
    case.run(
        "begin_route",
        *(idx, *routing.sizes, routing.owner, routing.by_expert, weights),
        *(stretch.cut("kept_idx", width * T * K, width), kept),
        *(stretch.cut(name, 4 * T * routing.W, 4) for name in ("entry_rank", "entry_slot")),
        *routing.cut_compact(case),
    )


def exam_announce_counts(case: Case) -> None:
    rng, stretch, routing = case.rng, case.stretch, _Routing(case)
    routing.spoil(case, BAD)
    T, R, E = routing.T, routing.R, routing.E
    kept = stretch.put("kept_idx", routing.idx_TK)
    entries = tuple(stretch.cut(name, 4 * T * routing.W, 4) for name in ("entry_rank", "entry_slot"))
    entries += routing.cut_compact(case)
    own = routing.idx_TK.copy()
    ReferenceDeviceKernels().begin_route(
        own.ctypes.data, *routing.sizes, routing.owner, routing.by_expert, 0, own.ctypes.data, 0, *entries
    )
    messages = [stretch.cut(f"message {rank}", message_bytes(R, E), 8) for rank in range(R)]
    table = stretch.put_table("peer_message", [0 if rng.random() < 0.2 else one for one in messages])
    case.run(
        "announce_counts",
        *(kept, *routing.sizes, routing.by_expert, *entries),
        *(stretch.cut("rank_rows", 4 * R, 4), stretch.cut("expert_rows", 4 * E, 4), stretch.cut("verdict", 8, 8)),
        *(table if rng.random() < 0.8 else 0, int(rng.integers(0, _ROOM))),
        *rng.integers(-1, 1 << 40, NUM_PLACES).tolist(),
    )


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
        self.owner_E = owner_E = rng.integers(0, self.R, self.E, dtype=np.int32)
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
    filled = int((world.counts[:, world.R :] if by_expert else world.counts[:, : world.R]).sum(axis=0).max())
    block_rows = int(rng.choice([0, 0, 200, max(1, filled - 1), filled + 1])) if by_expert else 0
    bins, own_bins = (world.E, world.L) if by_expert else (world.R, 1)
    sizes = {
        "send_start": bins,
        "dense_start": world.E,
        "recv_rows": world.R * own_bins,
        "recv_start": world.R * own_bins,
        "counts": world.L,
        "block_start": world.L,
        "filled_rows": world.R,
        "gap_begin": world.L + 1,
        "gap_end": world.L + 1,
        "source_begin": world.L * world.R,
        "source_count": world.L * world.R,
        "source_rows": world.R,
    }
    answers = (stretch.cut("tables", 8 * NUM_PLACES * world.R, 8), stretch.cut("summary", 8 * SUMMARY_WORDS, 8))
    fault = stretch.cut("fault", 8 * SUMMARY_WORDS, 8) if rng.random() < 0.7 else 0
    outputs = [stretch.cut(name, 4 * count, 4) for name, count in sizes.items()]
    if rng.random() < 0.3:
        outputs[-3:] = 0, 0, 0
    T, W = int(rng.choice([0, 3, 40, 700], p=[0.2, 0.4, 0.3, 0.1])), int(rng.integers(1, 9))
    idx_TW = draw_experts(rng, T, W, world.E)
    rank_TW = np.where(idx_TW < 0, -1, world.owner_E[idx_TW]).astype(np.int32)
    slot_TW = np.where(rank_TW < 0, -1, rng.integers(0, 1000, (T, W))).astype(np.int32)
    case.run(
        "settle",
        *(world.board, world.bytes, world.rank, world.R, world.E, world.L, *world.placement),
        *(by_expert, int(rng.choice([1, 4, 7, 128])), block_rows),
        *(max(-1, int(rng.choice([-1, -1, 4 * filled, filled, filled - 1]))), int(rng.integers(0, 2))),
        *(stretch.put("base", rng.integers(0, 1 << 40, world.R)), *answers, fault, *outputs),
        *(T, W, stretch.put("topk_idx", idx_TW), idx_TW.itemsize, stretch.put("entry_rank", rank_TW)),
        *(stretch.put("entry_slot", slot_TW), stretch.cut("entry_row", 4 * T * W, 4)),
    )


def exam_connect(case: Case) -> None:
    rng, stretch, world = case.rng, case.stretch, _World(case)
    entries = int(rng.choice([0, 1, 700, 3000]))
    case.run(
        "connect",
        *(world.board, world.bytes, world.R, stretch.put("base", rng.integers(0, 1 << 40, world.R))),
        *(int(rng.integers(0, 99)), stretch.cut("tables", 8 * NUM_PLACES * world.R, 8)),
        stretch.cut("summary", 8 * SUMMARY_WORDS, 8),
        stretch.cut("fault", 8 * SUMMARY_WORDS, 8) if rng.random() < 0.7 else 0,
        *(stretch.cut("entry_rank", 4 * entries, 4), entries),
    )


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


def exam_meet(case: Case) -> None:
    rng, stretch = case.rng, case.stretch
    R, epoch = int(rng.choice([1, 2, 8, 33])), int(rng.integers(2, 1 << 30))
    own = [stretch.cut(f"word {rank}", 8, 8) for rank in range(R)]
    table = stretch.put_table("peer_word", [0 if rng.random() < 0.2 else one for one in own])
    words = stretch.put("words", rng.choice([0, epoch - 1, epoch, epoch + 1], R).astype(np.int64) << 32)
    errors = stretch.cut("errors", 8 * R, 8)
    case.run("meet", table, words, R, stretch.put("epoch", np.array([epoch], np.int64)), 3, errors, 8)


_EXAMS: dict[str, Callable[[Case], None]] = {
    "begin_route": exam_begin_route,
    "announce_counts": exam_announce_counts,
    "announce": exam_announce,
    "settle": exam_settle,
    "connect": exam_connect,
    "send": exam_send,
    "fill_gaps": exam_fill_gaps,
    "tick": exam_tick,
    "signal": exam_signal,
    "wait": exam_wait,
    "meet": exam_meet,
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
