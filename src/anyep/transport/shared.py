"""What the in-process and the shared-memory transport have in common: ranks that load and store in each other's memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from anyep.errors import ClosedError, PeerLost
from anyep.machine import linux
from anyep.transport.arena import Arena, ArenaBlock
from anyep.transport.base import Blame, Lane, Place, Words
from anyep.transport.board import Board
from anyep.transport.control import DOORBELL_OFFSET, ControlLayout
from anyep.transport.liveness import Departure, Wait, lost, silent
from anyep.transport.opening import load_signals
from anyep.transport.rendezvous import Rendezvous
from anyep.transport.segments import SegmentMaker

SLICE_NS = 20_000_000
"""How long a wait sleeps before it looks whether the peers live and whether Ctrl-C was pressed."""
SPINS, YIELDS = 64, 16
"""Looks before a wait sleeps: 64 with a pause (about 1 us), 16 that let others run."""
_NAP_S = 0.0005
_EPOCHS = 1 << 32


class Neighbours(Protocol):
    """What differs between ranks that are threads and ranks that are processes."""

    def segment_address(self, rank: int, index: int) -> int:
        """Return where a segment of ``rank`` lies here. Raises ProcessLookupError when the rank is gone."""
        ...

    def departures(self) -> Mapping[int, Departure]:
        """Return the ranks that ended without a word."""
        ...

    def names(self) -> Mapping[int, str]:
        """Return what error messages call each rank, for example its process."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """One ring slot of a lane: where source 0's mailbox lies, where this rank's stands, and all messages as an array."""

    first: int
    stride: int
    own_offset: int
    view: Words


class SharedTransport:
    """A transport over memory that all ranks address. ``transport/base.py`` says what each method promises."""

    name = "shared"

    def __init__(
        self,
        rendezvous: Rendezvous,
        *,
        layout: ControlLayout,
        timeout_s: float,
        arena: Arena,
        maker: SegmentMaker,
        neighbours: Neighbours,
        controls: Sequence[int],
    ) -> None:
        self.rank = rendezvous.rank
        self.size = rendezvous.size
        self._signals = load_signals()
        self._ring = layout.ring
        self._timeout_s = timeout_s
        self._leaving = threading.Lock()
        self._arena: Arena | None = arena
        self._neighbours: Neighbours | None = neighbours
        self._controls_R = np.array(controls, np.int64)
        self._doorbell = controls[self.rank] + DOORBELL_OFFSET
        self._boards = [Board(self._signals, address, self.size) for address in controls]
        self._slots = self._lay_out(layout, arena.segments[0])
        self._sleeps = bool(self._signals.HAS_FUTEX)
        maker.peers = [board for rank, board in enumerate(self._boards) if rank != self.rank]

    def allocate(self, num_bytes: int) -> ArenaBlock:
        return self._open_arena().allocate(num_bytes)

    def locate(self, address: int, num_bytes: int) -> Place | None:
        return self._open_arena().locate(address, num_bytes)

    def address(self, rank: int, place: Place) -> int:
        neighbours = self._neighbours
        if neighbours is None:
            raise self._closed_error()
        try:
            return neighbours.segment_address(rank, place.segment) + place.offset
        except ProcessLookupError as error:
            raise PeerLost(
                f"rank {rank} is gone, and its memory (segment {place.segment}) with it: {error}",
                ranks=[rank],
                step="address",
            ) from error

    def post(self, lane: Lane, epoch: int, words: Words) -> None:
        self._open_arena()
        words = self._checked(lane, words)
        slot = self._slots[lane.index][epoch % self._ring]
        self._signals.post_all(self._controls_R, DOORBELL_OFFSET, slot.own_offset, self.rank, words, epoch % _EPOCHS)

    def wait(self, lane: Lane, epoch: int, step: str) -> Words:
        arena = self._open_arena()  # held: what is waited on stays mapped if another thread closes meanwhile
        slot = self._slots[lane.index][epoch % self._ring]
        started_ns = time.monotonic_ns()
        if not self._await(slot, epoch, SPINS, YIELDS, started_ns):
            self._keep_waiting(slot, epoch, step, started_ns)
        del arena
        return slot.view

    def close(self, blame: Blame | None = None) -> None:
        with self._leaving:
            arena, neighbours = self._arena, self._neighbours
            if arena is None or neighbours is None:
                return
            self._boards[self.rank].leave(blame)
            self._arena = None
            self._neighbours = None
        arena.close()
        neighbours.close()

    def describe(self) -> dict[str, str]:
        arena = self._open_arena()
        how = "then sleep on a futex" if self._sleeps else f"then naps of {_NAP_S * 1e3:g} ms (no futex here)"
        return {
            "arena": f"{arena.committed_bytes / (1 << 20):.0f} MiB in {len(arena.segments)} segments, grows when full",
            "waits": f"{SPINS} looks, {YIELDS} yields, {how}; peers checked every {SLICE_NS // 1_000_000} ms",
        }

    def _open_arena(self) -> Arena:
        if self._arena is None:
            raise self._closed_error()
        return self._arena

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"the {self.name} transport of rank {self.rank} is closed; open a new one")

    def _checked(self, lane: Lane, words: Words) -> Words:
        if words.ndim != 2 or words.shape[0] != self.size or words.shape[1] > lane.words:
            raise ValueError(
                f"lane {lane.name!r} takes words [{self.size}, at most {lane.words}], got {list(words.shape)}"
            )
        if words.dtype != np.int64 or not (words.flags.c_contiguous and words.flags.writeable):
            return np.array(words, np.int64, order="C")
        return words

    def _await(self, slot: _Slot, epoch: int, spins: int, yields: int, now_ns: int) -> bool:
        """Look, and sleep up to one slice; return whether every message is here."""
        deadline_ns = now_ns + SLICE_NS if self._sleeps else 0
        missing = self._signals.await_all(
            self._doorbell, slot.first, slot.stride, self.size, epoch % _EPOCHS, spins, yields, deadline_ns
        )
        if missing and not self._sleeps:
            time.sleep(_NAP_S)
        return not missing

    def _keep_waiting(self, slot: _Slot, epoch: int, step: str, started_ns: int) -> None:
        """Wait slice by slice until every message is here, a rank that owes one has left, or time is up."""
        while True:
            neighbours = self._neighbours
            if neighbours is None:
                raise self._closed_error()
            # First who has left, then which messages are here: what a rank posted before it left counts.
            departures = self._departures(neighbours)
            missing = self._missing(slot, epoch)
            if not missing:
                return
            now_ns = time.monotonic_ns()
            elapsed_s = (now_ns - started_ns) / 1e9
            if elapsed_s >= self._timeout_s or any(rank in departures for rank in missing):
                wait = Wait(
                    step=step,
                    epoch=epoch,
                    rank=self.rank,
                    missing=missing,
                    arrived=[rank for rank in range(self.size) if rank not in missing],
                    elapsed_s=elapsed_s,
                    timeout_s=self._timeout_s,
                    names=neighbours.names(),
                )
                raise lost(wait, departures) or silent(wait)
            if self._await(slot, epoch, 0, 0, now_ns):
                return

    def _departures(self, neighbours: Neighbours) -> dict[int, Departure]:
        """Return who has left; a rank's own words outweigh what was seen of its end."""
        departures = dict(neighbours.departures())
        for rank, board in enumerate(self._boards):
            told = board.departure()
            if told is not None:
                departures[rank] = told
        return departures

    def _missing(self, slot: _Slot, epoch: int) -> list[int]:
        tag = epoch % _EPOCHS
        words = [self._signals.read_word(slot.first + source * slot.stride) for source in range(self.size)]
        return [source for source, word in enumerate(words) if (word >> 32) % _EPOCHS != tag or not word % _EPOCHS]

    def _lay_out(self, layout: ControlLayout, own: linux.Memory) -> list[list[_Slot]]:
        return [
            [self._slot(layout, lane, slot, own) for slot in range(layout.ring)]
            for lane in range(len(layout.lane_words))
        ]

    def _slot(self, layout: ControlLayout, lane: int, slot: int, own: linux.Memory) -> _Slot:
        first, stride = layout.mailbox_offset(lane, slot, 0), layout.mailbox_bytes(lane)
        shape, strides = (self.size, layout.lane_words[lane]), (stride, 8)
        view: Words = np.ndarray(shape, np.int64, buffer=own.bytes, offset=first + 8, strides=strides)
        own_offset = layout.mailbox_offset(lane, slot, self.rank)
        return _Slot(first=own.address + first, stride=stride, own_offset=own_offset, view=view)
