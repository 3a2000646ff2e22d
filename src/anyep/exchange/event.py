"""Results that are still under way."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future
from typing import Generic, TypeVar

from anyep.errors import ClosedError

Result = TypeVar("Result")


class Pending(Generic[Result]):
    """An operation that runs in the background, without the GIL. Its input tensors must not change until ``wait``."""

    def __init__(self, future: Future[Result], label: str) -> None:
        self._future = future
        self._label = label
        self._taken = False

    def done(self) -> bool:
        """Return whether ``wait`` would return at once."""
        return self._future.done()

    def wait(self) -> Result:
        """Return the operation's result, or raise its error. Once: a second call is a ValueError."""
        if self._taken:
            raise ValueError(f"this {self._label} was already waited for; keep the result of the first wait()")
        self._taken = True
        try:
            return self._future.result()
        except CancelledError as error:
            raise ClosedError(f"the buffer was closed before this {self._label} began") from error
