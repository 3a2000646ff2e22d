"""From a caller's arguments to an endpoint: check here, agree with all ranks, then allocate."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

from anyep.exchange.endpoint import Endpoint, ExpertTables, Lanes, SegmentBases, Workers
from anyep.exchange.explain import Explanation, explain
from anyep.exchange.options import PRIVATE, RING, BufferOptions
from anyep.exchange.stats import Counters
from anyep.kernels.registry import load
from anyep.kernels.spec import KernelSet
from anyep.transport.base import Transport
from anyep.transport.registry import open_transport
from anyep.transport.rendezvous import Rendezvous, find_rendezvous
from anyep.transport.together import together

_MAX_THREADS = 4
"""Two threads saturate a memory channel; four serve every host measured so far."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A rank that is ready: its endpoint, and why it looks the way it does."""

    endpoint: Endpoint
    explanation: Explanation


def open_endpoint(group: object, options: BufferOptions) -> Opened:
    """Collective. A rank that cannot take part makes every rank raise, and is named."""
    rendezvous = find_rendezvous(group)
    kernels = _agree(rendezvous, options)
    lanes = options.lanes(rendezvous.size)
    account = options.account(rendezvous.size, rendezvous.rank)
    opened = open_transport(
        rendezvous,
        transport=options.transport,
        lanes=lanes.all(),
        ring=RING,
        heap_bytes=account.heap_bytes,
        timeout_s=options.timeout_s,
    )
    endpoint = _endpoint(opened.transport, kernels, lanes, options)
    return Opened(endpoint=endpoint, explanation=explain(endpoint, account, opened.reason, options.num_threads is None))


def _endpoint(transport: Transport, kernels: KernelSet, lanes: Lanes, options: BufferOptions) -> Endpoint:
    placement = options.place_experts(transport.size)
    return Endpoint(
        transport=transport,
        kernels=kernels,
        placement=placement,
        tables=ExpertTables.of(placement),
        lanes=lanes,
        wire=options.make_wire(),
        row=options.row_bytes(),
        hidden=options.hidden,
        num_topk=options.num_topk,
        max_tokens=options.max_tokens_per_rank,
        expert_alignment=options.expert_alignment,
        workers=Workers(options.num_threads or _default_threads(transport.size)),
        counters=Counters(),
        bases=SegmentBases(transport.size),
    )


def _agree(rendezvous: Rendezvous, options: BufferOptions) -> KernelSet:
    """Check every rank's arguments and load every rank's kernels; what fails on one rank is an error on all."""
    loaded: list[KernelSet] = []

    def act() -> dict[str, str]:
        options.check()
        options.place_experts(rendezvous.size)
        loaded.append(load(options.kernels))
        return {name: repr(value) for name, value in asdict(options).items() if name not in PRIVATE}

    _check_equal(rendezvous.rank, together(rendezvous, act, what="make its buffer"))
    return loaded[0]


def _check_equal(rank: int, told: list[dict[str, str]]) -> None:
    for name, mine in told[rank].items():
        for other, options in enumerate(told):
            theirs = options[name]
            if theirs != mine:
                raise ValueError(
                    f"{name} differs between ranks: {mine} on rank {rank}, {theirs} on rank {other}; "
                    "every rank must make its buffer with the same arguments"
                )


def _default_threads(num_ranks: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MAX_THREADS, cores // num_ranks))
