"""Engines by name, and the choice between them."""

from __future__ import annotations

from typing import Any, NamedTuple

from anyep.errors import Unavailable
from anyep.transport.engine import Engine
from anyep.transport.inprocess import Member
from anyep.transport.liveness import name_ranks
from anyep.transport.rendezvous import Rendezvous
from anyep.transport.together import together

ENGINES = ("auto", "nixl", "gloo", "inprocess")


class OpenedEngine(NamedTuple):
    """An engine, and why it is this one."""

    engine: Engine
    reason: str


def check_engine_name(name: str) -> None:
    """Raise ValueError for a name that no engine has."""
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {name!r}")


def open_engine(
    name: str, rendezvous: Rendezvous, interface: str | None = None, timeout_s: float = 60.0
) -> OpenedEngine:
    """Open the engine of this name between all ranks. Collective.

    ``"auto"``: in-process for members of a local group, NIXL where all ranks have it, else gloo. ``interface``: the
    network interface or device to use, on this rank; None: as the engine chooses. ``timeout_s``: how long ranks may
    take to reach each other. Raises ValueError for an unknown name or ranks that ask for different ones, Unavailable
    where the engine cannot work.
    """

    def act() -> dict[str, Any]:
        check_engine_name(name)
        return {"name": name, "lacks": _lack_of_nixl() if name in ("auto", "nixl") else None}

    told = together(rendezvous, act, what="choose its engine")
    for rank, other in enumerate(told):
        if other["name"] != told[0]["name"]:
            raise ValueError(
                f"engine differs between ranks: {told[0]['name']!r} on rank 0, {other['name']!r} on rank {rank}"
            )
    chosen, reason = _choose(name, rendezvous, [other["lacks"] for other in told])
    return OpenedEngine(_open(chosen, rendezvous, interface, timeout_s), reason)


def check_installed(name: str, rendezvous: Rendezvous) -> None:
    """Raise Unavailable on all ranks, naming the extra, where one lacks an engine that is asked for. Collective."""
    if name == "nixl":

        def act() -> None:
            lack = _lack_of_nixl()
            if lack is not None:
                raise Unavailable(lack)

        together(rendezvous, act, what="load the engine that was asked for")


def _choose(name: str, rendezvous: Rendezvous, lacks: list[str | None]) -> tuple[str, str]:
    if name != "auto":
        return name, "asked for"
    if isinstance(rendezvous, Member):
        return "inprocess", "ranks are threads of this process"
    without = [rank for rank, lack in enumerate(lacks) if lack is not None]
    if not without:
        return "nixl", "NIXL is installed on all ranks"
    lack = f"{name_ranks(without)} {'have' if len(without) > 1 else 'has'} no NIXL, which is preferred"
    return "gloo", f"{lack}: pip install 'anyep[nixl]'"


def _open(name: str, rendezvous: Rendezvous, interface: str | None, timeout_s: float) -> Engine:
    if name == "inprocess":
        from anyep.transport.engine_inprocess import InProcessEngine

        if not isinstance(rendezvous, Member):
            raise Unavailable("engine 'inprocess' needs a member of anyep.local_group(R); possible: 'nixl', 'gloo'")
        return InProcessEngine(rendezvous)
    if name == "nixl":
        from anyep.transport.engine_nixl import NixlEngine

        return NixlEngine(rendezvous, interface=interface, timeout_s=timeout_s)
    from anyep.transport.engine_gloo import GlooEngine

    return GlooEngine(rendezvous, interface=interface, timeout_s=timeout_s)


def _lack_of_nixl() -> str | None:
    """Why NIXL cannot be loaded here; None where it can."""
    from anyep.transport.nixl_agent import load_nixl

    try:
        load_nixl()
    except Unavailable as error:
        return str(error)
    return None
