"""Transports by name, and which one serves a group when nobody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyep.errors import Unavailable
from anyep.transport.base import Lane, Transport
from anyep.transport.inprocess import LocalMember
from anyep.transport.rendezvous import Rendezvous

NAMES = ("auto", "inprocess", "shm")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A transport, and why it is this one."""

    transport: Transport
    reason: str


def open_transport(
    rendezvous: Rendezvous,
    *,
    transport: str,
    lanes: Sequence[Lane],
    ring: int,
    heap_bytes: int,
    timeout_s: float,
    poison: bool = False,
) -> Opened:
    """Open the transport asked for, or the one that serves the group. Collective.

    Raises ValueError for an unknown name, Unavailable for one that cannot serve this group, CapacityError.
    """
    check_name(transport)
    local = isinstance(rendezvous, LocalMember)
    possible = "inprocess" if local else "shm"
    if transport not in ("auto", possible):
        raise Unavailable(
            f"transport={transport!r} cannot serve {'threads of a local group' if local else 'rank processes'}; "
            f"possible here: 'auto', {possible!r}"
        )
    reason = "the ranks are threads of one process" if local else "the ranks are processes of one host"
    if transport != "auto":
        reason = "asked for"
    from anyep.machine import compiler

    with compiler.compiling():
        from anyep.transport.shm import ShmTransport
        from anyep.transport.threads import InProcessTransport
    sizes = {"lanes": lanes, "ring": ring, "heap_bytes": heap_bytes, "timeout_s": timeout_s, "poison": poison}
    if isinstance(rendezvous, LocalMember):
        return Opened(transport=InProcessTransport(rendezvous, **sizes), reason=reason)
    return Opened(transport=ShmTransport(rendezvous, **sizes), reason=reason)


def check_name(transport: str) -> None:
    """Raise ValueError for a name that no transport has."""
    if transport not in NAMES:
        raise ValueError(f"transport must be one of {', '.join(map(repr, NAMES))}, got {transport!r}")
