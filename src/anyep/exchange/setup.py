"""From a caller's arguments to an endpoint: check here, agree with all ranks, then allocate."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

import torch

from anyep.exchange.arguments import check_integer
from anyep.exchange.endpoint import Endpoint, ExpertTables, Workers, lanes_for
from anyep.exchange.explain import Explanation, explain
from anyep.exchange.stats import Counters
from anyep.exchange.wire import Wire, make_wire
from anyep.kernels.registry import load
from anyep.layout.placement import Placement, even_placement, mapped_placement
from anyep.layout.regions import MemoryAccount, RowBytes, memory_account
from anyep.layout.trace_file import TraceRecorder
from anyep.transport.control import ControlLayout
from anyep.transport.registry import check_name, open_transport
from anyep.transport.rendezvous import Rendezvous, find_rendezvous

RING = 2
"""Ring slots a lane: twice the operations in flight (transport/base.py has the argument)."""
_MAX_THREADS = 4
"""Two threads saturate a memory channel; four serve every host measured so far."""


@dataclass(frozen=True, kw_only=True)
class BufferOptions:
    """What a buffer is made from; must be equal on all ranks, but for threads and arena size."""

    hidden: int
    num_experts: int
    num_topk: int
    max_tokens_per_rank: int
    wire: str
    scales: str
    expert_alignment: int
    static_rows: int | None
    placement: tuple[int, ...] | None
    transport: str
    kernels: str
    num_threads: int | None
    arena_bytes: int | None
    timeout_s: float
    record: str | None

    def recorder(self, rank: int) -> TraceRecorder | None:
        """Return what records this rank's routing, if that was asked for; errors of its path as TraceRecorder's."""
        if self.record is None:
            return None
        return TraceRecorder(self.record, num_experts=self.num_experts, num_topk=self.num_topk, rank=rank)

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the argument."""
        check_integer("hidden", self.hidden, at_least=1)
        check_integer("num_experts", self.num_experts, at_least=1)
        check_integer("num_topk", self.num_topk, at_least=1)
        check_integer("max_tokens_per_rank", self.max_tokens_per_rank, at_least=0)
        check_integer("expert_alignment", self.expert_alignment, at_least=1)
        if self.static_rows is not None:
            check_integer("static_rows", self.static_rows, at_least=0)
        if self.num_threads is not None:
            check_integer("num_threads", self.num_threads, at_least=1)
        if self.arena_bytes is not None:
            check_integer("arena_bytes", self.arena_bytes, at_least=0)
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, (int, float)):
            raise TypeError(f"timeout_s must be a number of seconds, got {self.timeout_s!r}")
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"timeout_s must be positive and finite, got {self.timeout_s}")
        if self.placement is not None and len(self.placement) != self.num_experts:
            raise ValueError(
                f"placement must name a rank for each of num_experts={self.num_experts} experts, "
                f"got {len(self.placement)}"
            )
        make_wire(self.wire, self.scales, self.hidden)
        check_name(self.transport)
        self.recorder(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A rank that is ready: its endpoint, and why it looks the way it does."""

    endpoint: Endpoint
    explanation: Explanation


_PRIVATE = ("num_threads", "arena_bytes", "timeout_s", "record")


def open_endpoint(group: object, options: BufferOptions) -> Opened:
    """Collective. A rank that cannot take part makes every rank raise, and is named."""
    rendezvous = find_rendezvous(group)
    _agree(rendezvous, options)
    placement = _placement(options, rendezvous.size)
    wire = make_wire(options.wire, options.scales, options.hidden)
    row = _row_bytes(wire, options)
    lanes = lanes_for(placement)
    control = ControlLayout.of(lanes.all(), RING, rendezvous.size).num_bytes
    account = _account(options, placement, rendezvous, row, control)
    kernels = load(options.kernels)
    opened = open_transport(
        rendezvous,
        transport=options.transport,
        lanes=lanes.all(),
        ring=RING,
        heap_bytes=account.arena_bytes,
        timeout_s=options.timeout_s,
    )
    threads = options.num_threads or _default_threads(rendezvous.size)
    endpoint = Endpoint(
        transport=opened.transport,
        kernels=kernels,
        placement=placement,
        tables=ExpertTables.of(placement),
        lanes=lanes,
        wire=wire,
        row=row,
        hidden=options.hidden,
        num_topk=options.num_topk,
        max_tokens=options.max_tokens_per_rank,
        expert_alignment=options.expert_alignment,
        workers=Workers(threads),
        counters=Counters(),
    )
    return Opened(endpoint=endpoint, explanation=explain(endpoint, account, opened.reason, options.num_threads is None))


def _agree(rendezvous: Rendezvous, options: BufferOptions) -> None:
    """Check one's own arguments, then everybody's; bad ones on one rank are an error on all."""
    failure: Exception | None = None
    try:
        options.check()
        _placement(options, rendezvous.size)
    except (TypeError, ValueError, OSError) as error:
        failure = error
    shared = {name: value for name, value in asdict(options).items() if name not in _PRIVATE} if failure is None else {}
    item = {
        "error": None if failure is None else f"{type(failure).__name__}: {failure}",
        "options": repr_values(shared),
    }
    items = [json.loads(raw) for raw in rendezvous.allgather(json.dumps(item).encode())]
    if failure is not None:
        raise failure
    for rank, other in enumerate(items):
        if other["error"] is not None:
            raise ValueError(f"rank {rank} could not make its buffer: {other['error']}")
    _check_equal(rendezvous.rank, items)


def repr_values(options: dict[str, object]) -> dict[str, str]:
    """Write option values as text that two processes can compare."""
    return {name: repr(value) for name, value in options.items()}


def _check_equal(rank: int, items: list[dict[str, dict[str, str]]]) -> None:
    for name, mine in items[rank]["options"].items():
        for other, item in enumerate(items):
            theirs = item["options"][name]
            if theirs != mine:
                raise ValueError(
                    f"{name} differs between ranks: {mine} on rank {rank}, {theirs} on rank {other}; "
                    "every rank must make its buffer with the same arguments"
                )


def _placement(options: BufferOptions, num_ranks: int) -> Placement:
    if options.placement is None:
        return even_placement(options.num_experts, num_ranks)
    return mapped_placement(options.placement, num_ranks)


def _row_bytes(wire: Wire, options: BufferOptions) -> RowBytes:
    combine_dtype = torch.bfloat16 if wire.name == "fp8" else wire.dtype
    return RowBytes(
        x=wire.row_bytes,
        scales=wire.scale_bytes,
        topk_idx=8 * options.num_topk,
        topk_weights=4 * options.num_topk,
        y=options.hidden * combine_dtype.itemsize,
    )


def _account(
    options: BufferOptions, placement: Placement, rendezvous: Rendezvous, row: RowBytes, control: int
) -> MemoryAccount:
    return memory_account(
        row,
        num_ranks=rendezvous.size,
        max_tokens=options.max_tokens_per_rank,
        num_topk=options.num_topk,
        num_experts=options.num_experts,
        local_experts=int(placement.experts_per_rank_R[rendezvous.rank]),
        control_bytes=control,
        arena_bytes=options.arena_bytes,
    )


def _default_threads(num_ranks: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MAX_THREADS, cores // num_ranks))
