"""Operations in flight: each is posted in the caller's thread and finished later, in any order, by whoever waits.

An operation has two halves. ``post`` sends what needs no answer from a peer. ``finish`` waits for the peers and does
the rest: in the caller's thread when it waits, or in one background thread where rows are left to be sent.

Who finishes an operation finishes older ones of the foreground first: a peer may wait for what only their second half
sends. So on every rank the oldest operations advance whenever somebody waits, and no rank waits for one that cannot.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from anyep.errors import ClosedError, PeerError
from anyep.exchange.event import Operation, Pending
from anyep.exchange.opening import RefusedError
from anyep.machine.forks import tell_after_fork

Result = TypeVar("Result")

_FORKED = "this buffer is another process's, and this is a fork of it; use it there, or make a new buffer here"


class Flight(Generic[Result]):
    """An operation that was posted, and its outcome. Who takes that lets it ``land``, where an operation can."""

    future: Future[None] | None = None
    result: Result | None = None
    error: BaseException | None = None
    pending: weakref.ref[Pending[Result]] | None = None

    def __init__(self, operation: Operation[Result], epoch: int) -> None:
        self.operation: Operation[Result] | None = operation
        self.land: Callable[[Result], Result] | None = getattr(operation, "land", None)
        self.label = operation.label
        self.epoch = epoch
        self.turn = threading.Lock()

    @property
    def held(self) -> bool:
        """Whether somebody can still ask for the outcome."""
        pending = self.pending
        return pending is not None and pending() is not None

    @property
    def finished(self) -> bool:
        return self.operation is None and not self.turn.locked()

    def may_answer(self) -> bool:
        """Whether peers may wait for what its second half sends."""
        operation = self.operation
        return operation is not None and operation.may_answer()

    def ready(self) -> bool:
        """Whether its second half is over, or could begin without waiting for an announcement."""
        operation = self.operation
        if self.future is not None or operation is None:
            return self.finished
        try:
            return operation.ready()
        except ClosedError:
            return True  # wait() raises it at once

    def take(self) -> Result:
        """Return the outcome, once; a batch must not live as long as the operation that brought it."""
        result, error = self.result, self.error
        self.result = self.error = None
        if error is not None:
            try:
                raise error
            finally:
                del error  # it holds this frame, and the frame holds it
        return result if self.land is None else self.land(result)  # type: ignore[return-value, arg-type]  # no error: there is one


class Flights:
    """Gives each operation its number (the *epoch*, equal on all ranks) and sees to its end.

    ``on_break`` is called once, with the error that ended the buffer: after an operation that broke off in the middle
    peers may still write where they were told to, so nothing may be allocated there again.
    """

    def __init__(
        self, max_in_flight: int, on_break: Callable[[BaseException], None], on_refusal: Callable[[], None]
    ) -> None:
        self.max_in_flight = max_in_flight
        self._posting = threading.Lock()
        self._background: ThreadPoolExecutor | None = None
        self._flying: list[Flight[Any]] = []  # by epoch; only those that are not finished, or not waited for
        self._epoch = 0
        self._on_break = on_break
        self._on_refusal = on_refusal
        self.broken: BaseException | None = None
        self.closed = False
        self._of_parent: list[Operation[Any]] | None = None
        """in a forked child: what was under way, kept as it is"""
        tell_after_fork(self)

    def run(self, operation: Operation[Result]) -> Result:
        """Post and finish."""
        flight = self._post(operation)
        if len(self._flying) > 1:
            self._finish_up_to(flight)
        else:
            self._finish(flight)
        return flight.take()

    def start(self, operation: Operation[Result], *, sized: bool = False) -> Pending[Result]:
        """Post; the second half comes with ``Pending.wait()``, or goes on in the background.

        ``sized``: return when the result's size is known, which every rank's announcement tells.
        """
        self._check_room(operation)
        flight = self._post(operation)
        if sized:
            self._size_up(flight)
        pending = Pending(flight.label, flight.ready, lambda: self._land(flight), operation.targets())
        flight.pending = weakref.ref(pending, lambda _: self._forget_dropped(flight))
        if operation.wants_background():
            if self._background is None:
                self._background = ThreadPoolExecutor(1, thread_name_prefix="anyep-operations")
            for one in list(self._flying):
                if one.future is None and one.may_answer():  # what a peer's background waits for goes there as well
                    one.future = self._background.submit(self._finish, one)
        return pending

    def _size_up(self, flight: Flight[Result]) -> None:
        """Await the announcements in the caller's thread. What goes wrong is raised here, and the flight forgotten."""
        for older in list(self._flying):
            if older.epoch < flight.epoch and older.future is None:
                self._finish(older)
        with flight.turn:
            operation = flight.operation
            if operation is None:  # another thread has finished it
                return
            try:
                self._check_peers()
                operation.size_up()
            except BaseException as error:
                flight.operation = None
                self._forget(flight)
                if isinstance(error, RefusedError):
                    self._on_refusal()
                    raise error.error from None
                raise self._break(error)  # noqa: B904  # it is the same one mostly, and keeps its cause

    @property
    def unfinished(self) -> bool:
        """Whether peers may still read or write this rank's tensors."""
        return any(not flight.finished for flight in list(self._flying))

    def after_fork(self) -> None:
        """Called in a child of this process: nothing may begin there, and what was under way has ended.

        The memory that rows go to is not mapped there, and whoever finishes in the background does not run there.
        """
        self._posting = threading.Lock()  # another thread of the parent may have held it
        self._background = None
        self._of_parent = [flight.operation for flight in self._flying if flight.operation is not None]
        for flight in self._flying:
            flight.operation = flight.future = None
            flight.turn = threading.Lock()
            flight.error = ClosedError(_FORKED)
        self._flying = []

    def check_open(self) -> None:
        """Raise ClosedError if no operation can run any more."""
        if self._of_parent is not None:
            raise ClosedError(_FORKED)
        if self.broken is not None:
            raise self._closed_error() from self.broken
        if self.closed:
            raise ClosedError("this buffer is closed; make a new one")

    def _check_peers(self) -> None:
        """The same for one that was posted: a peer that an older operation missed is what ends it too."""
        if self.broken is not None or self.closed:
            if isinstance(self.broken, PeerError):
                raise self.broken
            self.check_open()

    def _closed_error(self) -> ClosedError:
        cause = self.broken
        return ClosedError(f"this buffer ended with {type(cause).__name__}: {cause}; close it and make a new one")

    def settle(self) -> None:
        """Finish everything that is under way, whatever comes of it; each wait is bounded by its own time limit."""
        for flight in list(self._flying):
            if self.broken is not None:
                return
            self._finish_up_to(flight)

    def close(self) -> None:
        """Let nothing begin any more, and wait for the background thread, whose waits the transport has ended."""
        self.closed = True
        if self._background is not None:
            self._background.shutdown(wait=True, cancel_futures=True)

    def _check_room(self, operation: Operation[Any]) -> None:
        waiting = [flight for flight in self._flying if flight.held]
        if len(waiting) >= self.max_in_flight:
            names = ", ".join(f"{flight.label} {flight.epoch}" for flight in waiting)
            raise ValueError(
                f"{len(waiting)} operations are in flight ({names}), and this buffer was made with "
                f"max_in_flight={self.max_in_flight}: wait for one before this {operation.label}, or make a buffer "
                "with a larger max_in_flight"
            )

    def _post(self, operation: Operation[Result]) -> Flight[Result]:
        with self._posting:
            self.check_open()
            epoch = self._epoch + 1
            if self._flying:
                self._free_ring(epoch)
            self._epoch = epoch
            try:
                operation.post(epoch)
            except BaseException as error:
                raise self._break(error)  # noqa: B904  # it is the same one mostly, and keeps its cause
            flight = Flight(operation, epoch)
            self._flying.append(flight)
            return flight

    def _free_ring(self, epoch: int) -> None:
        """Finish what still uses the memory for messages that comes into use again."""
        for flight in [flight for flight in self._flying if flight.epoch <= epoch - self.max_in_flight]:
            self._finish_up_to(flight)

    def _land(self, flight: Flight[Result]) -> Result:
        """Finish what somebody waits for, and return its outcome."""
        flight.pending = None  # asked for: it takes no room any more
        try:
            self._finish_up_to(flight)
        finally:
            self._forget_dropped(flight)  # unless Ctrl-C ended the wait, and not the operation
        return flight.take()

    def _finish_up_to(self, flight: Flight[Any]) -> None:
        for older in list(self._flying):  # also before one of the background: a peer may have queued it behind this
            if older.epoch < flight.epoch and older.future is None:
                self._finish(older)
        if flight.future is None:
            self._finish(flight)
        else:
            self._await_background(flight)

    def _await_background(self, flight: Flight[Any]) -> None:
        assert flight.future is not None
        if flight.future.cancel() or flight.future.cancelled():  # it did not begin: the caller's thread is as good
            self._finish(flight)
        else:
            flight.future.result()

    def _finish(self, flight: Flight[Any]) -> None:
        """Run the second half, once, and keep its outcome."""
        interruption: BaseException | None = None
        with flight.turn:
            operation, flight.operation = flight.operation, None
            if operation is None:
                return
            try:
                self._check_peers()
                flight.result = operation.finish()
            except RefusedError as refusal:
                self._on_refusal()
                flight.error = refusal.error
            except BaseException as error:
                flight.error = self._break(error)
            if flight.error is not None and not isinstance(flight.error, Exception):  # Ctrl-C, once
                interruption, flight.error = flight.error, self._closed_error()
        # Looked at after its turn, as _forget_dropped looks before the turn's end or after it.
        if flight.pending is None or not flight.held:
            self._forget(flight)
        if interruption is not None:
            raise interruption

    def _forget(self, flight: Flight[Any]) -> None:
        try:  # noqa: SIM105  # every call comes here, and suppress() would cost it a microsecond
            self._flying.remove(flight)
        except ValueError:  # two threads may come to it
            pass

    def _forget_dropped(self, flight: Flight[Any]) -> None:
        """A result that nobody can ask for any more goes at once, or when its operation is finished."""
        if flight.finished:
            self._forget(flight)

    def _break(self, error: BaseException) -> BaseException:
        """End the buffer; return what to raise: who is to blame, where another thread has just ended it for that."""
        if self.broken is None:
            self.broken = error
            self._on_break(error)
        return self.broken if isinstance(error, ClosedError) and isinstance(self.broken, PeerError) else error
