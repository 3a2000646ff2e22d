"""How the stream of an exchange and a caller's stream take turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from anyep.exchange.device.devices import Device, Stream
from anyep.exchange.opening import RefusedError


class Visit:
    """A caller's stream during one operation: what it has prepared, and what it will find.

    Memory is allocated on the caller's stream before the exchange begins, and the caller's stream goes on when the
    exchange is over: what it frees then, and hands out again, nobody uses any more.
    """

    def __init__(self, device: Device, exchange: Stream, caller: Stream) -> None:
        self._device = device
        self._exchange = exchange
        self._caller = caller

    @classmethod
    def begin(cls, device: Device, exchange: Stream) -> Visit:
        """Let the exchange's stream see what the caller has launched so far."""
        caller = device.current_stream()
        device.follow(exchange, device.mark(caller))
        return cls(device, exchange, caller)

    def borrow(self, tensor: torch.Tensor | None, home: Stream) -> None:
        """Use memory of an earlier call: where that ran on another stream, its allocator must know."""
        if tensor is not None and home != self._caller:
            self._device.lend(tensor, self._exchange)

    @contextmanager
    def returned(self) -> Iterator[None]:
        """Let what is allocated and marked meanwhile be the caller's, in whose thread and stream ever this runs."""
        with self._device.on(self._caller):
            yield

    def again(self) -> None:
        """Let it see what has been launched since then, in the stream that is current now."""
        self._device.follow(self._exchange, self._device.mark(self._device.current_stream()))

    def cleared(self, operation: object, abandoned: list[object]) -> Cleared:
        """See that an operation which fails meanwhile leaves no memory that somebody still uses."""
        return Cleared(self, operation, abandoned)

    def end(self, results: Iterable[torch.Tensor | None]) -> None:
        """Let the caller see the results, also on a stream on which it did not begin."""
        done = self._device.mark(self._exchange)
        self._device.follow(self._caller, done)
        now = self._device.current_stream()
        if now != self._caller:
            self._device.follow(now, done)
            for tensor in results:
                if tensor is not None:
                    self._device.lend(tensor, now)


class Cleared:
    """What becomes of an operation's memory where it fails.

    Where all ranks refuse it, its launches are over before the caller's stream goes on. Where it broke off, peers may
    write at any time to where they were told: what it holds is kept with ``abandoned``.
    """

    def __init__(self, visit: Visit, operation: object, abandoned: list[object]) -> None:
        self._visit = visit
        self._operation = operation
        self._abandoned = abandoned

    def __enter__(self) -> None:
        """Nothing to do before."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RefusedError):
            self._visit.end(())
        elif error is not None:
            self._abandoned.append(self._operation)
