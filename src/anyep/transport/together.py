"""Ranks open together or not at all: each step's failure on one rank is an error on every rank, and names it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from anyep.errors import CapacityError, Unavailable
from anyep.layout.regions import aligned
from anyep.machine import room
from anyep.transport.arena import rounded_to_segments
from anyep.transport.base import Lane
from anyep.transport.control import ControlLayout
from anyep.transport.rendezvous import Rendezvous
from anyep.transport.segments import check_room

_FAILURES: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (CapacityError, Unavailable, TypeError, ValueError)
}


def load_signals() -> ModuleType:
    """Import the compiled signals; they compile on their first use on a machine, under its lock."""
    from anyep.machine.compiler import compiling

    with compiling():
        from anyep.transport import signals
    return signals


def together(rendezvous: Rendezvous, act: Callable[[], Any], *, what: str = "open its transport") -> list[Any]:
    """Act on every rank; return what every rank's act returned (JSON), in rank order.

    Collective. If acting fails on one rank it fails on all: there with its own error, elsewhere with CapacityError,
    TypeError, ValueError or Unavailable that names the rank.
    """
    failure: Exception | None = None
    try:
        item = {"told": act()}
    except Exception as error:
        failure = error
        item = {"error": type(error).__name__, "text": str(error)}
    items = [json.loads(raw) for raw in rendezvous.allgather(json.dumps(item).encode())]
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # it holds this frame, and all that failed with it: let both go at once
    for rank, other in enumerate(items):
        if "error" in other:
            kind = _FAILURES.get(other["error"], Unavailable)
            raise kind(f"rank {rank} could not {what}: {other['error']}: {other['text']}")
    return [other["told"] for other in items]


def agree_on_sizes(
    rendezvous: Rendezvous,
    *,
    lanes: Sequence[Lane],
    ring: int,
    heap_bytes: int,
    timeout_s: float,
    identity: Any = None,
    members: Sequence[int] | None = None,
) -> tuple[ControlLayout, list[Any]]:
    """Check the arguments and the memory of all ranks before any is committed.

    Return the layout of control memory, and every rank's ``identity`` (JSON). ``members``: the ranks of this host, if
    not all. Collective. Raises ValueError where ranks
    differ in lanes or ring, CapacityError where the host's memory is too small for all ranks together.
    """

    def act() -> dict[str, Any]:
        layout = ControlLayout.of(lanes, ring, rendezvous.size)
        _check_numbers(heap_bytes, timeout_s)
        load_signals()
        return {
            "shape": {"words of the lanes": layout.lane_words, "ring": ring},
            "wanted": rounded_to_segments(aligned(layout.num_bytes) + heap_bytes),
            "available": room.available_bytes(),
            "identity": identity,
        }

    told = together(rendezvous, act)
    for rank, other in enumerate(told):
        if other["shape"] != told[0]["shape"]:
            raise ValueError(
                f"lanes and ring differ between ranks: {told[0]['shape']} on rank 0, {other['shape']} on rank {rank}; "
                "every rank must open its transport with the same ones"
            )
    here = [told[rank] for rank in (range(rendezvous.size) if members is None else members)]
    known = [other["available"] for other in here if other["available"] is not None]
    wanted = sum(other["wanted"] for other in here)
    together(
        rendezvous,
        lambda: check_room(wanted, 0, min(known, default=None), f"opening {len(here)} ranks on one host"),
    )
    return ControlLayout.of(lanes, ring, rendezvous.size), [other["identity"] for other in told]


def _check_numbers(heap_bytes: int, timeout_s: float) -> None:
    if heap_bytes < 0:
        raise ValueError(f"heap_bytes must be at least 0, got {heap_bytes}")
    if not 0 < timeout_s < float("inf"):
        raise ValueError(f"timeout_s must be positive and finite, got {timeout_s}")
