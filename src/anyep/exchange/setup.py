"""From a caller's arguments to an endpoint: check here, agree with all ranks, then allocate."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace

import numpy as np

from anyep.exchange import calibrate_links
from anyep.exchange.across import far_ranks, look_across
from anyep.exchange.calibrate import NUM_EPOCHS, given_rule, measured_rule
from anyep.exchange.crowd import Crowd
from anyep.exchange.desk import Desk, Lanes
from anyep.exchange.eager import EagerSlots
from anyep.exchange.endpoint import Books, Endpoint, ExpertTables, SegmentBases, scale_code
from anyep.exchange.explain import Explanation, explain
from anyep.exchange.ledger import NEAR
from anyep.exchange.options import PRIVATE, BufferOptions
from anyep.exchange.stats import Counters
from anyep.exchange.straight_rule import StraightRule
from anyep.exchange.workers import Workers
from anyep.kernels.registry import load
from anyep.kernels.spec import KernelSet
from anyep.layout.hosts import group_ranks
from anyep.transport.base import Block, Place, Transport, Words
from anyep.transport.hierarchical import HierarchicalTransport
from anyep.transport.liveness import blame_for
from anyep.transport.registry import open_transport
from anyep.transport.rendezvous import Rendezvous, find_rendezvous
from anyep.transport.together import together
from anyep.version import __version__

_MAX_THREADS = 4
"""Two threads saturate a memory channel; four serve every host measured so far."""
_VERSION = "AnyEP"
"""Among what ranks tell each other, before their arguments."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A rank that is ready: its endpoint, and why it looks the way it does."""

    endpoint: Endpoint
    explanation: Explanation


def open_endpoint(group: object, options: BufferOptions) -> Opened:
    """Collective. A rank that cannot take part makes every rank raise, and is named."""
    rendezvous = find_rendezvous(group)
    if options.device is not None:
        from anyep.exchange.device.setup import open_device_endpoint

        return open_device_endpoint(rendezvous, options)
    kernels = _agree(rendezvous, options)
    lanes = options.lanes(rendezvous.size)
    account = options.account(rendezvous.size, rendezvous.rank)
    opened = open_transport(
        rendezvous,
        transport=options.transport,
        lanes=lanes.all(),
        ring=options.ring,
        heap_bytes=account.heap_bytes,
        timeout_s=options.timeout_s,
        interface=options.interface,
    )
    try:
        endpoint = endpoint_on(opened.transport, kernels, lanes, options)
    except BaseException as error:
        opened.transport.leave(blame_for(error, rendezvous.rank, opened.transport.holders))
        opened.transport.close()
        raise
    if endpoint.across is not None:
        crossing = endpoint.across.bound_bytes(options.row_bytes(), options.num_topk, options.max_tokens_per_rank)
        account = replace(account, crossing_bytes=crossing)
    return Opened(endpoint=endpoint, explanation=explain(endpoint, account, opened.reason, options.num_threads is None))


def endpoint_on(transport: Transport, kernels: KernelSet, lanes: Lanes, options: BufferOptions) -> Endpoint:
    """Give every rank its eager slots, and measure for what they pay. Collective: uses the epochs before 1."""
    placement, wire = options.place_experts(transport.size), options.make_wire()
    hosts = (
        transport.hosts if isinstance(transport, HierarchicalTransport) else group_ranks(transport.size, transport.size)
    )
    far_R = far_ranks(hosts, transport.rank)
    links_measured = hosts.num_hosts > 1 and options.straight_bytes is None
    area = transport.allocate(options.ring * transport.size * options.slot_bytes(transport.size))
    # what is measured uses epochs one by one up to 0
    first = -(options.eager_bytes is None) * NUM_EPOCHS - links_measured * calibrate_links.NUM_EPOCHS
    bases_R = _swap_areas(transport, lanes, area, far_R, epoch=first)
    slots = EagerSlots(area, bases_R, transport.rank, slot_bytes=options.slot_bytes(transport.size))
    if options.eager_bytes is None:
        rule = measured_rule(transport, lanes, kernels, area, epoch=first + 1)
    else:
        rule = given_rule(options.eager_bytes)
    across = None
    if isinstance(transport, HierarchicalTransport):
        across = look_across(transport, placement, _look_at_links(transport, lanes, options))
    return Endpoint(
        transport=transport,
        kernels=kernels,
        books=load_books(),
        placement=placement,
        tables=ExpertTables.of(placement),
        lanes=lanes,
        wire=wire,
        scale_code=scale_code(wire),
        hidden=options.hidden,
        num_topk=options.num_topk,
        max_tokens=options.max_tokens_per_rank,
        expert_alignment=options.expert_alignment,
        static_rows=options.static_rows,
        source_tokens=False,
        max_in_flight=options.max_in_flight,
        workers=Workers(options.num_threads or _default_threads(transport.size)),
        counters=Counters(transport.size, int(placement.experts_per_rank_R[transport.rank])),
        bases=SegmentBases(transport.size),
        slots=slots,
        rule=rule,
        far_R=far_R,
        across=across,
        crowd=Crowd(),
        desks=tuple(Desk(index, slots, lanes, placement.num_experts) for index in range(options.ring)),
    )


