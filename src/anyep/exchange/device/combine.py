"""Combine on a device: every rank says where its rows lie, then each sums the rows of its tokens where they lie.

Outputs that the other ranks cannot reach are copied in first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from anyep.exchange.device.devices import allocate
from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.order import Turn
from anyep.exchange.device.plan import DevicePlan
from anyep.exchange.device.reach import NOWHERE
from anyep.exchange.device.streams import Visit
from anyep.exchange.event import Targets
from anyep.exchange.handle import Combined
from anyep.exchange.opening import BODY, check_agreement, naming_handle
from anyep.exchange.returning import Returning
from anyep.exchange.scatter import place_at
from anyep.exchange.wire import ELEMENTS
from anyep.kernels.spec_device import NUM_PLACES, SUMMARY_WORDS
from anyep.numerics.logfmt import logfmt_row_bytes


class _Scratch(NamedTuple):
    """Memory of one combine on the device."""

    words: torch.Tensor
    """int64: peer tables, and what connect says"""
    encoded: torch.Tensor | None
    """rows in LogFMT-10, one behind the other"""
    copies: tuple[torch.Tensor | None, torch.Tensor | None]
    """room for outputs and weights that lie where others cannot reach them"""
    rows: torch.Tensor | None
    """int32 [T, W]: where each entry's row lies among them"""


