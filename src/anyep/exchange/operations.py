"""What a buffer's calls become: operations on the memory in which its tensors lie, a host's or a device's."""

from __future__ import annotations

from typing import Protocol

import torch

from anyep.exchange import outgoing as sending
from anyep.exchange import returning
from anyep.exchange.barrier import Barrier
from anyep.exchange.combine import Combine
from anyep.exchange.dispatch import Dispatch
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.event import Operation
from anyep.exchange.handle import Combined, Handle, Received
from anyep.layout.trace_file import TraceRecorder


class Operations(Protocol):
    """Checks what a caller passes and returns what is to be done; exchanges nothing. Arguments: :class:`anyep.Buffer`.

    ``buffer`` is the identity of the buffer that calls.
    """

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
    ) -> Operation[Received]: ...

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
    ) -> Operation[torch.Tensor | Combined]: ...

    def barrier(self) -> Operation[None]: ...

    def empty_output(self, handle: Handle, dtype: torch.dtype) -> torch.Tensor: ...


class HostOperations:
    """On CPU tensors."""

    def __init__(self, end: Endpoint) -> None:
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
        if handle is not None:
            outgoing = sending.prepare_cached(self._end, x, topk_idx, topk_weights, handle)
        else:
            outgoing = sending.prepare(self._end, x, topk_idx, topk_weights, layout=layout, expert_rows=expert_rows)
        return Dispatch(self._end, outgoing, buffer=buffer, recorder=recorder, early=early)

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
        return Combine(self._end, back)

    def barrier(self) -> Operation[None]:
        return Barrier(self._end)

    def empty_output(self, handle: Handle, dtype: torch.dtype) -> torch.Tensor:
        return returning.empty_output(self._end, handle, dtype)


def operations_on(end: Endpoint) -> Operations:
    """Return the operations of an endpoint's kind."""
    from anyep.exchange.device.endpoint import DeviceEndpoint
    from anyep.exchange.device.operations import DeviceOperations
    from anyep.exchange.device.staged import StagedEndpoint, StagedOperations

    if isinstance(end, StagedEndpoint):
        return StagedOperations(end)
    return DeviceOperations(end) if isinstance(end, DeviceEndpoint) else HostOperations(end)
