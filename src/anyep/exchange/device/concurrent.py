"""Ranks on streams of their own: each launches its own halves, and waits on the device for the others' words.

A rank says *announced* when its message is on all boards, and *done* when it has written all its rows or read all that
it sums. Words only grow (kernels/gpu/flags.py). A wait that outlasts its limit marks the silent rank's message on the
own board as at fault, so that nothing is written for an operation that not all have begun, or leaves an error word
where it was the end that did not come. Neither traps nor hangs.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby
from typing import NamedTuple

import torch

from anyep.exchange.device.boards import Boards
from anyep.exchange.device.devices import Device, Stream, Tape
from anyep.exchange.device.order import Half, Turn
from anyep.exchange.device.reach import Reach
from anyep.kernels.spec_device import FAULT, DeviceKernels
from anyep.kernels.tapes import Act

_ANNOUNCED, _DONE = 0, 1
_STAGES = 2
_MOST_TURNS = 2
"""Of an operation: memory that was offered again is enough."""


class _Stage(NamedTuple):
    """What ranks wait for, and where a wait that lasts too long leaves word of rank r: ``error_bytes`` * r further."""

    turn: Turn
    number: int
    """_ANNOUNCED or _DONE"""
    away: tuple[int, ...]
    """ranks that take no part"""
    errors_addr: int
    error_bytes: int


class Concurrent:
    """The order of one rank's halves. ``limit``: how often a wait looks."""

    is_concurrent = True

    def __init__(
        self,
        device: Device,
        reach: Reach,
        stream: Stream,
        boards: Boards,
        rank: int,
        *,
        limit: int,
        late_addr: int,
    ) -> None:
        self._device = device
        self._stream = stream
        self._boards = boards
        self._rank = rank
        self._limit = limit
        self._late_addr = late_addr
        self._halves: dict[Turn, Half] = {}
        self._tapes: dict[tuple[str, int, int, tuple[int, ...]], Tape] = {}
        self.words = reach.room((_MOST_TURNS, _STAGES, boards.num_ranks), torch.int64, lambda: "words").zero_()
        self.first_addr = self.words.data_ptr()
        self._clock = torch.zeros(1 + boards.ring, dtype=torch.int64, device=device.where)
        """how many operations this rank's stream has begun; and which was each of those in flight"""

    def meet(self, first_addr_R: list[int]) -> None:
        """Learn where every rank's words begin."""
        ranks = self._boards.num_ranks
        kinds = range(_MOST_TURNS * _STAGES)
        own = [[first + 8 * (kind * ranks + self._rank) for first in first_addr_R] for kind in kinds]
        self._peers = torch.tensor(own, dtype=torch.int64, device=self._device.where)

    def hand_in(self, turn: Turn, rank: int, half: Half) -> None:
        """Say on the device that this rank has announced; ``half`` is for later."""
        self._halves[turn] = half
        if turn.number == 0:
            self.pass_by(turn)
        self._play("announced", turn, lambda kernels: self._signal(kernels, turn, _ANNOUNCED))

    def pass_by(self, turn: Turn) -> None:
        """Count an operation in which there is nothing to launch: all ranks count alike, whatever each calls."""
        clock, epoch = self._clock.data_ptr(), self._epoch_addr(turn)
        self._play("begun", turn, lambda kernels: kernels.tick(clock, epoch))

    def launch(self, turn: Turn, absent: Collection[int]) -> None:
        """Launch this rank's half between waits for all ranks that take part."""
        half, away, boards = self._halves.pop(turn), tuple(absent), self._boards
        faults_addr = boards.board_addr(turn.epoch) + 8 * FAULT
        announced = _Stage(turn, _ANNOUNCED, away, faults_addr, boards.message_bytes)
        done = _Stage(turn, _DONE, away, self._late_addr, 8)
        self._play("wait", turn, lambda kernels: self._wait(kernels, announced), away)
        half(absent)
        self._play("meet", turn, lambda kernels: self._meet(kernels, done), away)

    def _play(self, what: str, turn: Turn, act: Act, away: tuple[int, ...] = ()) -> None:
        """Launch ``act``, which is recorded once for each operation in flight."""
        key = what, turn.epoch % self._boards.ring, turn.number, away
        tape = self._tapes.get(key)
        if tape is None:
            tape = self._tapes[key] = self._device.tape(act)
        self._device.play(tape, (), self._stream)

    def drop(self, turn: Turn) -> None:
        """Forget what was handed in: all ranks refuse the operation."""
        self._halves.pop(turn, None)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return all that lives as long as the buffer."""
        return self.words, self._clock, self._peers

    def _epoch_addr(self, turn: Turn) -> int:
        """Return where the operation's number lies: made on the device, so that a graph that is replayed counts on."""
        return self._clock.data_ptr() + 8 * (1 + turn.epoch % self._boards.ring)

    def _kind_bytes(self, turn: Turn, stage: int) -> int:
        assert turn.number < _MOST_TURNS, "the second offer is large enough"
        return 8 * self._boards.num_ranks * (turn.number * _STAGES + stage)

    def _signal(self, kernels: DeviceKernels, turn: Turn, stage: int) -> None:
        peers = self._peers.data_ptr() + self._kind_bytes(turn, stage)
        kernels.signal(peers, self._boards.num_ranks, self._epoch_addr(turn), 0)

    def _meet(self, kernels: DeviceKernels, stage: _Stage) -> None:
        """Signal, and wait for all."""
        if stage.away:
            self._signal(kernels, stage.turn, stage.number)
            self._wait(kernels, stage)
            return
        kind_bytes = self._kind_bytes(stage.turn, stage.number)
        addresses = (self._peers.data_ptr() + kind_bytes, self.first_addr + kind_bytes)
        ranks, epoch = self._boards.num_ranks, self._epoch_addr(stage.turn)
        kernels.meet(*addresses, ranks, epoch, self._limit, stage.errors_addr, stage.error_bytes)

    def _wait(self, kernels: DeviceKernels, stage: _Stage) -> None:
        """Wait for all but those who are away: in one launch for each stretch of neighbours that are not."""
        words = self.first_addr + self._kind_bytes(stage.turn, stage.number)
        epoch, error_bytes = self._epoch_addr(stage.turn), stage.error_bytes
        for is_away, ranks in groupby(range(self._boards.num_ranks), stage.away.__contains__):
            if not is_away:
                first, *others = ranks
                errors = stage.errors_addr + first * error_bytes
                kernels.wait(words + 8 * first, 1 + len(others), epoch, self._limit, 0, errors, error_bytes)
