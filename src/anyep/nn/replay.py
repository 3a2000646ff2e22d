"""Activation checkpointing: what is computed again takes the ways it took before, without layout and counts.

Each call of :func:`checkpoint` has a tape of the ways of its dispatches, in order. The first run records them, every
further run of the same call takes them from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.utils.checkpoint

from anyep.nn.pair import BufferPair
from anyep.nn.travel import Way

_HOW = "a function that is checkpointed must do the same each time that it runs"


class Tape:
    """The ways of one checkpointed call."""

    def __init__(self) -> None:
        self._ways: list[Way] = []
        self._position = 0
        self.replays = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record in the first run, replay in all others."""
        self._position = 0
        token = _TAPE.set(self)
        try:
            yield
        finally:
            _TAPE.reset(token)
            self.replays = True

    def next_way(self) -> Way | None:
        """Return the way of the next dispatch; None when recording. ValueError when there were fewer before."""
        if not self.replays:
            return None
        if self._position == len(self._ways):
            raise ValueError(
                f"this is dispatch {self._position + 1} of a run that had {len(self._ways)} before: {_HOW}"
            )
        self._position += 1
        return self._ways[self._position - 1]

    def remember(self, way: Way) -> None:
        self._ways.append(way)


_TAPE: ContextVar[Tape | None] = ContextVar("anyep.nn.replay", default=None)


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **options: Any) -> Any:
    """Return ``function(*args)``, whose activations are computed again in backward instead of being kept.

    As :func:`torch.utils.checkpoint.checkpoint` (``options`` are its keywords), but dispatches inside remember their
    ways, and routers do not count tokens twice. Both kinds of checkpoint do. ``function`` and its experts must be
    deterministic: ValueError in backward if tokens chose other experts than before.

    All ranks have to go backward in the same order, as without checkpoints. A plain checkpoint of torch works too, but
    agrees upon counts again.
    """
    tape = Tape()

    def run(*again: Any) -> Any:
        with tape.running():
            return function(*again)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=use_reentrant, **options)


def replaying() -> bool:
    """Return whether this is computed again, and was counted already."""
    tape = _TAPE.get()
    return tape is not None and tape.replays


def next_way(pair: BufferPair, topk_idx: torch.Tensor, layout: str) -> Way | None:
    """Return the way that the dispatch in this place took before; None if it is the first time. ValueError if other."""
    tape = _TAPE.get()
    way = None if tape is None else tape.next_way()
    if way is None:
        return None
    if way.pair.forward is not pair.forward or way.handle.layout != layout:
        raise ValueError(f"a dispatch that is done again uses another buffer or layout than before: {_HOW}")
    if not way.leads(topk_idx):
        raise ValueError(f"tokens that are dispatched again chose other experts than before: {_HOW}")
    return way


def remember(way: Way) -> None:
    """Keep a way for the next run, if there may be one."""
    tape = _TAPE.get()
    if tape is not None:
        tape.remember(way)