class DeviceCombine:
    """One combine of one rank."""

    label = "combine"

    def __init__(self, end: DeviceEndpoint, back: Returning) -> None:
        assert isinstance(back.handle.send, DevicePlan), "a device's handle has a device's plan"
        self._end = end
        self._back = back
        self._plan = back.handle.send
        self._epoch = 0
        self._step = self.label
        self._scratch = self._allocate()
        self._visit: Visit | None = None
        self._header = naming_handle(back.way.header, back.handle.epoch)

    def _allocate(self) -> _Scratch:
        end, plan = self._end, self._plan
        device, account = end.device, end.account.__str__
        words = allocate(device, (NUM_PLACES * end.num_ranks + SUMMARY_WORDS,), torch.int64, account)
        if self._back.way.wire == "none":
            return _Scratch(words=words, encoded=None, copies=self._rooms(), rows=None)
        shape = plan.geometry.shape
        most = end.num_ranks * end.max_tokens * min(end.num_topk, shape.num_local)
        encoded = end.reach.room((most, logfmt_row_bytes(end.hidden)), torch.uint8, account)
        rows = allocate(device, (plan.num_tokens, plan.width), torch.int32, account)
        return _Scratch(words=words, encoded=encoded, copies=(None, None), rows=rows)

    def _rooms(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Make room where others can reach it for what does not lie there."""

        def room(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None or self._end.reach.place(tensor) is not None:
                return None
            return self._end.reach.room(tensor.shape, tensor.dtype, self._end.account.__str__)

        return room(self._back.y), room(self._back.topk_weights)

    def wants_background(self) -> bool:
        """Nothing is computed on the host."""
        return False

    def may_answer(self) -> bool:
        """Nobody waits for more than what is posted."""
        return False

    def ready(self) -> bool:
        """Whether every rank's announcement is here."""
        return self._end.transport.arrived(self._end.lanes.open, self._epoch)

    def size_up(self) -> None:
        """Sizes are learnt with the rest: the device works them out."""

    def targets(self) -> Targets:
        """Return where the sums go."""
        return Targets(x=self._back.out, topk_weights=self._back.weights_out)

    def post(self, epoch: int) -> None:
        """Launch what says where this rank's rows lie; then tell the others."""
        end = self._end
        end.faults.check_silence()
        self._epoch, self._step = epoch, f"{self.label} {epoch}"
        self._visit = Visit.begin(end.device, end.stream)
        for held in (self._plan.device_memory, self._back.handle.topk_weights):
            self._visit.borrow(held, self._plan.home)
        with end.device.on(end.stream):
            rows, weights = self._lend()
            end.device.kernels.announce(
                *(end.num_ranks, end.boards.messages_addr(epoch), 0),
                *(rows, weights, NOWHERE, NOWHERE, NOWHERE),
                *(0, 0, 0),
            )
        end.order.hand_in(Turn(epoch, 0), end.rank, self._second_half)
        words_RW = end.desk(epoch).places_RW
        words_RW[:, :BODY] = self._header
        end.announce(epoch, words_RW)

    def _lend(self) -> tuple[int, int]:
        """Bring rows and weights where others can reach them, if they are not; return their places."""
        back, reach, scratch = self._back, self._end.reach, self._scratch
        if scratch.encoded is not None:
            return _known(reach.place(self._encode(scratch.encoded))), NOWHERE
        lent = []
        for tensor, copy in zip((back.y, back.topk_weights), scratch.copies, strict=True):
            if tensor is not None and copy is not None:
                self._end.device.kernels.copy(tensor.data_ptr(), copy.data_ptr(), tensor.nbytes)
                self._end.counters.add(copied_in_bytes=tensor.nbytes)
            found = copy if copy is not None else tensor
            lent.append(NOWHERE if found is None else _known(reach.place(found)))
        return lent[0], lent[1]

    def _encode(self, encoded: torch.Tensor) -> torch.Tensor:
        plan = self._plan
        self._end.device.kernels.logfmt_encode(
            *(self._back.y.data_ptr(), self._end.hidden, plan.geometry.shape.num_local),
            *(plan.field("counts"), plan.field("block_start"), encoded.data_ptr()),
        )
        return encoded

    def _second_half(self) -> None:
        """Launch the sums; whoever comes first does so for every rank."""
        end, plan, words = self._end, self._plan, self._scratch.words
        tables_addr = words.data_ptr() + 8 * SUMMARY_WORDS
        with end.device.on(end.stream):
            end.device.kernels.connect(
                *(end.boards.board_addr(self._epoch), end.boards.message_bytes, end.num_ranks, end.base_addr, 0),
                *(tables_addr, words.data_ptr(), end.faults.addr, plan.entry_rank_addr, plan.num_tokens * plan.width),
            )
            rows_addr = plan.entry_row_addr
            if self._scratch.rows is not None:
                rows_addr = self._scratch.rows.data_ptr()
                place_at(end, plan, plan.field("dense_start"), rows_addr)
            self._sum(rows_addr, tables_addr)

    def _sum(self, rows_addr: int, tables_addr: int) -> None:
        end, back, plan, kernels = self._end, self._back, self._plan, self._end.device.kernels
        entries = (plan.width, int(back.way.reduce == "rank"), plan.entry_rank_addr, rows_addr)
        factors = 0 if back.factors is None else back.factors.data_ptr()
        bias0, bias1 = [*(one.data_ptr() for one in back.bias), 0, 0][:2]
        rest = (0, plan.num_tokens, *entries, tables_addr, factors, bias0, bias1, back.out.data_ptr())
        if back.way.wire == "none":
            kernels.reduce(int(ELEMENTS[back.y.dtype]), end.hidden, *rest)
        else:
            kernels.reduce_logfmt(end.hidden, *rest)
        if back.weights_out is not None:
            weights_table = tables_addr + 8 * end.num_ranks
            out_addr = back.weights_out.data_ptr()
            kernels.reduce_weights(end.num_topk, 0, plan.num_tokens, *entries, weights_table, out_addr)

    def finish(self) -> torch.Tensor | Combined:
        """Wait for all announcements; the caller's stream then follows all ranks' sums."""
        assert self._visit is not None, "what was posted has begun"
        with self._visit.cleared(self, self._end.abandoned):
            return self._finish(self._visit)

    def _finish(self, visit: Visit) -> torch.Tensor | Combined:
        end, back = self._end, self._back
        opened_RW = end.hear(self._epoch, self._step, self._header)
        turn = Turn(self._epoch, 0)
        if not end.books.agree(opened_RW, self._header):
            end.order.drop(turn)
            check_agreement(self._header, opened_RW, self._step)
        end.order.launch(turn)
        if end.order.is_concurrent:
            with end.device.on(end.stream):
                end.faults.ask()
        visit.end([back.out, back.weights_out])
        end.counters.combined(0)
        return back.out if back.weights_out is None else Combined(x=back.out, topk_weights=back.weights_out)


def _known(place: int | None) -> int:
    assert place is not None, "what is lent was brought within reach"
    return place
