"""What transports over memory share: lanes on control segments, an arena, waits that look after the peers.

Subclasses say where segments come from, how a peer's are mapped, and how a peer's end is noticed.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from anyep.errors import PeerLost, PeerTimeout
from anyep.transport import signals
from anyep.transport.arena import Arena, ArenaBlock, Segment
from anyep.transport.base import Blame, Lane, Place, Words
from anyep.transport.control import ControlLayout, State

_SLICE_NS = 20_000_000
"""A sleep's longest piece: how soon Ctrl-C and the death of a peer are noticed."""
_SPINS, _YIELDS = 64, 16


class MemoryTransport(ABC):
    """A transport whose peers' memory can be addressed. Implements transport/base.py."""

    name: str

    def __init__(self, rank: int, lanes: Sequence[Lane], layout: ControlLayout, control: Segment, timeout_s: float):
        self.rank = rank
        self.size = layout.num_ranks
        self._layout = layout
        self._control = control
        self._timeout_s = timeout_s
        self._closed = False
        self._boxes = {(lane.index, slot): self._payload(lane, slot) for lane in lanes for slot in range(layout.ring)}
        signals.prepare_control(control.address)

    @abstractmethod
    def _arena_of(self) -> Arena: ...

    @abstractmethod
    def address(self, rank: int, place: Place) -> int: ...

    @abstractmethod
    def _dead(self, ranks: Sequence[int]) -> dict[int, str]:
        """Return how each of ``ranks`` that has ended did so."""

    @abstractmethod
    def _hint(self, ranks: Sequence[int]) -> str:
        """Return how to look at silent ranks."""

    def connect(self, controls: Sequence[int]) -> None:
        """Take the addresses of every rank's control segment, one's own included."""
        self._controls = np.array(controls, np.int64)
        self._controls_addr = int(self._controls.ctypes.data)

    def allocate(self, num_bytes: int) -> ArenaBlock:
        return self._arena_of().allocate(num_bytes)

    def locate(self, address: int, num_bytes: int) -> Place | None:
        return self._arena_of().locate(address, num_bytes)

    def post(self, lane: Lane, epoch: int, words: Words) -> None:
        assert words.dtype == np.int64, "lanes carry int64"
        assert words.shape[0] == self.size, "a row for every rank"
        assert words.shape[1] <= lane.words, "no more words than the lane has"
        assert words.flags.c_contiguous, "rows one after another"
        signals.post_words(
            self._controls_addr,
            self.size,
            self.rank,
            self._layout.mailbox_offset(lane, epoch, self.rank),
            epoch,
            int(words.__array_interface__["data"][0]),
            words.shape[1],
            words.shape[1],
        )

    def wait(self, lane: Lane, epoch: int, step: str) -> Words:
        begin = time.monotonic()
        while self._await(lane, epoch):
            self._look_after(lane, epoch, step, begin)
        return self._boxes[lane.index, epoch % self._layout.ring]

    def close(self, blame: Blame | None = None) -> None:
        if self._closed:
            return
        self._closed = True
        state = State.CLOSED if blame is None else State.TIMED_OUT if blame.timeout else State.LOST
        if blame is not None:
            for rank in blame.ranks:
                self._control.memory[signals.BLAMED_AT + rank] = 1
        for peer in self._controls.tolist():
            signals.announce_state(self._control.address, peer, state)
        self._release()

    def _release(self) -> None:
        """Let go of what the transport holds and no tensor needs."""

    def describe(self) -> dict[str, str]:
        arena = self._arena_of()
        return {
            "arena": f"{arena.committed_bytes / 2**20:.1f} MiB in {len(arena.segments)} segments",
            "waits": f"{_SPINS} spins, {_YIELDS} yields, then asleep in slices of {_SLICE_NS // 1_000_000} ms",
        }

    def _payload(self, lane: Lane, slot: int) -> Words:
        """Return a view int64 [R, words] of a lane's mailboxes in one ring slot."""
        offset = self._layout.mailbox_offset(lane, slot, 0) + 8
        stride = self._layout.stride(lane)
        shape, strides = (self.size, lane.words), (stride, 8)
        return np.ndarray(shape, np.int64, buffer=self._control.memory, offset=offset, strides=strides)

    def _await(self, lane: Lane, epoch: int) -> int:
        missing: int = signals.await_words(
            self._control.address,
            self._control.address + self._layout.mailbox_offset(lane, epoch, 0),
            self._layout.stride(lane),
            self.size,
            epoch,
            _SPINS,
            _YIELDS,
            _SLICE_NS,
        )
        return missing

    def _missing(self, lane: Lane, epoch: int) -> list[int]:
        stride = self._layout.stride(lane)
        first = self._control.address + self._layout.mailbox_offset(lane, epoch, 0)
        return [rank for rank in range(self.size) if signals.count_missing(first + rank * stride, stride, 1, epoch)]

    def _look_after(self, lane: Lane, epoch: int, step: str, begin: float) -> None:
        """Raise if a rank that is still missing has ended or left, or if time is up.

        The ends are read before the words are read again: a message that came counts, whatever became of its sender.
        """
        absent = self._missing(lane, epoch)
        gone = self._dead(absent)
        left = {rank: state for rank in absent if (state := self._state(rank)) is not State.OPEN}
        missing = self._missing(lane, epoch)
        gone = {rank: how for rank, how in gone.items() if rank in missing}
        left = {rank: state for rank, state in left.items() if rank in missing and rank not in gone}
        heard = f"heard from {self.size - len(missing)} of {self.size} ranks, epoch {epoch}"
        if gone:
            self._raise_lost(gone, step, heard)
        if left:
            self._raise_left(left, step, heard)
        elapsed = time.monotonic() - begin
        if missing and elapsed > self._timeout_s:
            raise PeerTimeout(
                f"{step}: {_ranks(missing)} silent for {elapsed:.2f} s (timeout_s={self._timeout_s:g}); {heard}; "
                f"it is alive, so stopped, busy elsewhere, or in another call: {self._hint(missing)}",
                ranks=missing,
                step=step,
            )

    def _raise_lost(self, gone: dict[int, str], step: str, heard: str) -> None:
        how = ", ".join(f"rank {rank} {text}" for rank, text in gone.items())
        raise PeerLost(f"{step}: {how}; {heard}; make a new buffer without it", ranks=sorted(gone), step=step)

    def _raise_left(self, left: dict[int, State], step: str, heard: str) -> None:
        """Name those whom the leavers blame; a leaver that blames nobody is the culprit itself."""
        blamed = {rank: self._blamed(rank) for rank in left}
        culprits = sorted({culprit for rank, ranks in blamed.items() for culprit in ranks or [rank]})
        timeout = any(left[rank] is State.TIMED_OUT for rank in left)
        how = ", ".join(
            f"rank {rank} left because of {_ranks(ranks)}" if ranks else f"rank {rank} closed its buffer"
            for rank, ranks in blamed.items()
        )
        kind = PeerTimeout if timeout else PeerLost
        mine = " (this rank: it was waited for and did not come)" if self.rank in culprits else ""
        raise kind(f"{step}: {how}{mine}; {heard}", ranks=culprits, step=step)

    def _state(self, rank: int) -> State:
        return State(signals.state_of(int(self._controls[rank])))

    @abstractmethod
    def _control_memory(self, rank: int) -> Segment: ...

    def _blamed(self, rank: int) -> list[int]:
        memory = self._control_memory(rank).memory
        return [other for other in range(self.size) if memory[signals.BLAMED_AT + other]]


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
