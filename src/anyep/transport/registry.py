"""Transports by name, and the choice between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anyep.errors import Unavailable
from anyep.transport.base import Lane, Transport
from anyep.transport.inprocess import InProcessTransport, Member
from anyep.transport.rendezvous import find_rendezvous

NAMES = ("auto", "inprocess", "shm")


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
) -> Opened:
    """Open the transport of this name between the ranks of ``group``. Collective.

    ``"auto"``: in-process for members of a local group, shared memory for processes of one host. ``poison``: fill
    fresh blocks with 0xFF (tests). Raises ValueError for an unknown name, TypeError for what is no group, Unavailable
    with what is possible where it cannot work here, CapacityError when memory is too small.
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
    asked = "" if transport == "auto" else "asked for; "
    if isinstance(rendezvous, Member) and transport != "shm":
        reason = f"{asked}ranks are threads of this process"
        return Opened(transport=InProcessTransport(rendezvous, **options), reason=reason)
    if transport == "inprocess":
        raise Unavailable(
            f"transport 'inprocess' needs a member of anyep.local_group(R), got {type(group).__name__}; "
            "between processes of one host 'shm' is possible"
        )
    from anyep.transport.shm import ShmTransport

    return Opened(transport=ShmTransport(rendezvous, **options), reason=f"{asked}all ranks are processes of one host")


def check_name(transport: str) -> None:
    """Raise ValueError for a name that no transport has."""
    if transport not in NAMES:
        raise ValueError(f"transport must be one of {', '.join(map(repr, NAMES))}, got {transport!r}")
