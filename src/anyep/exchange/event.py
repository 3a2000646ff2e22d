"""Results that are still under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Pending(Generic[Result]):
    """An operation whose first half is done. Its input tensors must not change until ``wait``.

    Dropped without waiting, the operation is finished all the same, when the buffer next waits for anything.
    """

    def __init__(self, label: str, done: Callable[[], bool], land: Callable[[], Result]) -> None:
        self._label = label
        self._done = done
        self._land: Callable[[], Result] | None = land

    def done(self) -> bool:
        """Return whether ``wait`` need not wait for any rank's announcement, or all is over already."""
        return self._done()

    def wait(self) -> Result:
        """Do the second half, or await it, and return the result or raise the operation's error.

        Once: a second call is a ValueError. The errors are those of the call that returned this object, and
        ClosedError when the buffer was closed meanwhile.
        """
        land, self._land = self._land, None
        if land is None:
            raise ValueError(f"this {self._label} was already waited for; keep the result of the first wait()")
        return land()
