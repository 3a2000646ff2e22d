"""One work, measured: what is launched directly and in graphs, torch's formulation, and copies, round by round."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial

import torch

import anyep
from benchmarks.gpu import torch_ops
from benchmarks.gpu.contest import Contest
from benchmarks.gpu.correct import check_combine, check_dispatch
from benchmarks.gpu.torch_ops import Piece
from benchmarks.gpu.work import Inputs, Ranks, Work

SCALE_BYTES, ROUTING_BYTES = 4, 12
SENDS, RECEIVES, COMBINES = 3, 3, 3
"""Kernels of a rank: halves of a padded dispatch, and a combine (tests/gpu/test_launch_counts.py)."""
Sums = list[torch.Tensor]


def bytes_of(work: Work, pieces: list[list[Piece]]) -> tuple[int, int]:
    """Return the bytes that a dispatch and a combine read once and write once, all ranks together."""
    rows = sum(len(piece.row) for own in pieces for piece in own)
    tokens = work.ranks * work.tokens
    row_bytes = work.hidden + work.hidden // 128 * SCALE_BYTES
    routing = 4 if work.layout == "padded" else ROUTING_BYTES * work.topk
    return 2 * work.hidden * tokens + (row_bytes + routing) * rows, 2 * work.hidden * (rows + tokens)


def bytes_of_halves(work: Work, inputs: Inputs, pieces: list[list[Piece]]) -> tuple[int, int]:
    """Return the same for the halves of a padded dispatch: tokens to slots, once a receiver; and slots to blocks."""
    local = work.experts // work.ranks
    owners = [torch.zeros(work.tokens, work.ranks, dtype=torch.bool, device=idx.device) for idx in inputs.topk_idx]
    pairs = sum(int(hit.scatter_(1, idx // local, 1).sum()) for hit, idx in zip(owners, inputs.topk_idx, strict=True))
    rows = sum(len(piece.row) for own in pieces for piece in own)
    row_bytes = work.hidden + work.hidden // 128 * SCALE_BYTES
    slots = pairs * (row_bytes + 8 * work.topk + 4)
    return 2 * work.hidden * work.ranks * work.tokens + slots, slots + rows * (row_bytes + 4)


class Measured:
    """A work whose ways are timed as far as they were found right. ``stack`` closes its buffers."""

    def __init__(self, contest: Contest, work: Work, stack: ExitStack, **options: object) -> None:
        self.work, self.name = work, work.title
        self._contest = contest
        self._stack = stack
        self._options = options
        self._settle = contest.stopwatch.settle
        self.inputs = Inputs.draw(work, contest.stopwatch.device)
        self.pieces = torch_ops.pieces_of(work, self.inputs)
        self._sent, self._summed = bytes_of(work, self.pieces)
        most = max(sum(len(piece.row) for piece in own) for own in self.pieces)
        self._fixed = {} if work.layout == "padded" else {"static_rows": most}
        with contest.noting(f"{self.name}, launched"):
            self._launched()
        if work.layout != "padded":
            with contest.noting(f"{self.name}, host waits for counts"):
                self._counted()
        if contest.stopwatch.has_streams:
            with contest.noting(f"{self.name}, concurrent"):
                self._concurrent()

    def _ranks(self, **options: object) -> Ranks:
        return self._stack.enter_context(closing(Ranks(self.work, **self._options, **options)))

    def _launched(self) -> None:
        """All ranks on one stream: launched, then replayed; and torch's operations beside them."""
        ranks = self._ranks(**self._fixed)
        received = self._check_dispatched(lambda: ranks.dispatch(self.inputs))
        outputs = [torch.randn(one.x.shape, device=one.x.device).bfloat16() for one in received]
        expected = self._torch_sums(outputs)
        self._check_summed(lambda: ranks.combine(outputs, received), expected)
        self._add(ranks, received, outputs, "launched")
        calls = self.work.ranks
        self._contest.add_host(self.name, "dispatch, host by call", lambda: ranks.dispatch(self.inputs), calls)
        self._contest.add_host(self.name, "combine, host by call", lambda: ranks.combine(outputs, received), calls)
        self._add_torch(received, outputs)
        with self._contest.noting(f"{self.name}, graph"):
            self._replayed(ranks, received, outputs, expected)
        if self.work.layout == "padded":
            with self._contest.noting(f"{self.name}, halves in graphs"):
                self._halved(ranks)

    def _replayed(self, ranks: Ranks, received: list[anyep.Received], outputs: Sums, expected: Sums) -> None:
        graph = self._contest.stopwatch.graph
        replay, again = graph(lambda: ranks.dispatch(self.inputs))
        self._check_dispatched(lambda: (replay(), again)[1])
        self._contest.add(self.name, "dispatch, graph", replay, self._sent)
        replay_sum, sums = graph(lambda: ranks.combine(outputs, received))
        self._check_summed(lambda: (replay_sum(), sums)[1], expected)
        self._contest.add(self.name, "combine, graph", replay_sum, self._summed, COMBINES * self.work.ranks)

    def _halved(self, ranks: Ranks) -> None:
        """Sends and receives of all ranks in a graph each."""
        stopwatch, ranks_num = self._contest.stopwatch, self.work.ranks
        calls: list[anyep.Pending[anyep.Received]] = []

        def send() -> object:
            calls[:] = ranks.send(self.inputs)
            return calls

        send_again, receive_again, received = stopwatch.halves(send, lambda: ranks.receive(calls))
        self._check_dispatched(lambda: (send_again(), receive_again(), received)[2])
        sent, arrived = bytes_of_halves(self.work, self.inputs, self.pieces)
        self._contest.add(self.name, "all sends, graph", send_again, sent, SENDS * ranks_num)
        self._contest.add(self.name, "all receives, graph", receive_again, arrived, RECEIVES * ranks_num)

    def _counted(self) -> None:
        """The host waits for the number of rows."""
        ranks = self._ranks()
        self._check_dispatched(lambda: ranks.dispatch(self.inputs))
        self._contest.add(self.name, "dispatch, host waits for counts", lambda: ranks.dispatch(self.inputs), self._sent)

    def _concurrent(self) -> None:
        """Each rank on a stream of its own."""
        ranks = self._ranks(**self._fixed, concurrent=True)
        received = self._check_dispatched(lambda: ranks.dispatch(self.inputs))
        outputs = [torch.randn(one.x.shape, device=one.x.device).bfloat16() for one in received]
        self._check_summed(lambda: ranks.combine(outputs, received), self._torch_sums(outputs))
        self._add(ranks, received, outputs, "concurrent")

    def _add(self, ranks: Ranks, received: list[anyep.Received], outputs: Sums, how: str) -> None:
        self._contest.add(self.name, f"dispatch, {how}", lambda: ranks.dispatch(self.inputs), self._sent)
        self._contest.add(self.name, f"combine, {how}", lambda: ranks.combine(outputs, received), self._summed)

    def _add_torch(self, received: list[anyep.Received], outputs: Sums) -> None:
        hidden = self.work.hidden
        rows = [torch.zeros_like(one.x.view(torch.uint8).view(-1, hidden)) for one in received]
        out = [(x, torch.zeros(len(x), hidden // 128, device=x.device)) for x in rows]
        dispatch = partial(torch_ops.dispatch, self.inputs, self.pieces, out)
        self._contest.add(self.name, "dispatch, torch", dispatch, self._sent)
        self._contest.add(self.name, "combine, torch", lambda: self._torch_sums(outputs), self._summed)
        with self._contest.noting(f"{self.name}, torch in graphs"):
            graph = self._contest.stopwatch.graph
            self._contest.add(self.name, "dispatch, torch, graph", graph(dispatch)[0], self._sent)
            self._contest.add(
                self.name, "combine, torch, graph", graph(partial(self._torch_sums, outputs))[0], self._summed
            )

    def _check_dispatched(self, act: Callable[[], list[anyep.Received]]) -> list[anyep.Received]:
        received = act()
        self._settle()
        check_dispatch(self.work, self.inputs, self.pieces, received)
        return received

    def _check_summed(self, act: Callable[[], Sums], expected: Sums) -> None:
        sums = act()
        self._settle()
        check_combine(expected, sums, self.name)

    def _torch_sums(self, outputs: Sums) -> Sums:
        padded = self.work.layout == "padded"
        return torch_ops.combine(self.work, self.inputs, self.pieces, outputs, by_column=padded)
