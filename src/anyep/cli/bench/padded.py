"""AnyEP's low-latency side of a contest: blocks of experts, weights applied at the origin, two wires for combine."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import accumulate
from types import TracebackType
from typing import Any

import torch

from anyep.buffer import Buffer
from anyep.cli.bench.ours import DTYPES, POISON, account
from anyep.cli.bench.plan import Workload
from anyep.cli.bench.rounds import Operation
from anyep.cli.bench.tape import OUTPUT, SENT, Tape
from anyep.exchange.event import Pending
from anyep.exchange.handle import Handle, Received
from anyep.numerics.logfmt import logfmt_row_bytes
from anyep.testing.oracle import Exchange
from anyep.transport.rendezvous import find_rendezvous

LOGFMT = "logfmt10"
TAPE_EXPONENT = -8
"""Rows are made so small that LogFMT-10 codes every group of channels; those from 1 on would travel as they are."""
_SLACK_BYTES = 1 << 20


class Padded:
    """One rank. The buffer's blocks hold Tmax rows of every rank for each expert, filled or not."""

    def __init__(
        self, group: object, workload: Workload, exchange: Exchange, *, transport: str, timeout_s: float
    ) -> None:
        rendezvous = find_rendezvous(group)
        rank = rendezvous.rank
        self.num_rows = sum(exchange.arrivals[rank].counts)
        self._stack = ExitStack()
        self.ep = self._stack.enter_context(
            Buffer(
                group,
                hidden=workload.hidden,
                num_experts=workload.experts,
                num_topk=workload.topk,
                max_tokens_per_rank=workload.tokens,
                wire=workload.wire,
                transport=transport,
                arena_bytes=padded_bytes(workload, rendezvous.size, rank, self.num_rows),
                timeout_s=timeout_s,
            )
        )
        self.has_logfmt = DTYPES[workload.wire] == torch.bfloat16
        self.tape = Tape(workload.hidden, DTYPES[workload.wire], exponent=TAPE_EXPONENT)
        self._routing = exchange.routing[rank]
        self.x = self.tape.rows(SENT, rank, torch.arange(workload.tokens))
        self.out = torch.zeros_like(self.x)
        received = self.dispatch()
        self.handle: Handle = received.handle
        self.in_arena = self.ep.empty_output(self.handle)
        for block, count, end in zip(self.in_arena, received.counts, accumulate(received.counts), strict=True):
            self.tape.fill(block[:count], OUTPUT, rank, torch.arange(end - count, end))

    def __enter__(self) -> Padded:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def dispatch(self) -> Received:
        return self.ep.dispatch(self.x, self._routing.topk_idx, self._routing.topk_weights, layout="padded")

    def combine(self, handle: Handle | None = None, wire: str | None = None) -> torch.Tensor:
        return self.ep.combine(self.in_arena, handle or self.handle, out=self.out, wire=wire)

    def both(self, wire: str | None = None) -> Received:
        """Dispatch, and combine at once what the experts would have returned."""
        received = self.dispatch()
        self.combine(received.handle, wire)
        return received

    def start_dispatch(self) -> Pending[Received]:
        return self.ep.dispatch(self.x, self._routing.topk_idx, self._routing.topk_weights, layout="padded", wait=False)

    def start_combine(self, handle: Handle) -> Pending[Any]:
        return self.ep.combine(self.in_arena, handle, out=self.out, wait=False)

    def together(self) -> list[Operation]:
        """Return the operations that a comparison is paired with."""
        both = [Operation(name="dispatch_combine_padded", run=self.both)]
        if self.has_logfmt:
            both.append(Operation(name="dispatch_combine_padded_logfmt10", run=lambda: self.both(LOGFMT)))
        return both

    def operations(self) -> list[Operation]:
        """Return every operation of the table."""
        combines = [Operation(name="combine_padded", run=self.combine)]
        if self.has_logfmt:
            combines.append(Operation(name="combine_padded_logfmt10", run=lambda: self.combine(wire=LOGFMT)))
        return [Operation(name="dispatch_padded", run=self.dispatch), *combines, *self.together()]

    def poison_out(self) -> None:
        """Make what an operation leaves unwritten visible."""
        self.out.view(torch.uint8).fill_(POISON)


def padded_bytes(workload: Workload, num_ranks: int, rank: int, num_rows: int) -> int:
    """Return what one rank's arena holds: a batch, an output, and its ``num_rows`` defined rows in LogFMT-10."""
    batch_and_output = account(workload, num_ranks, rank).step.padded_bytes
    return batch_and_output + num_rows * logfmt_row_bytes(workload.hidden) + _SLACK_BYTES
