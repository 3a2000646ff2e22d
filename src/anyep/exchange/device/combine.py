"""Combine on a device: every rank says where its rows lie, then each sums the rows of its tokens where they lie.

Outputs that the other ranks cannot reach are copied in first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from anyep.exchange.device.announced import forget_rows_from
from anyep.exchange.device.combine_form import Scratch, combine_form_of
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
from anyep.kernels.spec_device import NUM_PLACES, SUMMARY_WORDS
from anyep.numerics.logfmt import logfmt_row_bytes


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
        self._form = combine_form_of(end, back, self._plan)
        self._scratch = self._allocate()
        self._copies = self._rooms()
        self._bases: Sequence[int] = ()
        self._visit: Visit | None = None
        self._absent: Collection[int] = ()
        self._expels = end.crowd.expels and back.handle.send.geometry.padded
        self._header = naming_handle(back.way.header, back.handle.epoch)

    def _allocate(self) -> Scratch:
        end, plan = self._end, self._plan
        device, account = end.device, end.account.__str__
        words = allocate(device, (NUM_PLACES * end.num_ranks + SUMMARY_WORDS,), torch.int64, account)
        if self._back.way.wire == "none":
            return Scratch(words=words, encoded=None, rows=None)
        shape = plan.geometry.shape
        most = end.num_ranks * end.max_tokens * min(end.num_topk, shape.num_local)
        encoded = end.reach.room((most, logfmt_row_bytes(end.hidden)), torch.uint8, account)
        rows = allocate(device, (plan.num_tokens, plan.width), torch.int32, account)
        return Scratch(words=words, encoded=encoded, rows=rows)

    def _rooms(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Make room for outputs and weights where others can reach it, where they do not lie there."""
        if self._back.way.wire != "none":
            return None, None
        return self._room(self._back.y), self._room(self._back.topk_weights)

    def _room(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or self._end.reach.place(tensor) is not None:
            return None
        return self._end.reach.room(tensor.shape, tensor.dtype, self._end.account.__str__)

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
        self._epoch, self._step, self._absent = epoch, f"{self.label} {epoch}", end.crowd.absent
        self._visit = Visit.begin(end.device, end.stream)
        for held in (self._plan.device_memory, self._back.handle.topk_weights):
            self._visit.borrow(held, self._plan.home)
        self._bases = self._form.bases(self._back, self._plan, epoch, self._scratch, self._lend())
        end.device.play(self._form.first, self._bases, end.stream)
        end.order.hand_in(Turn(epoch, 0), end.rank, self._second_half)
        words_RW = end.desk(epoch).places_RW
        words_RW[:, :BODY] = self._header
        end.announce(epoch, words_RW, claim=self._expels)

    def _lend(self) -> tuple[int, int]:
        """Bring rows and weights where others can reach them, if they are not; return their places."""
        back, encoded = self._back, self._scratch.encoded
        if encoded is not None:
            return self._place(encoded), NOWHERE
        y_copy, weights_copy = self._copies
        return self._lent(back.y, y_copy), NOWHERE if back.topk_weights is None else self._lent(
            back.topk_weights, weights_copy
        )

    def _lent(self, tensor: torch.Tensor, copy: torch.Tensor | None) -> int:
        if copy is None:
            return self._place(tensor)
        end = self._end
        with end.device.on(end.stream):
            end.device.kernels.copy(tensor.data_ptr(), copy.data_ptr(), tensor.nbytes)
        end.counters.add(copied_in_bytes=tensor.nbytes)
        return self._place(copy)

    def _place(self, tensor: torch.Tensor) -> int:
        place = self._end.reach.place(tensor)
        assert place is not None, "what is lent was brought within reach"
        return place

    def _second_half(self, absent: Collection[int]) -> None:
        """Launch the sums; whoever comes first does so for every rank."""
        if absent:
            with self._end.device.on(self._end.stream):
                self._end.boards.speak_for(absent, self._end.device.kernels, self._epoch)
                forget_rows_from(self._plan, absent)
        self._end.device.play(self._form.sums, self._bases, self._end.stream)

    def finish(self) -> torch.Tensor | Combined:
        """Wait for all announcements; the caller's stream then follows all ranks' sums."""
        assert self._visit is not None, "what was posted has begun"
        with self._visit.cleared(self, self._end.abandoned):
            return self._finish(self._visit)

    def _finish(self, visit: Visit) -> torch.Tensor | Combined:
        end, back = self._end, self._back
        opened_RW = (end.hear_or_expel if self._expels else end.hear)(self._epoch, self._step, self._header)
        if end.crowd.absent:
            end.crowd.expelled_since(self._absent, self._step, goes_on=self._expels)
        turn = Turn(self._epoch, 0)
        if not end.books.agree(opened_RW, self._header):
            end.order.drop(turn)
            check_agreement(self._header, opened_RW, self._step)
        end.order.launch(turn, end.crowd.absent)
        visit.end([back.out, back.weights_out])
        end.counters.combined(0)
        return back.out if back.weights_out is None else Combined(x=back.out, topk_weights=back.weights_out)
