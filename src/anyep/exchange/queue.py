"""Runs a buffer's operations one after another, in the caller's thread or in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from anyep.errors import ClosedError
from anyep.exchange.event import Pending
from anyep.exchange.opening import RefusedError

Result = TypeVar("Result")


class OperationQueue:
    """Gives each operation its number (the *epoch*, equal on all ranks) and its turn.

    ``on_break`` is called once, with the error that ended the buffer: after an operation that broke off in the middle
    peers may still write where they were told to, so nothing may be allocated there again.
    """

    def __init__(self, on_break: Callable[[BaseException], None], on_refusal: Callable[[], None]) -> None:
        self._turn = threading.Lock()
        self._posting = threading.Lock()
        self._counting = threading.Lock()
        self._background: ThreadPoolExecutor | None = None
        self._under_way = 0  # operations in the background; a future would keep its result alive
        self._epoch = 0
        self._on_break = on_break
        self._on_refusal = on_refusal
        self.broken: BaseException | None = None
        self.closed = False

    def run(self, label: str, operation: Callable[[int], Result]) -> Result:
        """Run now, or behind what is under way, and return the result."""
        with self._posting:
            if self._under_way == 0:
                return self._take_turn(operation)
            pending = self._submit(label, operation)
        return pending.wait()

    def start(self, label: str, operation: Callable[[int], Result]) -> Pending[Result]:
        """Run in the background, behind what is under way."""
        with self._posting:
            return self._submit(label, operation)

    def check_open(self) -> None:
        """Raise ClosedError if no operation can run any more."""
        if self.broken is not None:
            raise ClosedError(
                f"this buffer ended with {type(self.broken).__name__}: {self.broken}; close it and make a new one"
            ) from self.broken
        if self.closed:
            raise ClosedError("this buffer is closed; make a new one")

    def close(self) -> None:
        """Cancel what has not begun and wait for what has: its own time limit bounds it."""
        self.closed = True
        if self._background is not None:
            self._background.shutdown(wait=True, cancel_futures=True)

    def _submit(self, label: str, operation: Callable[[int], Result]) -> Pending[Result]:
        self.check_open()
        if self._background is None:
            self._background = ThreadPoolExecutor(1, thread_name_prefix="anyep-operations")
        with self._counting:
            self._under_way += 1
        future = self._background.submit(self._take_turn, operation)
        future.add_done_callback(self._note_end)
        return Pending(future, label)

    def _note_end(self, _: Future[Any]) -> None:
        with self._counting:
            self._under_way -= 1

    def _take_turn(self, operation: Callable[[int], Result]) -> Result:
        with self._turn:
            self.check_open()
            self._epoch += 1
            try:
                return operation(self._epoch)
            except RefusedError as refusal:
                self._on_refusal()
                raise refusal.error from None
            except BaseException as error:
                self.broken = error
                self._on_break(error)
                raise
