"""A buffer's calls on CUDA tensors."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch

from anyep.errors import CapacityError, Unavailable
from anyep.exchange import outgoing as sending
from anyep.exchange import returning
from anyep.exchange.barrier import Barrier
from anyep.exchange.device.combine import DeviceCombine
from anyep.exchange.device.dispatch import DeviceDispatch
from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.order import Turn
from anyep.exchange.device.plan import make_plan
from anyep.exchange.event import Operation
from anyep.exchange.handle import Combined, Handle, Received
from anyep.exchange.opening import RefusedError
from anyep.layout.trace_file import TraceRecorder


class DeviceOperations:
    """:class:`~anyep.exchange.operations.Operations` on a device."""

    def __init__(self, end: DeviceEndpoint) -> None:
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
        self._end.faults.look()
        if expert_rows is not None:
            raise Unavailable("expert_rows goes with CPU tensors; on a device topk_idx is counted")
        if handle is not None:
            out = sending.prepare_cached(self._end, x, topk_idx, topk_weights, handle)
        else:
            self._check_capture(layout)
            make = partial(make_plan, topk_weights=cast("torch.Tensor | None", topk_weights))  # it is checked first
            out = sending.prepare(self._end, x, topk_idx, topk_weights, layout=layout, make=make)
        return DeviceDispatch(self._end, out, buffer=buffer)

    def _check_capture(self, layout: str) -> None:
        """Raise Unavailable where a graph is recorded and the host would have to wait for counts."""
        if self._end.device.capturing() and self._end.static_rows is None and layout != "padded":
            raise Unavailable(
                f"a graph is being captured, and layout={layout!r} without static_rows waits for the number of rows: "
                "make the buffer with static_rows, or use layout='padded' or a handle"
            )

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
        self._end.faults.look()
        if group:
            raise Unavailable("group sums ranks of hosts, and a device's ranks are on one; leave group out")
        back = returning.prepare(
            self._end,
            y,
            handle,
            topk_weights=topk_weights,
            bias=bias,
            out=out,
            reduce=reduce,
            wire=wire,
        )
        return DeviceCombine(self._end, back)

    def barrier(self) -> Operation[None]:
        if self._end.device.capturing():
            raise Unavailable(
                "a graph is being captured, and a barrier waits for the device: call it outside of graphs"
            )
        return DeviceBarrier(self._end)

    def empty_output(self, handle: Handle, dtype: torch.dtype) -> torch.Tensor:
        shape = (*handle.shape, self._end.hidden)
        return self._end.reach.room(shape, dtype, self._end.account.__str__)


class DeviceBarrier(Barrier):
    """A barrier after which all that was launched is done, and what went wrong in it is said."""

    def __init__(self, end: DeviceEndpoint) -> None:
        super().__init__(end)
        self._device_end = end

    def post(self, epoch: int) -> None:
        """Tell every rank."""
        self._device_end.order.pass_by(Turn(epoch, 0))
        super().post(epoch)

    def finish(self) -> None:
        """Wait for every rank and for the device. Raises what an earlier call could not."""
        super().finish()
        try:
            self._device_end.faults.settle()
        except (CapacityError, ValueError) as error:
            raise RefusedError(error) from None
