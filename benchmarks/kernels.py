"""Times the CPU kernels on one thread against a non-temporal copy in the same rounds: the share is the result.

python benchmarks/kernels.py [--rounds N] [--tokens N] [--json FILE]

One rank's part of a real step: T tokens of H channels, top-k of E experts on R ranks. Destinations are R arrays as
large as each rank's receive tensor, of which this rank owns one section. The kernels pass their exam before they are
timed. Rounds interleave all kernels, so that a neighbour on the machine slows each of them alike. Bytes: a copy reads
and writes; scatter and quantise read each token once and write each row; reduce reads rows and writes tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numba
import torch

from anyep.cli.machine_facts import available_cores, cpu_model
from anyep.kernels.registry import load
from anyep.kernels.spec import Element, KernelSet, ScaleFormat
from anyep.numerics.logfmt import logfmt_coded_bytes, logfmt_row_bytes
from anyep.testing import check_kernels

HIDDEN, TOPK, EXPERTS, RANKS = 7168, 8, 256, 8
LOCAL = EXPERTS // RANKS
SENDER = 3
NUM_SOURCES = 3
"""Token batches used in turn, so that no round finds its input in a cache."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; ``share`` is that of the copy's bytes a second, None where bytes do not count."""

    kernel: str
    us_median: float
    us_min: float
    us_max: float
    gb_s: float
    share_median: float | None
    share_min: float | None
    share_max: float | None


