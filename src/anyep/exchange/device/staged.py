"""Between hosts: a device's tensors pass through the host's memory, where the exchange of CPU tensors takes them on.

Nobody reaches the memory of another host's device (``reach``), and no engine here sends from a device's memory. So each
rank has the endpoint of a host beside its device, and its calls are those of CPU tensors (``exchange/``) between two
copies::

    call      check; topk_idx to the host, and route there; rows to the host, FP8 by the device's own quantising
              then the first half of the host's call                      (announcement, and rows that come along)
    then      the second half of the host's call        (the thread that waits, or the background, drives the engine)
    wait      results to the device; the caller's stream follows

Bits, places, handles, refusals and who is blamed are the host's. A call waits on the host for the caller's stream, and
thus cannot be captured in a graph. When it returns, its inputs have been read, those of ``wait=False`` too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from anyep.errors import CapacityError, Unavailable
from anyep.exchange import outgoing as sending
from anyep.exchange import returning
from anyep.exchange.barrier import Barrier
from anyep.exchange.device.devices import Device, Stream, allocate
from anyep.exchange.device.pinned import Move, Passage
from anyep.exchange.device.quantised import Quantiser
from anyep.exchange.device.staged_halves import StagedCombine, StagedDispatch, defined_moves
from anyep.exchange.device.streams import Visit
from anyep.exchange.dispatch import Dispatch
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.event import Operation
from anyep.exchange.geometry import Geometry
from anyep.exchange.handle import Combined, Handle, Received, SendPlan
from anyep.exchange.outgoing import Outgoing
from anyep.exchange.returning import Returning
from anyep.exchange.wire import Wire
from anyep.layout.regions import MemoryAccount
from anyep.layout.trace_file import TraceRecorder


@dataclass(frozen=True, kw_only=True, eq=False)
class StagedEndpoint(Endpoint):
    """One rank's side of a buffer whose tensors lie on a device, and whose ranks live on several hosts."""

    host: Endpoint
    """the same for CPU tensors: what is inherited is its"""
    device: Device
    stream: Stream
    """what copies to the host and back"""
    passage: Passage
    quantiser: Quantiser | None
    account: MemoryAccount

    @property
    def where(self) -> torch.device:
        return self.device.where

    def variant(
        self, *, wire: Wire, num_topk: int, max_tokens: int, static_rows: int | None, source_tokens: bool
    ) -> StagedEndpoint:
        """Return the same for rows of another kind, beside the host's variant."""
        host = self.host.variant(
            wire=wire,
            num_topk=num_topk,
            max_tokens=max_tokens,
            static_rows=static_rows,
            source_tokens=source_tokens,
        )
        quantises = wire.scale_format is not None
        quantiser = Quantiser(self.device, self.passage, host, self.account) if quantises else None
        inherited = {field.name: getattr(host, field.name) for field in fields(host)}
        return replace(self, **inherited, host=host, quantiser=quantiser)

    def check_capture(self) -> None:
        """Raise Unavailable where a graph is being captured."""
        if self.device.capturing():
            raise Unavailable(
                "a graph is being captured, and between hosts the CPU takes part in every call, which a graph cannot "
                "record: call outside of graphs, or capture on a buffer whose ranks are on one host"
            )

    def on_host(self, tensor: torch.Tensor, moves: list[Move]) -> torch.Tensor:
        """Return memory of the host for a tensor, and add to ``moves`` what fills it."""
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        moves.append(Move(tensor, there))
        return there


class StagedPlan(SendPlan):
    """A host's plan whose topk_idx is shown on the device."""

    __slots__ = ("where",)

    def __init__(self, plan: SendPlan, where: torch.device) -> None:
        for name in SendPlan.__slots__:
            setattr(self, name, getattr(plan, name))
        self.where = where

    def topk_idx(self) -> torch.Tensor:
        """Return topk_idx [T, K] on the device; waits for its copy."""
        return super().topk_idx().to(self.where)