def _look_at_links(transport: HierarchicalTransport, lanes: Lanes, options: BufferOptions) -> StraightRule:
    if options.straight_bytes is not None:
        return calibrate_links.given_links(transport, options.straight_bytes)
    return calibrate_links.measured_links(transport, lanes, epoch=1 - calibrate_links.NUM_EPOCHS)


def _swap_areas(transport: Transport, lanes: Lanes, area: Block, far_R: Words, *, epoch: int) -> Words:
    """Tell every rank where this rank's eager slots lie; return where theirs lie here, int64 [R], 0 on other hosts."""
    words_RW = np.tile(np.array([area.place.segment, area.place.offset], np.int64), (transport.size, 1))
    transport.post(lanes.open, epoch, words_RW)
    told_R2 = transport.wait(lanes.open, epoch, "opening: eager slots")[:, :2].tolist()
    addresses = [
        transport.address(rank, Place(segment=s, offset=o)) if far_R[rank] == NEAR else 0
        for rank, (s, o) in enumerate(told_R2)
    ]
    return np.array(addresses, np.int64)


def _agree(rendezvous: Rendezvous, options: BufferOptions) -> KernelSet:
    """Check every rank's arguments and load every rank's kernels; what fails on one rank is an error on all."""
    loaded: list[KernelSet] = []

    def act() -> dict[str, str]:
        options.check()
        options.place_experts(rendezvous.size)
        loaded.append(load(options.kernels))
        load_books()
        arguments = {name: repr(value) for name, value in asdict(options).items() if name not in PRIVATE}
        return {_VERSION: __version__, **arguments}

    check_equal(rendezvous.rank, together(rendezvous, act, what="make its buffer"))
    return loaded[0]


def check_equal(rank: int, told: list[dict[str, str]]) -> None:
    """Raise ValueError where ranks differ: in what they run, first, or in what they pass."""
    for name, mine in told[rank].items():
        for other, options in enumerate(told):
            theirs = options.get(name, "none")
            if theirs != mine and name == _VERSION:
                raise ValueError(
                    f"rank {rank} runs AnyEP {mine}, and rank {other} AnyEP {theirs}; install the same version on all "
                    "hosts"
                )
            if theirs != mine:
                raise ValueError(
                    f"{name} differs between ranks: {mine} on rank {rank}, {theirs} on rank {other}; "
                    "every rank must make its buffer with the same arguments"
                )


def load_books() -> Books:
    """Import the compiled bookkeeping; it compiles on its first use on a machine, under its lock."""
    from anyep.machine.compiler import compiling

    with compiling():
        from anyep.exchange import connect, fold, halves, ordering, settle
    return Books(
        begin=halves.begin,
        size_up=halves.size_up,
        find_rows=halves.find_rows,
        agree=settle.agree,
        keep=settle.keep,
        settle=settle.settle,
        connect=connect.connect,
        connect_back=connect.connect_back,
        fold=fold.fold,
        sort_by_column=ordering.sort_by_column,
        order_by_column=ordering.order_by_column,
    )


def _default_threads(num_ranks: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MAX_THREADS, cores // num_ranks))
