"""AnyEP's side of a contest: a buffer, one batch, and the operations that are timed."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import Any

import torch

from anyep.buffer import Buffer
from anyep.cli.bench.plan import WIRE_BYTES, Workload
from anyep.cli.bench.rounds import Operation
from anyep.cli.bench.tape import OUTPUT, SENT, Tape
from anyep.exchange.event import Pending
from anyep.exchange.handle import Handle, Received
from anyep.exchange.options import memory_account
from anyep.layout.hosts import HostMap
from anyep.layout.regions import MemoryAccount
from anyep.numerics.formats import num_scale_groups
from anyep.testing.oracle import Exchange
from anyep.transport.rendezvous import find_rendezvous

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
"""What goes in, and what experts return."""
POISON = 0xFF
_ROUTING_BYTES = 12
"""Index and weight of one column."""
_OFFERED = 9 / 8
"""Memory for a batch is cut before its rows are counted, an eighth larger than the last; the rest leaves gaps."""
_SLACK_BYTES = 1 << 20


class Ours:
    """One rank. The experts' outputs are made once: every dispatch of the same batch gives the same rows."""

    def __init__(
        self,
        group: object,
        workload: Workload,
        exchange: Exchange,
        tape: Tape,
        *,
        transport: str,
        timeout_s: float,
        eager_bytes: int | None = None,
        num_outputs: int = 2,
    ) -> None:
        rank = find_rendezvous(group).rank
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
                arena_bytes=arena_bytes(workload, exchange.arrivals[rank].num_rows, num_outputs),
                timeout_s=timeout_s,
                eager_bytes=eager_bytes,
            )
        )
        self.tape = tape
        self._routing = exchange.routing[rank]
        self.x = tape.rows(SENT, rank, torch.arange(workload.tokens))
        self.out = torch.zeros_like(self.x)
        self.handle: Handle = self.dispatch().handle
        self.in_arena = self.ep.empty_output(self.handle)
        tape.fill(self.in_arena, OUTPUT, rank, torch.arange(self.handle.num_rows))

    @cached_property
    def outside(self) -> torch.Tensor:
        """The experts' outputs once more, where combine has to copy them."""
        return self.in_arena.clone()

    @property
    def num_rows(self) -> int:
        """Rows that this rank receives."""
        return self.handle.num_rows

    @property
    def hosts(self) -> HostMap | None:
        """Where ranks live on several hosts: which, as combine's bits depend on it."""
        across = self.ep._end.across
        return None if across is None else across.hosts

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def dispatch(self) -> Received:
        return self.ep.dispatch(self.x, self._routing.topk_idx, self._routing.topk_weights)

    def dispatch_cached(self) -> Received:
        return self.ep.dispatch(self.x, topk_weights=self._routing.topk_weights, handle=self.handle)

    def combine(self, y: torch.Tensor, handle: Handle | None = None) -> torch.Tensor:
        return self.ep.combine(y, handle or self.handle, out=self.out)

    def both(self, y: torch.Tensor) -> Received:
        """Dispatch, and combine at once what the experts would have returned."""
        received = self.dispatch()
        self.combine(y, received.handle)
        return received

    def start_dispatch(self) -> Pending[Received]:
        return self.ep.dispatch(self.x, self._routing.topk_idx, self._routing.topk_weights, wait=False)

    def start_combine(self, handle: Handle) -> Pending[Any]:
        return self.ep.combine(self.in_arena, handle, out=self.out, wait=False)

    def together(self) -> list[Operation]:
        """Return the operations that a comparison is paired with."""
        return [
            Operation(name="dispatch_combine", run=lambda: self.both(self.in_arena)),
            Operation(name="dispatch_combine_copied_in", run=lambda: self.both(self.outside)),
        ]

    def operations(self) -> list[Operation]:
        """Return every operation of the table."""
        return [
            Operation(name="dispatch", run=self.dispatch),
            Operation(name="dispatch_cached", run=self.dispatch_cached),
            Operation(name="combine", run=lambda: self.combine(self.in_arena)),
            Operation(name="combine_copied_in", run=lambda: self.combine(self.outside)),
            *self.together(),
        ]

    def poison_out(self) -> None:
        """Make what an operation leaves unwritten visible."""
        self.out.view(torch.uint8).fill_(POISON)


def account(workload: Workload, num_ranks: int, rank: int = 0) -> MemoryAccount:
    """Return what a buffer for a workload takes."""
    return memory_account(
        num_ranks,
        rank=rank,
        hidden=workload.hidden,
        num_experts=workload.experts,
        num_topk=workload.topk,
        max_tokens_per_rank=workload.tokens,
        wire=workload.wire,
    )


def arena_bytes(workload: Workload, num_rows: int, num_outputs: int = 2) -> int:
    """Return what one rank's arena holds at most: a batch, an output, and another output where one is copied in."""
    wire = workload.hidden * WIRE_BYTES[workload.wire] + 4 * num_scale_groups(workload.hidden)
    output = workload.hidden * DTYPES[workload.wire].itemsize
    batch = int(_OFFERED * num_rows * (wire + workload.topk * _ROUTING_BYTES))
    return batch + num_outputs * num_rows * output + _SLACK_BYTES


def poison(received: Received) -> None:
    """Overwrite a batch before its memory is used again: what the next one leaves unwritten shows."""
    for tensor in (received.x, received.scales, received.topk_idx, received.topk_weights):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(POISON)