class StagedOperations:
    """:class:`~anyep.exchange.operations.Operations` on a device, between hosts."""

    def __init__(self, end: StagedEndpoint) -> None:
        self._end = end

    def dispatch(
        self,
        x: object,
        topk_idx: object,
        topk_weights: object,
        *,
        handle: Handle | None,
        layout: str,
        expert_rows: object,
        buffer: object,
        recorder: TraceRecorder | None,
        early: bool,
    ) -> Operation[Received]:
        self._end.check_capture()
        visit = Visit.begin(self._end.device, self._end.stream)
        if expert_rows is not None:
            raise Unavailable("expert_rows goes with CPU tensors; on a device topk_idx is counted")
        if handle is not None:
            out = sending.prepare_cached(self._end, x, topk_idx, topk_weights, handle)
        else:
            out = sending.prepare(self._end, x, topk_idx, topk_weights, layout=layout, make=self._make_plan)
        visit.again()
        inner = Dispatch(self._end.host, self._brought(out), buffer=buffer, recorder=recorder, early=False)
        return StagedDispatch(self._end, inner, visit)

    def _make_plan(self, end: Endpoint, topk_idx: torch.Tensor, geometry: Geometry) -> SendPlan:
        """Route on the host. ValueError for an expert that does not exist."""
        moves: list[Move] = []
        idx = self._end.on_host(topk_idx, moves)
        self._end.passage.bring(moves)
        return StagedPlan(sending.make_plan(self._end.host, idx, geometry), self._end.where)

    def _brought(self, out: Outgoing) -> Outgoing:
        """Bring rows, as they travel, and weights to the host."""
        end, rows = self._end, out.rows
        moves: list[Move] = []
        if rows.quantise_from is not None:
            assert end.quantiser is not None, "where a wire quantises there is one"
            rows = end.quantiser.launch(rows)
        x = end.on_host(rows.x, moves)
        scales = None if rows.scales is None else end.on_host(rows.scales, moves)
        weights = None if out.topk_weights is None else end.on_host(out.topk_weights, moves)
        end.passage.bring(moves)
        return out._replace(rows=rows._replace(x=x, scales=scales), topk_weights=weights)

    def combine(
        self,
        y: object,
        handle: Handle,
        *,
        topk_weights: object,
        bias: object,
        out: object,
        reduce: object,
        wire: object,
        group: object,
    ) -> Operation[torch.Tensor | Combined]:
        self._end.check_capture()
        visit = Visit.begin(self._end.device, self._end.stream)
        back = returning.prepare(
            self._end,
            y,
            handle,
            topk_weights=topk_weights,
            bias=bias,
            out=out,
            reduce=reduce,
            wire=wire,
            group=group,
        )
        visit.again()
        return StagedCombine(self._end, back, self._returned(back), visit)

    def _returned(self, back: Returning) -> Returning:
        """Bring outputs where their origins can read them, and all else that is added; sums have memory here too."""
        end, handle = self._end, back.handle
        moves: list[Move] = []
        try:
            y = returning.empty_output(end.host, handle, back.y.dtype)
        except CapacityError:  # the host's combine says so, and all ranks refuse, if it cannot do without
            y = torch.empty(back.y.shape, dtype=back.y.dtype, device="cpu")
        moves += defined_moves(back.y, y, handle)
        factors = back.factors
        if factors is not None and factors is not handle.topk_weights:  # which stayed on the host
            factors = end.on_host(factors, moves)
        weights = None if back.topk_weights is None else end.on_host(back.topk_weights, moves)
        bias = tuple(end.on_host(one, moves) for one in back.bias)
        end.passage.bring(moves)
        out, weights_out = (
            None if one is None else torch.empty(one.shape, dtype=one.dtype, device="cpu")
            for one in (back.out, back.weights_out)
        )
        assert out is not None
        return back._replace(y=y, topk_weights=weights, factors=factors, bias=bias, out=out, weights_out=weights_out)

    def barrier(self) -> Operation[None]:
        self._end.check_capture()
        return Barrier(self._end.host)

    def empty_output(self, handle: Handle, dtype: torch.dtype) -> torch.Tensor:
        return allocate(self._end.device, (*handle.shape, self._end.hidden), dtype, self._end.account.__str__)
