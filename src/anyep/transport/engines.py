"""Engines by name, and the choice between them."""

from __future__ import annotations

from anyep.transport.engine import Engine
from anyep.transport.engine_inprocess import InProcessEngine
from anyep.transport.inprocess import Member
from anyep.transport.rendezvous import Rendezvous

ENGINES = ("gloo",)


def open_engine(name: str, rendezvous: Rendezvous, *, timeout_s: float) -> tuple[Engine, str]:
    """Open an engine between all ranks, and say why it is this one. Collective."""
    if isinstance(rendezvous, Member):
        return InProcessEngine(rendezvous), "ranks are threads"
    from anyep.transport.engine_gloo import GlooEngine

    reason = "asked for" if name == "gloo" else "every torch has it"
    return GlooEngine(rendezvous, timeout_s=timeout_s), reason
