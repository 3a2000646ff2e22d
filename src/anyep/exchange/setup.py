"""From a caller's arguments to an endpoint: check here, agree with all ranks, then allocate."""

from __future__ import annotations

import json
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
    _agree(rendezvous, options)
    lanes = options.lanes(rendezvous.size)
    account = options.account(rendezvous.size, rendezvous.rank)
    kernels = load(options.kernels)
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


def _agree(rendezvous: Rendezvous, options: BufferOptions) -> None:
    """Check one's own arguments, then everybody's; bad ones on one rank are an error on all."""
    failure: Exception | None = None
    try:
        options.check()
        options.place_experts(rendezvous.size)
    except (TypeError, ValueError, OSError) as error:
        failure = error
    shared = {name: value for name, value in asdict(options).items() if name not in PRIVATE} if failure is None else {}
    item = {
        "error": None if failure is None else f"{type(failure).__name__}: {failure}",
        "options": _as_text(shared),
    }
    items = [json.loads(raw) for raw in rendezvous.allgather(json.dumps(item).encode())]
    if failure is not None:
        raise failure
    for rank, other in enumerate(items):
        if other["error"] is not None:
            raise ValueError(f"rank {rank} could not make its buffer: {other['error']}")
    _check_equal(rendezvous.rank, items)


def _as_text(options: dict[str, object]) -> dict[str, str]:
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


def _default_threads(num_ranks: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MAX_THREADS, cores // num_ranks))