class Workload:
    """The arrays of one rank's step, and the kernels' calls on them."""

    def __init__(self, kernels: KernelSet, num_tokens: int) -> None:
        self.kernels = kernels
        self.T = num_tokens
        generator = torch.Generator().manual_seed(1)
        self.topk_idx = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOPK] for _ in range(num_tokens)])
        self.entry_rank = torch.empty((num_tokens, TOPK), dtype=torch.int32)
        self.entry_slot = torch.empty((num_tokens, TOPK), dtype=torch.int32)
        self.entry_row = torch.empty((num_tokens, TOPK), dtype=torch.int32)
        self.rank_rows = self.route(RANKS)
        self.num_rows = int(self.rank_rows.sum())
        section = max(1, int(self.rank_rows.max()))
        self.start = torch.full((RANKS,), SENDER * section, dtype=torch.int32)
        kernels.place(
            *(self.entry_rank.data_ptr(), self.entry_slot.data_ptr(), num_tokens, TOPK, 0, 8, 0),
            *(self.start.data_ptr(), self.entry_row.data_ptr()),
        )
        self.peers = [torch.empty((RANKS * section, HIDDEN), dtype=torch.bfloat16) for _ in range(RANKS)]
        for peer in self.peers:
            peer[SENDER * section : (SENDER + 1) * section].normal_(generator=generator)
        self.peer_scales = [torch.ones((RANKS * section, HIDDEN // 128)) for _ in range(RANKS)]
        self.x = [torch.randn((num_tokens, HIDDEN), generator=generator).bfloat16() for _ in range(NUM_SOURCES)]
        self.out = torch.zeros((num_tokens, HIDDEN), dtype=torch.bfloat16)
        self.weights = torch.rand((num_tokens, TOPK), generator=generator)
        self.copy_bytes = self.num_rows * HIDDEN
        self.copy_source = torch.ones(self.copy_bytes, dtype=torch.uint8)
        self.copy_target = torch.zeros(self.copy_bytes, dtype=torch.uint8)
        self.table = torch.tensor([peer.data_ptr() for peer in self.peers])
        self.scales_table = torch.tensor([peer.data_ptr() for peer in self.peer_scales])

    @property
    def entries(self) -> tuple[int, int, int, int, int]:
        return 0, self.T, TOPK, self.entry_rank.data_ptr(), self.entry_row.data_ptr()

    def route(self, num_ranks: int) -> torch.Tensor:
        """Route all tokens, allocation of the results included; return rank_rows."""
        expert_rank = (torch.arange(EXPERTS) * num_ranks // EXPERTS).to(torch.int32)
        rank_rows = torch.empty(num_ranks, dtype=torch.int32)
        expert_rows = torch.empty(EXPERTS, dtype=torch.int32)
        scratch = torch.empty(num_ranks + EXPERTS, dtype=torch.int32)
        self.kernels.route(
            *(self.topk_idx.data_ptr(), 8, self.T, TOPK, EXPERTS, num_ranks, expert_rank.data_ptr(), 0),
            *(self.entry_rank.data_ptr(), self.entry_slot.data_ptr(), rank_rows.data_ptr(), expert_rows.data_ptr()),
            scratch.data_ptr(),
        )
        return rank_rows

    def copy(self, turn: int) -> None:
        self.kernels.copy(self.copy_source.data_ptr(), self.copy_target.data_ptr(), self.copy_bytes)

    def scatter(self, turn: int) -> None:
        x = self.x[turn % NUM_SOURCES]
        self.kernels.scatter(x.data_ptr(), 2 * HIDDEN, *self.entries, self.table.data_ptr())

    def quantise_scatter(self, turn: int) -> None:
        x = self.x[turn % NUM_SOURCES]
        form = (int(Element.BF16), HIDDEN, int(ScaleFormat.FP32))
        tables = (self.table.data_ptr(), self.scales_table.data_ptr())
        self.kernels.quantise_scatter(x.data_ptr(), *form, *self.entries, *tables)

    def reduce(self, turn: int) -> None:
        first, last, width, ranks, rows = self.entries
        form = (int(Element.BF16), HIDDEN, first, last, width, 1, ranks, rows)
        self.kernels.reduce(*form, self.table.data_ptr(), 0, 0, 0, self.out.data_ptr())

    def reduce_weighted(self, turn: int) -> None:
        first, last, width, ranks, rows = self.entries
        form = (int(Element.BF16), HIDDEN, first, last, width, 1, ranks, rows)
        self.kernels.reduce(*form, self.table.data_ptr(), self.weights.data_ptr(), 0, 0, self.out.data_ptr())

    def dequantise(self, turn: int) -> None:
        """FP8 to BF16 of T rows: the left half of a peer's memory is read as codes."""
        q, scales = self.peers[turn % RANKS], self.peer_scales[0]
        form = (int(ScaleFormat.FP32), self.T, HIDDEN)
        self.kernels.dequantise(q.data_ptr(), scales.data_ptr(), *form, self.out.data_ptr(), int(Element.BF16))


class Packed:
    """What a wire that carries packed rows adds: its two ends for one rank, and LogFMT-10 for the way back.

    The rows that the workload sends to each rank stand for those that this rank receives from each.
    """

    def __init__(self, workload: Workload) -> None:
        self.kernels, self.T, self.num_rows = workload.kernels, workload.T, workload.num_rows
        self.entry_rank, self.entry_slot = workload.entry_rank, workload.entry_slot
        self.x, self.out, self.weights = workload.x, workload.out, workload.weights
        self.rank_rows = workload.rank_rows
        rank_TK, local_TK = workload.topk_idx // LOCAL, workload.topk_idx % LOCAL
        rows = [(rank_TK == rank).any(1) for rank in range(RANKS)]
        self.idx = [torch.where(rank_TK == r, local_TK, -1)[rows[r]].contiguous() for r in range(RANKS)]
        count_RL = torch.stack([torch.bincount(idx[idx >= 0], minlength=LOCAL) for idx in self.idx])
        before_LR = count_RL.T.flatten().cumsum(0) - count_RL.T.flatten()
        self.start_RL = before_LR.view(LOCAL, RANKS).T.to(torch.int32).contiguous()
        self.rows_RL = count_RL.to(torch.int32)
        self.received = [torch.zeros((len(idx), HIDDEN), dtype=torch.uint8) for idx in self.idx]
        self.expanded = torch.zeros((self.T * TOPK, HIDDEN), dtype=torch.uint8)
        self.compact = torch.zeros((self.num_rows, HIDDEN), dtype=torch.uint8)
        self.first_R = (self.rank_rows.cumsum(0) - self.rank_rows).to(torch.int32)
        self.scratch = torch.empty(LOCAL, dtype=torch.int32)
        self.back = [torch.zeros((int(n), HIDDEN), dtype=torch.uint8) for n in self.rows_RL.sum(1)]
        self.counts = self.rows_RL.sum(0, dtype=torch.int32)
        shape = (LOCAL, -(-int(self.counts.max()) // 16) * 16, HIDDEN // 128)
        self.scales, self.turned = torch.ones(shape), torch.zeros((shape[0], shape[2], shape[1]))
        row_bytes = logfmt_row_bytes(HIDDEN)
        self.wires = [torch.zeros((int(n), row_bytes), dtype=torch.uint8) for n in self.rank_rows]
        self.tables = {
            name: torch.tensor([one.data_ptr() for one in arrays])
            for name, arrays in (("x", self.received), ("idx", self.idx), ("back", self.back), ("wire", self.wires))
        }
        self.outputs = [(x * 0.01).bfloat16() for x in self.x]
        for rank in range(RANKS):
            self._encode(self.outputs[rank % NUM_SOURCES], int(self.rank_rows[rank]), self.wires[rank])

    def _encode(self, x: torch.Tensor, num_rows: int, wire: torch.Tensor) -> None:
        bins = torch.tensor([num_rows, 0], dtype=torch.int32)
        self.kernels.logfmt_encode(x.data_ptr(), HIDDEN, 1, bins.data_ptr(), bins.data_ptr() + 4, wire.data_ptr())

    def unpack(self, turn: int) -> None:
        places = (self.rank_rows.data_ptr(), self.first_R.data_ptr(), self.tables["x"].data_ptr())
        self.kernels.unpack(HIDDEN, RANKS, *places, self.compact.data_ptr())

    def expand(self, turn: int) -> None:
        counts = (self.rank_rows.data_ptr(), self.start_RL.data_ptr(), self.scratch.data_ptr())
        sources = (self.tables["x"].data_ptr(), 0, self.tables["idx"].data_ptr(), 0, 0)
        form = (HIDDEN, 0, TOPK, 8, RANKS, LOCAL)
        self.kernels.expand(*form, *counts, *sources, self.expanded.data_ptr(), 0, 0, 0, 0)

    def pack(self, turn: int) -> None:
        bins = (self.rows_RL.data_ptr(), self.start_RL.data_ptr(), self.expanded.data_ptr())
        self.kernels.pack(HIDDEN, RANKS, LOCAL, *bins, self.tables["back"].data_ptr())

    def transpose_scales(self, turn: int) -> None:
        blocks, rows, columns = self.scales.shape
        arrays = (self.counts.data_ptr(), self.scales.data_ptr(), self.turned.data_ptr())
        self.kernels.transpose_scales(blocks, rows, columns, *arrays)

    def logfmt_encode(self, turn: int) -> None:
        for rank in range(RANKS):
            self._encode(self.outputs[turn % NUM_SOURCES], int(self.rank_rows[rank]), self.wires[rank])

    def reduce_logfmt(self, turn: int) -> None:
        entries = (0, self.T, TOPK, 1, self.entry_rank.data_ptr(), self.entry_slot.data_ptr())
        wires = (self.tables["wire"].data_ptr(), self.weights.data_ptr())
        self.kernels.reduce_logfmt(HIDDEN, *entries, *wires, 0, 0, self.out.data_ptr())


def timed(function: Callable[[int], None], turn: int) -> float:
    """Return microseconds."""
    begin = time.perf_counter_ns()
    function(turn)
    return (time.perf_counter_ns() - begin) / 1e3


def measure(workload: Workload, rounds: int) -> list[Row]:
    """Run interleaved rounds; a share compares a kernel with the copy of its own round."""
    tokens, rows = workload.T * HIDDEN, workload.num_rows * HIDDEN
    packed = Packed(workload)
    wire = workload.num_rows * logfmt_coded_bytes(HIDDEN)
    scales = workload.num_rows * HIDDEN // 128 * 4
    work: dict[str, tuple[Callable[[int], None], int]] = {
        "copy": (workload.copy, 2 * workload.copy_bytes),
        "scatter bf16": (workload.scatter, 2 * tokens + 2 * rows),
        "quantise+scatter fp8": (workload.quantise_scatter, 2 * tokens + rows + scales),
        "reduce bf16": (workload.reduce, 2 * rows + 2 * tokens),
        "reduce bf16, weighted": (workload.reduce_weighted, 2 * rows + 2 * tokens),
        "unpack fp8": (packed.unpack, 2 * rows),
        "expand fp8": (packed.expand, rows + TOPK * tokens),
        "pack fp8": (packed.pack, 2 * TOPK * tokens),
        "transpose_scales": (packed.transpose_scales, 8 * workload.T * TOPK * HIDDEN // 128),
        "logfmt_encode": (packed.logfmt_encode, 2 * rows + wire),
        "reduce_logfmt": (packed.reduce_logfmt, wire + 2 * tokens),
        "dequantise fp8 to bf16": (workload.dequantise, 3 * tokens + 4 * tokens // 128),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(-2, rounds):  # two rounds touch every page
        for name, (function, _) in work.items():
            us = timed(function, turn)
            if turn >= 0:
                times[name].append(us)
    speeds = {name: [num_bytes / us / 1e3 for us in times[name]] for name, (_, num_bytes) in work.items()}
    return [_row(name, times[name], speeds[name], speeds["copy"]) for name in work]


def _row(name: str, us: list[float], speed: list[float], copy_speed: list[float]) -> Row:
    shares = [mine / copy for mine, copy in zip(speed, copy_speed, strict=True)]
    return Row(
        kernel=name,
        us_median=statistics.median(us),
        us_min=min(us),
        us_max=max(us),
        gb_s=statistics.median(speed),
        share_median=statistics.median(shares),
        share_min=min(shares),
        share_max=max(shares),
    )


def measure_route(workload: Workload, rounds: int) -> list[Row]:
    """Time route for growing numbers of ranks. Runs last: it overwrites the entries."""
    result = []
    for num_ranks in (8, 64, 256, 2048):
        us = [timed(partial(_route, workload, num_ranks), turn) for turn in range(-3, 5 * rounds)][3:]
        result.append(
            Row(
                kernel=f"route, {num_ranks} ranks",
                us_median=statistics.median(us),
                us_min=min(us),
                us_max=max(us),
                gb_s=0.0,
                share_median=None,
                share_min=None,
                share_max=None,
            )
        )
    return result


def _route(workload: Workload, num_ranks: int, turn: int) -> None:
    workload.route(num_ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    kernels = load("cpu")
    check_kernels(kernels, rounds=10)
    workload = Workload(kernels, options.tokens)
    rows = measure(workload, options.rounds) + measure_route(workload, options.rounds)
    print(f"{options.tokens} x {HIDDEN}, top-{TOPK} of {EXPERTS}, {RANKS} ranks, {workload.num_rows} rows, one thread")
    for row in rows:
        text = f"{row.kernel:24} {row.us_median:10.0f} us [{row.us_min:.0f} .. {row.us_max:.0f}]"
        if row.share_median is not None:
            text += f" {row.gb_s:6.2f} GB/s  {row.share_median:6.1%} [{row.share_min:.1%} .. {row.share_max:.1%}]"
        print(text)
    if options.json:
        machine = {"processor": cpu_model(), "cores": available_cores(), "numba": numba.__version__}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "rows": [asdict(row) for row in rows]}, file, indent=1)


if __name__ == "__main__":
    main()
