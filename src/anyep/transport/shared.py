"""What the in-process and the shared-memory transport share: ranks that load and store in each other's memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from anyep.errors import ClosedError, PeerLost
from anyep.machine.forks import tell_after_fork
from anyep.transport.arena import Arena, ArenaBlock
from anyep.transport.base import Blame, Block, Lane, Place, Ranks, Words
from anyep.transport.board import Board, anybody_failed
from anyep.transport.control import DOORBELL_OFFSET, ControlLayout
from anyep.transport.elsewhere import Holder
from anyep.transport.inquiry import Inquiry
from anyep.transport.liveness import Departure, lost
from anyep.transport.rendezvous import Rendezvous
from anyep.transport.segments import SegmentMaker
from anyep.transport.slots import lay_out
from anyep.transport.together import load_signals
from anyep.transport.waiting import (
    LONGEST_SLICE_NS,
    NAP_S,
    SLICE_NS,
    SPINS,
    YIELDS,
    Opened,
    PeerMemory,
    Waiter,
    departures_of,
    told_by,
)


class SharedTransport:
    """A transport over memory that ranks address. ``transport/base.py`` says what each method promises.

    ``controls``: where each rank's control memory lies here. Ranks that are not in it live on other hosts: somebody who
    does share memory posts for them (:meth:`post_for`), and messages and blame are numbered by all ranks all the same.
    ``holders``: a name by rank of the process or thread that it is, ``holder``: this one (``elsewhere.py``).
    """

    name = "shared"

    def __init__(
        self,
        rendezvous: Rendezvous,
        *,
        layout: ControlLayout,
        timeout_s: float,
        arena: Arena,
        maker: SegmentMaker,
        memories: PeerMemory,
        controls: Mapping[int, int],
        holders: Sequence[int],
        holder: Holder,
    ) -> None:
        self.rank = rendezvous.rank
        self.size = rendezvous.size
        self._signals = load_signals()
        self._pid = os.getpid()
        self.is_fork = False
        self._ring = layout.ring
        self._layout = layout
        boards = {rank: Board(self._signals, address, self.size) for rank, address in controls.items()}
        self.holders = holders
        self.inquiry = Inquiry(
            self.rank, timeout_s, boards=boards, memory=(arena, memories), holders=holders, holder=holder
        )
        self._waiter = Waiter(
            self._signals,
            rank=self.rank,
            num_ranks=self.size,
            doorbell=controls[self.rank] + DOORBELL_OFFSET,
            timeout_s=timeout_s,
            inquiry=self.inquiry,
        )
        self.waited_ns = self._waiter.waited_ns
        self._controls_R = np.array([controls.get(rank, 0) for rank in range(self.size)], np.int64)
        self.leave_out(())
        self._leaving = threading.Lock()
        maker.peers = [board for rank, board in boards.items() if rank != self.rank]
        self._kept: Opened | None = Opened(
            arena=arena,
            memories=memories,
            controls_R=self._controls_R,
            members_R=self._controls_R[self._controls_R != 0],
            boards=boards,
            slots=lay_out(layout, self.rank, arena.segments[0]),
        )
        self._open: Opened | None = self._kept
        tell_after_fork(self)

    def leave_out(self, ranks: Collection[int]) -> None:
        """Choose who is awaited (everybody), posted to (members: those of this host), and looked after (heeded)."""
        everybody = [(self.rank + step) % self.size for step in range(self.size)]  # oneself first
        present = [rank for rank in everybody if rank not in ranks]
        self._everybody = np.array(present, np.int64)
        self._members = self._everybody[self._controls_R[self._everybody] != 0]
        self._heeded = self._controls_R[self._members]

    def allocate(self, num_bytes: int) -> ArenaBlock:
        return self._opened().arena.allocate(num_bytes)

    def trim(self, block: Block, num_bytes: int) -> None:
        assert isinstance(block, ArenaBlock), "every block of this transport is one"
        self._opened().arena.trim(block, num_bytes)

    def locate(self, address: int, num_bytes: int) -> Place | None:
        return self._opened().arena.locate(address, num_bytes)

    def address(self, rank: int, place: Place) -> int:
        opened = self._opened()
        try:
            return opened.memories.segment_address(rank, place.segment) + place.offset
        except ProcessLookupError as error:
            departures = departures_of(self._signals, opened)
            told = lost(
                self._waiter.facts(opened, None, "address", [rank], sorted({*range(self.size)} - {rank})), departures
            )
            raise told or PeerLost(
                f"rank {rank} is gone, and its memory (segment {place.segment}) with it: {error}. "
                "Look at its output; close this buffer and make a new one on the ranks that are left",
                ranks=[rank],
                step="address",
            ) from error

    def post(self, lane: Lane, epoch: int, words: Words, ranks: Ranks | None = None) -> None:
        opened = self._open or self._refuse()
        self._publish(opened, opened.slots[lane.index][epoch % self._ring].own_offset, lane, epoch, words, ranks)

    def post_for(self, source: int, lane: Lane, epoch: int, words: Words, ranks: Ranks | None = None) -> None:
        """Post in the name of ``source``, a rank of another host that has sent its message here."""
        offset = self._layout.mailbox_offset(lane.index, epoch % self._ring, source)
        self._publish(self._open or self._refuse(), offset, lane, epoch, words, ranks)

    def let_post(self, messengers: Mapping[int, int]) -> None:
        """Learn who posts here in the name of each rank of another host."""
        self._waiter.messengers = messengers

    def say_passing_on(self, value: bool) -> None:
        """Tell neighbours whether this rank looks after messages from other hosts at the moment."""
        if (opened := self._open) is not None:
            opened.boards[self.rank].passes_on = value

    def say_waiting(self, missing: Sequence[int], began_ns: int) -> None:
        """Say for which ranks this thread waits, outside of :meth:`wait`."""
        if self._open is not None:
            self.inquiry.waits(missing, began_ns)

    def say_waited(self) -> None:
        """This thread does not wait any more."""
        if self._open is not None:
            self.inquiry.over()

    def standing_still(
        self, missing: Sequence[int], began_ns: int, departures: Mapping[int, Departure]
    ) -> dict[int, int | None]:
        """Return who is to blame for a wait outside of :meth:`wait` whose time is up."""
        opened = self._opened()
        known = {**departures_of(self._signals, opened), **departures}
        return self.inquiry.standing_still(missing, began_ns, known)

    def _publish(self, opened: Opened, offset: int, lane: Lane, epoch: int, words: Words, ranks: Ranks | None) -> None:
        to = self._members if ranks is None else ranks
        try:
            posted = self._signals.post_each(
                opened.controls_R, DOORBELL_OFFSET, offset, words, lane.words, to, epoch, time.monotonic_ns()
            )
        except TypeError:
            posted = False
        if not posted:  # wrong arrays, or right ones that are not of the kind that it is compiled for
            words, to = self._checked_words(lane, words), self._checked_ranks(to)
            self._signals.post_each(
                opened.controls_R, DOORBELL_OFFSET, offset, words, lane.words, to, epoch, time.monotonic_ns()
            )

    def arrived(self, lane: Lane, epoch: int) -> bool:
        opened = self._open or self._refuse()
        return not self._waiter.missing(opened.slots[lane.index][epoch % self._ring], epoch, self._everybody)

    def wait(self, lane: Lane, epoch: int, step: str, ranks: Ranks | None = None) -> Words:
        opened = self._open or self._refuse()
        slot = opened.slots[lane.index][epoch % self._ring]
        sources = self._everybody if ranks is None else ranks
        began_ns = time.monotonic_ns()
        try:
            missing = self._waiter.look(slot, epoch, sources, began_ns)
        except TypeError:
            missing = -1
        if missing:
            self._waiter.keep_waiting(self._opened, slot, epoch, step, self._checked_ranks(sources), began_ns)
        return slot.view

    def check(self, epoch: int, step: str) -> None:
        opened = self._open or self._refuse()
        if not anybody_failed(self._signals, self._heeded):
            return
        present = {*self._members.tolist()}
        departures = {
            rank: left for rank, left in told_by(opened).items() if left.blame is not None and rank in present
        }
        others = sorted({*range(self.size)} - departures.keys())
        error = lost(self._waiter.facts(opened, epoch, step, sorted(departures), others), departures)
        assert error is not None, "a departure is a reason"
        raise error

    def claim(self, epoch: int) -> bool:
        return self._opened().boards[self.rank].claim(epoch)

    def expel(self, rank: int, epoch: int) -> bool:
        return self._opened().boards[rank].expel(epoch)

    def leave(self, blame: Blame | None = None) -> None:
        with self._leaving:
            opened, self._open = self._open, None
        if opened is not None:
            self.inquiry.end()
            opened.boards[self.rank].leave(blame)

    def close(self) -> None:
        self.leave()
        with self._leaving:
            kept, self._kept = self._kept, None
        if kept is not None:
            kept.arena.close()
            kept.memories.close()

    def after_fork(self) -> None:
        """Called in a child of this process: it has a copy of this object, and may not speak for the rank."""
        self._leaving = threading.Lock()  # another thread of the parent may have held it
        self.inquiry.after_fork()
        self._open = self._kept = None  # its mappings go, but for those that tensors lie on
        self.is_fork = True

    def describe(self) -> dict[str, str]:
        arena = self._opened().arena
        pages = ", of huge pages" if all(memory.huge_pages for memory in arena.segments) else ""
        how = "then sleep on a futex" if self._waiter.sleeps else f"then naps of {NAP_S * 1e3:g} ms (no futex here)"
        return {
            "arena": f"{arena.committed_bytes / (1 << 20):.0f} MiB in {len(arena.segments)} segments{pages}, "
            "grows when full",
            "waits": f"{SPINS} looks, {YIELDS} yields, {how}; peers checked every "
            f"{SLICE_NS // 1_000_000} to {LONGEST_SLICE_NS // 1_000_000} ms",
        }

    def _opened(self) -> Opened:
        return self._open or self._refuse()

    def _refuse(self) -> Opened:
        if os.getpid() != self._pid:
            raise ClosedError(
                f"the {self.name} transport of rank {self.rank} belongs to process {self._pid}, and this "
                "is a fork of it; use it there, or make a group and a buffer of this process's own"
            )
        raise ClosedError(f"the {self.name} transport of rank {self.rank} is closed; open a new one")

    def _checked_words(self, lane: Lane, words: Words) -> Words:
        if words.ndim != 2 or words.shape[0] != self.size or words.shape[1] > lane.words:
            raise ValueError(
                f"lane {lane.name!r} takes words [{self.size}, at most {lane.words}], got {list(words.shape)}"
            )
        if words.dtype != np.int64:
            raise TypeError(f"lane {lane.name!r} takes int64 words, got {words.dtype}")
        return np.array(words, order="C")

    def _checked_ranks(self, ranks: Ranks) -> Ranks:
        if not isinstance(ranks, np.ndarray) or ranks.dtype != np.int64:
            raise TypeError(f"ranks must be an int64 array or None, got {getattr(ranks, 'dtype', type(ranks))}")
        if ranks.ndim != 1 or not ((ranks >= 0) & (ranks < self.size)).all():
            raise ValueError(f"ranks must be distinct numbers [m] from 0 to {self.size - 1}, got {ranks.tolist()}")
        return np.array(ranks, order="C")
