"""Calls whose second half comes later: at their event, at their hook, or when what they bring is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from anyep.compat.deep_ep.events import EventHandle, EventOverlap
from anyep.exchange.event import Pending


class Underway:
    """A call whose second half comes later: once, whoever asks first; its error reaches who waits for it."""

    def __init__(self, pending: Pending[Any], fill: Callable[[Any], None] | None = None) -> None:
        """``fill`` is called with the result, in the thread of whoever asks first."""
        self._pending: Pending[Any] | None = pending
        self._fill = fill
        self._error: BaseException | None = None
        self._turn = threading.Lock()

    def finish(self) -> None:
        """Do the second half; remember what went wrong."""
        with self._turn:
            pending, self._pending = self._pending, None
            if pending is None:
                return
            try:
                result = pending.wait()
                if self._fill is not None:
                    self._fill(result)
            except Exception as error:
                self._error = error
            self._fill = None

    def wait(self) -> None:
        """Finish, and raise what went wrong, each time."""
        self.finish()
        if self._error is not None:
            raise self._error

    @property
    def finished(self) -> bool:
        return self._pending is None


def event_of(underway: Underway | None, *, asked: bool = False) -> EventOverlap:
    """Return the event of a call; None inside where it is over, unless one was ``asked`` for."""
    if underway is None:
        return EventOverlap(EventHandle() if asked else None)
    return EventOverlap(EventHandle.of(underway.wait))


def ends_of(underway: Underway | None, *, wants_hook: bool) -> tuple[EventOverlap, Callable[[], None] | None]:
    """Return event and hook of a low-latency call; it is over where nothing is under way."""
    if underway is None:
        return EventOverlap(), None
    if wants_hook:
        return EventOverlap(), underway.wait
    return event_of(underway), None
