"""Events as DeepEP's callers know them: with CUDA a stream's event, without it a call that is still under way.

``EventHandle`` marks a moment; ``EventOverlap`` wraps one, or None when the call that returned it was synchronous.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch


class EventHandle:
    """What the current stream has been given so far, or an operation that goes on.

    Without CUDA everything that was called has happened already, so that waiting for an event is free, unless it
    stands for an operation that this library finishes in its second half.
    """

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        self._finish: Callable[[], object] | None = None
        if torch.cuda.is_available():
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch gives it no types
            self._event.record(torch.cuda.current_stream())

    @classmethod
    def of(cls, finish: Callable[[], object]) -> EventHandle:
        """Return an event that calls ``finish`` when it is first waited for; what that raises reaches the waiter."""
        event = cls()
        event._finish = finish
        return event

    def current_stream_wait(self) -> None:
        """Wait: the stream for the event, the caller for an operation's second half."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class EventOverlap:
    """An event with tensors that it keeps alive, and a hook that runs once after it was waited for.

    ``event`` is None when the operation was over on return: there is nothing to wait for then, and
    :meth:`current_stream_wait` is an AssertionError, as upstream.
    """

    event: EventHandle | None = None
    extra_tensors: tuple[Any, ...] | None = None
    hook_after_wait: Callable[[], object] | None = None

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Any, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Wait, run the hook if there is one, and forget it; ``release_handle`` drops the event and its tensors."""
        assert self.event is not None, (
            "this call was synchronous, so its event is None and there is nothing to wait for; "
            "ask for the asynchronous form, or do not wait"
        )
        self.event.current_stream_wait()
        if release_handle:
            self.event = None
            self.extra_tensors = None
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()

    def register_hook_after_wait(self, hook: Callable[[], object]) -> None:
        """Let ``hook`` run after the next wait; AssertionError while another is registered."""
        assert self.hook_after_wait is None, "a hook is registered already: wait first"
        self.hook_after_wait = hook

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """Return itself, so that ``with event(release_handle=True):`` waits at the end of the block."""
        self._release_at_exit = release_handle
        return self

    _release_at_exit = False

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        release, self._release_at_exit = self._release_at_exit, False
        if self.event is not None:
            self.current_stream_wait(release_handle=release)


no_event = partial(EventOverlap.__new__, EventOverlap)
"""Makes the event of a call that is over, without a Python function, microseconds from cold caches."""


def wait_for(event: object) -> None:
    """Wait for an EventHandle, or for the one in an EventOverlap; None is over. TypeError for others."""
    inner = event.event if isinstance(event, EventOverlap) else event
    if isinstance(inner, EventHandle):
        inner.current_stream_wait()
    elif inner is not None:
        raise TypeError(f"an event must be what capture() returns, got {type(inner).__name__}")
