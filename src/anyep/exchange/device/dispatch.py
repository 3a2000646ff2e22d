"""Dispatch on a device: announce, settle and scatter are launched; the host waits for counts at most once.

::

    prepare       check; copy and route topk_idx                     alone, caller's stream: outgoing, plan
    post          memory for the batch; counts and places to every rank's board, and a padded batch's rows
                  to slots at every rank (slots), if there are                       launched; then a header to all
    finish        all headers are here: the second half of every rank, launched once for all (order)
                  where the host has to know the number of rows: wait for the record; offer again if memory was short
                  the caller's stream follows
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

import numpy as np
import torch

from anyep.errors import CapacityError, PeerTimeout
from anyep.exchange.device.arrival import wrap
from anyep.exchange.device.devices import allocate
from anyep.exchange.device.dispatch_form import form_of
from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.faults import refusal
from anyep.exchange.device.fetches import Fetch
from anyep.exchange.device.landing import Landing, cut_landing
from anyep.exchange.device.order import Turn
from anyep.exchange.device.plan import DeviceCounts, DevicePlan
from anyep.exchange.device.streams import Visit
from anyep.exchange.event import Targets
from anyep.exchange.handle import Handle, Received
from anyep.exchange.ledger import DATA_SEGMENT
from anyep.exchange.opening import BODY, STATUS, RefusedError, check_agreement, check_memory
from anyep.exchange.outgoing import Outgoing
from anyep.exchange.remembered import handle_again, header_of
from anyep.kernels.spec_device import LANDING_TOO_SMALL, SUMMARY_WORDS
from anyep.transport.base import Words

_TOKENS = BODY + DATA_SEGMENT
"""Where a rank says how many tokens it has: on a device announcements name no segments."""


class DeviceDispatch:
    """One dispatch of one rank."""

    def __init__(self, end: DeviceEndpoint, out: Outgoing, *, buffer: object) -> None:
        assert isinstance(out.plan, DevicePlan), "a device's handle has a device's plan"
        self._end = end
        self._out = out
        self._plan = out.plan
        self._form = form_of(end, out, out.plan)
        self._geometry = out.geometry
        self._buffer = buffer
        self.label = "dispatch" if out.cached is None else "cached dispatch"
        self._step = self.label
        self._epoch = 0
        self._turn = Turn(0, 0)
        self._landing: Landing | None = None
        self._no_memory: CapacityError | None = None
        self._turned: torch.Tensor | None = None
        self._visit: Visit | None = None
        self._record: Fetch | None = None
        self._bases: Sequence[int] = ()
        self._waits = self._form.waits
        self._launching = threading.Lock()
        self._launched = self._offered = False
        self._absent: Collection[int] = ()
        self._expels = end.crowd.expels and out.geometry.padded and out.cached is None
        self._header = header_of(out)

    def wants_background(self) -> bool:
        """Nothing is computed on the host."""
        return False

    def may_answer(self) -> bool:
        """Whether a peer may wait for this rank's second offer."""
        return self._waits

    def ready(self) -> bool:
        """Whether every rank's announcement is here."""
        return self._end.transport.arrived(self._end.lanes.open, self._epoch)

    def size_up(self) -> None:
        """Sizes are learnt with the rest: the device works them out."""

    def targets(self) -> Targets | None:
        """Return the tensors of a padded batch, whose size is known."""
        if self._landing is None or not self._geometry.padded:
            return None
        x, _, _, _, token = self._landing.parts
        assert x is not None
        scales = None if self._turned is None else self._turned.transpose(1, 2)
        return Targets(x=x, scales=scales, source_token=token)

    def post(self, epoch: int) -> None:
        """Allocate the batch and launch the announcement, and rows that go with it; then tell the others."""
        end = self._end
        end.faults.check_silence()
        self._epoch, self._step, self._absent = epoch, f"{self.label} {epoch}", end.crowd.absent
        self._turn = Turn(epoch, 0)
        words_RW = end.desk(epoch).places_RW
        words_RW[:, :BODY] = self._header
        words_RW[:, _TOKENS] = self._plan.num_tokens
        self._prepare_landing(words_RW)
        self._visit = Visit.begin(end.device, end.stream)
        self._visit.borrow(self._plan.device_memory, self._plan.home)
        self._bases = self._form.bases(self._out, self._plan, epoch, self._landing, self._turned)
        end.device.play(self._form.first, self._bases, end.stream)
        end.order.hand_in(self._turn, end.rank, self._second_half)
        if self._waits:
            end.offers.enter(epoch, end.rank, self._offer_again)
        end.announce(epoch, words_RW, claim=self._expels)

    def _prepare_landing(self, words_RW: Words) -> None:
        """Make room for the batch, or say that there is none: all ranks then refuse together."""
        cached = self._out.cached
        rows = self._geometry.expected_rows(self._plan.num_tokens) if cached is None else cached.num_rows
        try:
            self._landing = cut_landing(self._end, self._form.landing, rows)
            if self._form.turned_shape is not None:
                end, shape = self._end, self._form.turned_shape
                self._turned = allocate(end.device, shape, end.wire.scale_dtype, end.account.__str__)
        except CapacityError as error:
            self._no_memory = error
            words_RW[:, STATUS] = max(1, rows * self._geometry.row.sent)

    def _second_half(self, absent: Collection[int]) -> None:
        """Launch places and rows; whoever comes first does so for every rank."""
        assert self._landing is not None, "a rank without memory makes all ranks refuse"
        device, stream, form = self._end.device, self._end.stream, self._form
        if absent:
            with device.on(stream):
                self._end.boards.speak_for(absent, device.kernels, self._epoch)
        if form.places is not None:
            device.play(form.places, self._bases, stream)
            with device.on(stream):
                self._record = device.fetch(self._plan.record)
        device.play(form.rows, self._bases, stream)

    def finish(self) -> Received:
        """Wait for all announcements, and for the counts where they are not known. Errors as a host's dispatch."""
        assert self._visit is not None, "what was posted has begun"
        try:
            with self._visit.cleared(self, self._end.abandoned):
                return self._finish(self._visit)
        finally:
            if self._waits:
                self._end.offers.leave(self._epoch, self._end.rank)

    def _finish(self, visit: Visit) -> Received:
        end = self._end
        self._launch()
        rows = self._rows_known() if self._out.cached is None else self._out.cached.num_rows
        assert self._landing is not None
        batch = self._landing.cut(rows)
        if self._form.turn is not None:
            end.device.play(self._form.turn, self._bases, end.stream)
        end.faults.limits = end.limits
        visit.end([*batch.parts, self._turned])
        self._plan.routes = None
        end.counters.dispatched_on_device(cached=self._out.cached is not None, rows=rows if self._waits else 0)
        handle = self._handle(rows) if self._out.cached is None else handle_again(self._out)
        assert handle is not None, "a cached dispatch goes by one"
        return wrap(batch, handle, self._plan, self._turned)

    def _launch(self) -> None:
        """Await all announcements, and launch the second half: once, whoever comes to it."""
        with self._launching:
            if self._launched:
                return
            end, turn = self._end, self._turn
            opened_RW = (end.hear_or_expel if self._expels else end.hear)(self._epoch, self._step, self._header)
            if end.crowd.absent:
                end.crowd.expelled_since(self._absent, self._step, goes_on=self._expels)
            if not end.books.agree(opened_RW, self._header):
                end.order.drop(turn)
                check_agreement(self._header, opened_RW, self._step, self._no_memory)
            if self._out.cached is None and self._plan.map.board_addr:
                self._plan.tokens_R = opened_RW[:, _TOKENS].astype(np.int32)
            end.order.launch(turn, end.crowd.absent)
            self._launched = True

    def _rows_known(self) -> int:
        """Return the number of rows of the batch; where counts decide it, wait for them."""
        if not self._waits:
            assert self._landing is not None
            return self._landing.capacity
        if not self._offered:
            code, rows = self._counted()
            if code != LANDING_TOO_SMALL:
                return rows
            self._end.offers.make(self._epoch, self._end.rank)
        self._take_offers()
        code, rows = self._counted()
        assert code != LANDING_TOO_SMALL, "what is offered again is large enough"
        return rows

    def _counted(self) -> tuple[int, int]:
        """Wait for the record; return what settle found, and the number of rows. Raises what refuses the batch."""
        assert self._record is not None, "the second half was launched"
        words = self._record.wait()
        summary = words[:SUMMARY_WORDS]
        error = refusal(self._step, summary, self._end.limits)
        if isinstance(error, PeerTimeout):
            raise error
        if error is not None:
            raise RefusedError(error)
        self._plan.keep_record(words)
        rows = int(summary[1])
        self._geometry.note_rows(rows)
        return int(summary[0]), rows

    def _offer_again(self) -> None:
        """Make room for what has turned out to come, and announce it: in whichever rank's ``wait()`` (``offers``)."""
        if self._offered:
            return
        end, visit = self._end, self._visit
        assert visit is not None
        self._launch()
        _, needed = self._counted()
        offers_RW = end.desk(self._epoch).offers_RW
        offers_RW[:] = 0
        with visit.returned():
            try:
                assert self._landing is not None
                if self._landing.capacity < needed:
                    self._landing = cut_landing(end, self._form.landing, needed)
            except CapacityError as error:
                self._no_memory = error
                offers_RW[:, 0] = max(1, needed * self._geometry.row.sent)
            visit.again()
        self._bases = self._form.bases(self._out, self._plan, self._epoch, self._landing, None)
        end.device.play(self._form.again, self._bases, end.stream)
        end.order.hand_in(Turn(self._epoch, 1), end.rank, self._second_half)
        end.transport.post(end.lanes.offer, self._epoch, offers_RW)
        self._offered = True

    def _take_offers(self) -> None:
        """Await every rank's offer, and launch the second half again; all refuse together where one has no memory."""
        end, turn = self._end, Turn(self._epoch, 1)
        heard_RW = end.wait(end.lanes.offer, self._epoch, self._step)
        if heard_RW[:, 0].any():
            end.order.drop(turn)
            check_memory(heard_RW[:, 0], self._step, self._no_memory)
        end.counters.add(second_offers=1, rounds=1)
        end.order.launch(turn, end.crowd.absent)

    def _handle(self, num_rows: int) -> Handle:
        plan, out, shape = self._plan, self._out, self._geometry.shape
        padded = self._geometry.padded
        return Handle(
            buffer=self._buffer,
            epoch=self._epoch,
            layout=out.layout,
            send=plan,
            num_rows=num_rows,
            shape=(shape.num_local, shape.block_rows) if padded else (num_rows,),
            counts=self._counts(),
            topk_weights=plan.kept_weights(),
        )

    def _counts(self) -> Sequence[int]:
        if self._waits:
            counts: list[int] = self._plan.numbers("counts").tolist()
            return counts
        return DeviceCounts(self._plan)
