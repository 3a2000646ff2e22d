"""What one rank on one of the hosts does: check, time against the comparisons, check again, count what crossed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta

from anyep.cli.bench.compact_checks import CompactChecks
from anyep.cli.bench.hosts.plan import HostsPlan
from anyep.cli.bench.ours import DTYPES, Ours
from anyep.cli.bench.peers import GLOO, GLOO_RANKS, open_peer
from anyep.cli.bench.plan import Workload
from anyep.cli.bench.rounds import Operation, Spans, contest
from anyep.cli.bench.routing import make_exchange
from anyep.cli.bench.tape import Tape
from anyep.cli.bench.verify import check_peer
from anyep.testing.hosts import INTERFACE, LinkBytes, interface_bytes
from anyep.testing.oracle import Exchange
from anyep.testing.peers.base import Peer
from anyep.transport.rendezvous import Rendezvous

PAIRED = "dispatch_combine"
"""Our operation that the comparisons meet."""
_WARM_UP = 1


@dataclass(frozen=True, kw_only=True)
class HostResult:
    """One workload as one rank saw it."""

    workload: Workload
    names: list[str]
    spans: Spans
    """[rounds, names, 2]"""
    crossed: dict[str, LinkBytes]
    """operation -> what the interface of this rank's host carried in one"""
    mismatches: dict[str, str]
    """operation -> the first difference"""
    between: str
    """the transport, and why it is this one"""


def run_host_rank(group: Rendezvous, rank: int, plan: HostsPlan, store: str) -> list[HostResult]:
    """Carry out the plan. Collective. ``store``: a file that all ranks see, where torch.distributed's ranks meet."""
    with _torch_group(group, store, plan.base.timeout_s):
        return [_measure(group, plan, workload) for workload in plan.base.workloads]


@contextmanager
def _torch_group(group: Rendezvous, store: str, timeout_s: float) -> Iterator[None]:
    """Open torch.distributed's default group between the hosts, for the comparisons."""
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE  # gloo's own: it would look up the machine's name, and leave the hosts
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=group.rank,
        world_size=group.size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _measure(group: Rendezvous, plan: HostsPlan, workload: Workload) -> HostResult:
    exchange = make_exchange(workload, group.size)
    tape = Tape(workload.hidden, DTYPES[workload.wire])
    with ExitStack() as stack:
        ours = stack.enter_context(
            Ours(group, workload, exchange, tape, transport=plan.base.transport, timeout_s=plan.base.timeout_s)
        )
        checks = CompactChecks(ours, exchange, workload.wire)
        mismatches = checks.first()
        peers = [_open(stack, name, ours, workload, exchange) for name in (GLOO, GLOO_RANKS)]
        for peer, layout in peers:
            difference = check_peer(peer, layout, ours.ep.rank, tape)
            mismatches |= {peer.name: difference} if difference else {}
        operations = [*_own_operations(ours), *(_turn(peer) for peer, _ in peers)]
        spans = contest(
            operations,
            rounds=plan.rounds_of(workload),
            warm_up=_WARM_UP,
            barrier=ours.ep.barrier,
            after_round=lambda: None,
        )
        return HostResult(
            workload=workload,
            names=[operation.name for operation in operations],
            spans=spans,
            crossed=count_crossing(operations, ours.ep.barrier),
            mismatches={**checks.again(), **mismatches},
            between=_between(ours),
        )


def _open(stack: ExitStack, name: str, ours: Ours, workload: Workload, exchange: Exchange) -> tuple[Peer, Exchange]:
    peer, layout = open_peer(name, None, ours, workload, exchange)
    stack.callback(peer.close)
    return peer, layout


def _own_operations(ours: Ours) -> list[Operation]:
    return [
        Operation(name="dispatch", run=ours.dispatch),
        Operation(name="combine", run=lambda: ours.combine(ours.in_arena)),
        Operation(name=PAIRED, run=lambda: ours.both(ours.in_arena)),
    ]


def _turn(peer: Peer) -> Operation:
    return Operation(name=peer.name, run=lambda: peer.combine(peer.dispatch()))


def count_crossing(operations: Sequence[Operation], barrier: Callable[[], None]) -> dict[str, LinkBytes]:
    """Run each operation once more; return what this host's interface carried from before its first rank's begin.

    A barrier lies on either side of each look at the counters, so that no other rank is ahead: that of the end is
    counted along, some hundred bytes a rank.
    """
    crossed = {}
    for operation in operations:
        barrier()
        before = interface_bytes()
        barrier()
        operation.run()
        barrier()
        after = interface_bytes()
        crossed[operation.name] = LinkBytes(sent=after.sent - before.sent, received=after.received - before.received)
    return crossed


def _between(ours: Ours) -> str:
    choices = {choice.topic: choice for choice in ours.ep.explain().choices}
    engine = choices.get("engine")
    return f"{choices['transport'].chosen} ({choices['transport'].reason})" + (f"; {engine.chosen}" if engine else "")
