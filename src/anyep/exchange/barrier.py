"""Barrier: the first message of an operation and nothing else."""

from __future__ import annotations

from anyep.exchange.endpoint import Endpoint
from anyep.exchange.opening import Kind, Opening, check_agreement, message


def barrier(end: Endpoint, epoch: int) -> None:
    """Return when every rank has called it. Collective; errors as dispatch."""
    step = f"barrier {epoch}"
    opening = Opening(kind=Kind.BARRIER)
    check_agreement(opening, end.exchange(end.lanes.open, epoch, message(opening, end.num_ranks, 0), step), step)
    end.counters.barriers += 1
