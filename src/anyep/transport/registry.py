"""Transports by name, and the choice between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anyep import config
from anyep.errors import Unavailable
from anyep.layout.hosts import HostMap, group_ranks, map_hosts
from anyep.transport.base import Lane, Transport
from anyep.transport.engines import check_installed, open_engine
from anyep.transport.hierarchical import HierarchicalTransport
from anyep.transport.identity import Identity
from anyep.transport.inprocess import InProcessTransport, Member
from anyep.transport.rendezvous import Rendezvous, find_rendezvous
from anyep.transport.shared import SharedTransport
from anyep.transport.together import together

NETWORKED = ("auto", "gloo", "nixl")
"""Transports that span hosts, with an engine between them."""
NAMES = ("auto", "inprocess", "shm", "gloo", "nixl", "cuda_symmetric")
"""The last for CUDA tensors only (exchange/device/setup.py)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A transport, and why it is this one."""

    transport: Transport
    reason: str


def open_transport(
    group: object,
    *,
    transport: str,
    lanes: Sequence[Lane],
    ring: int,
    heap_bytes: int,
    timeout_s: float,
    poison: bool = False,
    interface: str | None = None,
) -> Opened:
    """Open the transport of this name between the ranks of ``group``. Collective.

    ``"auto"``: in-process for members of a local group, shared memory for processes of one host, and on several hosts
    shared memory inside each with an engine between them. An engine's name: the same, with that engine.
    ``interface``: the network interface or device of this rank, None: the engine chooses. ``poison``: fill fresh blocks
    with 0xFF (tests). Raises ValueError for an unknown name, TypeError for what is no group, Unavailable with what is
    possible where it cannot work here, CapacityError when memory is too small.
    """
    check_name(transport)
    rendezvous = find_rendezvous(group)
    options: dict[str, Any] = {
        "lanes": lanes,
        "ring": ring,
        "heap_bytes": heap_bytes,
        "timeout_s": timeout_s,
        "poison": poison,
    }
    if transport == "cuda_symmetric":
        raise Unavailable(
            "transport 'cuda_symmetric' is how a buffer with device='cuda' reaches memory; between host memories 'shm' "
            "is possible"
        )
    if transport == "inprocess" and not isinstance(rendezvous, Member):
        raise Unavailable(
            f"transport 'inprocess' needs a member of anyep.local_group(R), got {type(group).__name__}; "
            "between processes of one host 'shm' is possible"
        )
    asked = "" if transport == "auto" else "asked for; "
    hosts, why = find_hosts(rendezvous) if transport in NETWORKED else (None, "")
    if hosts is None or hosts.num_hosts == 1:
        check_installed(transport, rendezvous)
        local = _local(rendezvous, transport, None, options)
        threads = isinstance(local, InProcessTransport)
        kind = "ranks are threads of this process" if threads else "all ranks are processes of one host"
        if transport not in ("auto", local.name):
            asked = f"{transport!r}, which was asked for, goes between hosts, and there is only one; "
        return Opened(transport=local, reason=f"{asked}{kind}")
    local = _local(rendezvous, transport, hosts.near(rendezvous.rank), options)
    try:
        engine, chosen = open_engine(transport, rendezvous, interface, timeout_s)
    except BaseException:
        local.close()
        raise
    across = HierarchicalTransport(local, engine, hosts, timeout_s=timeout_s)
    return Opened(transport=across, reason=f"{asked}{why}; {engine.name} between hosts: {chosen}")


def _local(
    rendezvous: Rendezvous, transport: str, members: Sequence[int] | None, options: dict[str, Any]
) -> SharedTransport:
    """Open shared memory between the ranks of this host."""
    if isinstance(rendezvous, Member) and transport != "shm":
        return InProcessTransport(rendezvous, members=members, **options)
    from anyep.transport.shm import ShmTransport

    return ShmTransport(rendezvous, members=members, **options)


def find_hosts(rendezvous: Rendezvous) -> tuple[HostMap, str]:
    """Return which ranks share a host, and how that is known. Collective, for ranks that are processes.

    Raises ValueError on every rank where ANYEP_RANKS_PER_HOST is no such number on one, or differs between ranks.
    """
    if isinstance(rendezvous, Member):
        played = config.ranks_per_host()
        hosts = group_ranks(rendezvous.size, played or rendezvous.size)
        return hosts, f"ANYEP_RANKS_PER_HOST={played}: threads play {hosts.num_hosts} hosts"
    names, played = _tell_hosts(rendezvous)
    if played is not None:
        hosts = group_ranks(rendezvous.size, played)
        return hosts, f"ANYEP_RANKS_PER_HOST={played}: {rendezvous.size} ranks play {hosts.num_hosts} hosts"
    hosts = map_hosts(names)
    return hosts, f"ranks run on {hosts.num_hosts} hosts"


def _tell_hosts(rendezvous: Rendezvous) -> tuple[list[str], int | None]:
    """Return the name of every rank's host, and what ANYEP_RANKS_PER_HOST says on all."""

    def act() -> dict[str, Any]:
        return {"host": Identity.own().host, "played": config.ranks_per_host()}

    told = together(rendezvous, act, what="say on which host it runs")
    for rank, other in enumerate(told):
        if other["played"] != told[0]["played"]:
            first, here = (value["played"] or "not set" for value in (told[0], other))
            raise ValueError(
                f"ANYEP_RANKS_PER_HOST differs between ranks: {first} on rank 0, {here} on rank {rank}; set it alike "
                "for all ranks, or for none"
            )
    return [other["host"] for other in told], told[0]["played"]


def check_name(transport: str) -> None:
    """Raise ValueError for a name that no transport has."""
    if transport not in NAMES:
        raise ValueError(f"transport must be one of {', '.join(map(repr, NAMES))}, got {transport!r}")
