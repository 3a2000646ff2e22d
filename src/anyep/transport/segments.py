"""Makes an arena's segments: looks first whether the machine has the memory, and lets the peers find them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

from anyep.errors import CapacityError
from anyep.machine import linux, room
from anyep.transport.board import Board

_KEPT_FREE_BYTES = 64 << 20
_ADVICE = "use fewer tokens or ranks, release received tensors earlier, or give the job more memory"


def check_room(wanted: int, promised: int, available: int | None, what: str) -> None:
    """Raise CapacityError unless ``wanted`` bytes fit beside what others are about to take. None available: unknown."""
    if available is None or wanted + promised + _KEPT_FREE_BYTES <= available:
        return
    others = f" while other ranks take {_mebibytes(promised)}" if promised else ""
    raise CapacityError(
        f"{what} needs {_mebibytes(wanted)} of memory{others}; this machine (or its control group) has "
        f"{_mebibytes(available)} left, of which {_mebibytes(_KEPT_FREE_BYTES)} stay free: {_ADVICE}"
    )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.1f} MiB"


class SegmentMaker:
    """Commits memory for one rank. ``make``: linux.private_memory or linux.shared_memory.

    While a rank commits it says how much, so that ranks that grow at the same time, as all do in the first large step,
    do not each take the same free memory for theirs.
    """

    def __init__(self, make: Callable[[int], linux.Memory], signals: ModuleType, size: int) -> None:
        self._make = make
        self._signals = signals
        self._size = size
        self._own: Board | None = None
        self.peers: Sequence[Board] = ()

    def __call__(self, num_bytes: int) -> linux.Memory:
        """Make a segment; whatever the machine says no with is a CapacityError with the sizes."""
        if self._own is None:
            memory = self._commit(num_bytes, "an arena")
            self._own = Board(self._signals, memory.address, self._size)
        else:
            what = "an arena that is full"
            check_room(num_bytes, 0, room.available_bytes(), what)  # what cannot be had stands in nobody's way
            self._own.growing_bytes = num_bytes
            try:
                memory = self._commit(num_bytes, what)
            finally:
                self._own.growing_bytes = 0
        self._own.add_segment(memory)
        return memory

    def _commit(self, num_bytes: int, what: str) -> linux.Memory:
        promised = sum(peer.growing_bytes for peer in self.peers)
        check_room(num_bytes, promised, room.available_bytes(), what)
        try:
            return self._make(num_bytes)
        except (OSError, MemoryError) as error:
            raise CapacityError(
                f"{what} needs {_mebibytes(num_bytes)} of memory and the system refused ({error}): {_ADVICE}, "
                "or raise its limits (ulimit -n, ulimit -v)"
            ) from error
