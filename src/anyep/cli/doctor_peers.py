"""``anyep doctor --peers``: run by every rank of a job, it tells who is where, who reaches whom, and how fast.

Before the engine is opened one rank of each host connects to one of every other, so that a pair that cannot talk is
named, and not only that opening failed.
"""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import asdict, dataclass, field
from itertools import combinations, permutations
from typing import TYPE_CHECKING, Any

from anyep import config
from anyep.cli.peer_probe import Pair, cannot_reach, listening, probe_pair
from anyep.errors import AnyEPError, Unavailable
from anyep.layout.hosts import HostMap, group_ranks, map_hosts
from anyep.transport.engine import Engine
from anyep.transport.engines import open_engine
from anyep.transport.identity import Identity
from anyep.transport.interfaces import choose_interface
from anyep.transport.rendezvous import Rendezvous, find_rendezvous

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class PeerFacts:
    """What one rank says of itself."""

    host: str
    """its identity: ranks with the same one share memory"""
    name: str
    interface: str
    address: str
    reason: str
    port: int


@dataclass(frozen=True, kw_only=True)
class PeerReport:
    """What all ranks found out together; the same on every rank."""

    hosts: HostMap
    facts: list[PeerFacts]
    unreachable: list[str]
    engine: str = ""
    pairs: list[Pair] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        return not self.unreachable and all(pair.error is None for pair in self.pairs)


def run_peers(engine: str, interface: str | None, timeout_s: float) -> int:
    """Examine the job that this rank belongs to; rank 0 prints. Return the exit code, the same on every rank."""
    try:
        rendezvous = find_rendezvous(None)
    except TypeError as error:
        raise Unavailable(
            "doctor --peers is run by every rank of a job, on every host: torchrun --nnodes=2 --nproc-per-node=4 "
            "--rdzv-backend=c10d --rdzv-endpoint=HOST:29500 -m anyep doctor --peers"
        ) from error
    report = examine(rendezvous, engine, interface, timeout_s)
    if rendezvous.rank == 0:
        from rich.console import Console

        _print(report, Console() if sys.stdout.isatty() else Console(width=_WIDTH))
    return 0 if report.is_well else 1


def examine(rendezvous: Rendezvous, engine: str, interface: str | None, timeout_s: float) -> PeerReport:
    """Find out everything. Collective. Raises Unavailable where a rank has no such interface, or no engine opens."""
    own = choose_interface(interface)
    with listening(own.address) as port:
        facts = PeerFacts(
            host=Identity.own().host,
            name=socket.gethostname(),
            interface=own.name,
            address=own.address,
            reason=own.reason,
            port=port,
        )
        told = [PeerFacts(**item) for item in _tell_all(rendezvous, asdict(facts))]
        hosts = _map(told)
        unreachable = _find_unreachable(rendezvous, hosts, told, timeout_s)
    report = PeerReport(hosts=hosts, facts=told, unreachable=unreachable)
    if unreachable or hosts.num_hosts == 1:
        return report
    opened, reason = open_engine(engine, rendezvous, interface, timeout_s)
    try:
        pairs = [
            _measure(rendezvous, opened, hosts, pair, timeout_s) for pair in combinations(range(hosts.num_hosts), 2)
        ]
        chosen = f"{opened.describe().get('engine', opened.name)} ({reason})"
    finally:
        opened.close()
    return PeerReport(hosts=hosts, facts=told, unreachable=[], engine=chosen, pairs=pairs)


def _tell_all(rendezvous: Rendezvous, item: object) -> list[Any]:
    return [json.loads(raw) for raw in rendezvous.allgather(json.dumps(item).encode())]


def _map(facts: list[PeerFacts]) -> HostMap:
    played = config.ranks_per_host()
    return group_ranks(len(facts), played) if played else map_hosts([one.host for one in facts])


def _find_unreachable(rendezvous: Rendezvous, hosts: HostMap, facts: list[PeerFacts], timeout_s: float) -> list[str]:
    """Let the first rank of each host connect to those of all others; return a sentence for each failure."""
    found = []
    for here, there in permutations([members[0] for members in hosts.members], 2):
        if here != rendezvous.rank:
            continue
        other, own = facts[there], facts[here]
        why = cannot_reach(other.address, other.port, timeout_s)
        if why is not None:
            found.append(
                f"host {own.name} (rank {here}, {own.interface} {own.address}) does not reach host {other.name} "
                f"(rank {there}, {other.interface} {other.address} port {other.port}): {why}"
            )
    return [sentence for item in _tell_all(rendezvous, found) for sentence in item]


def _measure(rendezvous: Rendezvous, engine: Engine, hosts: HostMap, pair: tuple[int, int], timeout_s: float) -> Pair:
    """Let the first ranks of two hosts measure, and everybody else wait for them."""
    ends = [hosts.members[host][0] for host in pair]
    told: dict[str, object] | None = None
    if rendezvous.rank in ends:
        first = rendezvous.rank == ends[0]
        try:
            told = asdict(probe_pair(engine, pair, ends[first], first=first, timeout_s=timeout_s))
        except AnyEPError as error:
            told = asdict(Pair(hosts=pair, error=f"{type(error).__name__}: {error}"))
    by_rank = _tell_all(rendezvous, told)
    failed = next((by_rank[end] for end in ends if by_rank[end]["error"]), by_rank[ends[0]])
    return Pair(**{**failed, "hosts": pair})


def _print(report: PeerReport, console: Console) -> None:
    console.print(_ranks(report))
    if report.pairs:
        console.print()
        console.print(f"engine: {report.engine}", highlight=False, markup=False)
        console.print(_pairs(report))
    for sentence in report.unreachable:
        console.print(f"[bold red]UNREACHABLE[/bold red] {sentence}", highlight=False)
    if report.unreachable:
        console.print(
            "Check that these interfaces are in networks that reach each other and that no firewall closes TCP ports; "
            "choose others with --interface or GLOO_SOCKET_IFNAME.",
            highlight=False,
        )
    if report.hosts.num_hosts == 1:
        console.print("All ranks are on one host: nothing crosses a network.")


def _ranks(report: PeerReport) -> Table:
    from rich.table import Table

    table = Table("rank", "host", "name", "interface", "address", "why this one", box=None)
    for rank, facts in enumerate(report.facts):
        host = str(int(report.hosts.host_R[rank]))
        table.add_row(str(rank), host, facts.name, facts.interface, facts.address, facts.reason)
    return table


def _pairs(report: PeerReport) -> Table:
    from rich.table import Table

    table = Table("hosts", "latency us", "there Gbit/s", "back Gbit/s", "", box=None)
    for pair in report.pairs:
        numbers = (pair.latency_us, pair.there_gbit_s, pair.back_gbit_s)
        shown = ["" if number is None else f"{number:.3g}" for number in numbers]
        table.add_row(f"{pair.hosts[0]} - {pair.hosts[1]}", *shown, pair.error or "")
    return table
