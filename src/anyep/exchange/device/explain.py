"""What was chosen for a buffer on a device, and why."""

from __future__ import annotations

from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.explain import Choice, Explanation


def explain_device(end: DeviceEndpoint, transport_reason: str, slots_reason: str, asked_sms: int | None) -> Explanation:
    """Describe an endpoint that has just been opened. ``asked_sms``: the caller's ``num_sms``."""
    counts = "static_rows was given" if end.static_rows is not None else "without static_rows; layout='padded' does not"
    waits = "never" if end.static_rows is not None else "once in a dispatch, for the number of rows"
    wire, scale = end.wire, end.wire.scale_format
    choices = (
        Choice(topic="device", chosen=str(end.where), reason="tensors of another device are refused"),
        Choice(topic="mode", chosen="every row straight to its final place", reason=end.reach.why),
        Choice(topic="padded rows", chosen=_when(end), reason=slots_reason),
        _order(end),
        _multiprocessors(end, asked_sms),
        Choice(topic="host waits", chosen=waits, reason=counts),
        Choice(topic="transport", chosen=end.transport.name, reason=f"for headers; {transport_reason}"),
        Choice(
            topic="wire",
            chosen=wire.name,
            reason=f"{wire.row_bytes} bytes a row, " + ("no scales" if scale is None else f"scales {scale.name}"),
        ),
        Choice(topic="kernels", chosen=end.device.kernels.name, reason="what device memory is worked on with"),
    )
    return Explanation(choices=choices, memory=end.account)


def _when(end: DeviceEndpoint) -> str:
    if end.padded_slots is None:
        return "leave when the batch is awaited, straight to their final place"
    return "leave with the announcement, to slots at each receiver, who makes its blocks of them"


def _order(end: DeviceEndpoint) -> Choice:
    if end.order.is_concurrent:
        return Choice(
            topic="order", chosen="concurrent", reason="asked for: each rank has a stream and waits for words"
        )
    return Choice(topic="order", chosen="phase-split", reason="all ranks launch on one stream, so that nothing waits")


def _multiprocessors(end: DeviceEndpoint, asked: int | None) -> Choice:
    most, topic = end.device.num_sms, "multiprocessors"
    if most is None:
        return Choice(topic=topic, chosen="all, a program a token", reason="one rank moves rows on a device at a time")
    reason = "ranks of a device move rows at a time: an equal share for each" if asked is None else "num_sms was given"
    return Choice(topic=topic, chosen=f"{most} for each kernel that moves rows", reason=reason)
