"""From a caller's arguments to the endpoint of a device between hosts."""

from __future__ import annotations

from dataclasses import fields, replace

from anyep.errors import CapacityError
from anyep.exchange import setup as host
from anyep.exchange.device.devices import Device
from anyep.exchange.device.meeting import SYMMETRIC
from anyep.exchange.device.pinned import NUM_SLOTS, SLOT_BYTES, Passage
from anyep.exchange.device.quantised import Quantiser
from anyep.exchange.device.staged import StagedEndpoint
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.explain import Choice, Explanation
from anyep.exchange.options import BufferOptions
from anyep.layout.regions import MemoryAccount
from anyep.transport.inprocess import Member
from anyep.transport.liveness import blame_for
from anyep.transport.registry import NETWORKED, find_hosts
from anyep.transport.rendezvous import Rendezvous
from anyep.transport.together import together

TRANSPORTS = ("auto", "inprocess", SYMMETRIC, *NETWORKED[1:])
"""Those of a device; engines count where there are several hosts."""


def spans_hosts(rendezvous: Rendezvous, options: BufferOptions) -> bool:
    """Return whether ranks live on several hosts, or play to, and may be joined by an engine. Collective."""
    return options.transport in NETWORKED and find_hosts(rendezvous)[0].num_hosts > 1


def open_staged_endpoint(rendezvous: Rendezvous, options: BufferOptions, found: list[Device]) -> host.Opened:
    """Collective. ``found``: this rank's device, or none for threads that use rank 0's."""
    device: Device = rendezvous.exchange(found)[0][0] if isinstance(rendezvous, Member) else found[0]
    on_host = replace(options, device=None, kernels="cpu", num_sms=None, concurrent=False)
    made: list[Passage] = []

    def prepare() -> None:
        made.append(Passage(device, device.new_stream(), SLOT_BYTES))
        _check_room(device, on_host.account(rendezvous.size, rendezvous.rank))

    together(rendezvous, prepare, what="make its buffer")
    opened = host.open_endpoint(rendezvous, on_host)
    try:
        return _beside(opened, device, made[0])
    except BaseException as error:
        opened.endpoint.transport.leave(blame_for(error, rendezvous.rank, opened.endpoint.transport.holders))
        opened.endpoint.transport.close()
        raise


def _check_room(device: Device, account: MemoryAccount) -> None:
    """Raise CapacityError where not even a balanced step has room on the device."""
    free = device.free_bytes()
    if free < account.step.balanced_bytes:
        raise CapacityError(f"{device.where} has {free / 2**30:.3f} GiB free, too little for this buffer: {account}")


def _beside(opened: host.Opened, device: Device, passage: Passage) -> host.Opened:
    """Give an endpoint of the host a device."""
    base = opened.endpoint
    account = replace(opened.explanation.memory, pinned_bytes=passage.num_bytes)
    quantises = base.wire.scale_format is not None
    endpoint = StagedEndpoint(
        **{field.name: getattr(base, field.name) for field in fields(base)},
        host=base,
        device=device,
        stream=passage.stream,
        passage=passage,
        quantiser=Quantiser(device, passage, base, account) if quantises else None,
        account=account,
    )
    choices = (*_choices(endpoint), *opened.explanation.choices)
    return host.Opened(endpoint=endpoint, explanation=Explanation(choices=choices, memory=account))


def _choices(end: StagedEndpoint) -> list[Choice]:
    down, up, back, sums = pcie_bytes(end)
    quantised = "" if end.quantiser is None else ", quantised by the device before"
    return [
        Choice(topic="device", chosen=str(end.where), reason="tensors of another device are refused"),
        Choice(
            topic="between hosts",
            chosen=f"rows pass through {NUM_SLOTS} slots of pinned host memory, {end.account.pinned_bytes >> 20} MiB",
            reason="forwarders route and write rows in their host's memory, from where the engine sends",
        ),
        Choice(topic="GPU memory", chosen="not registered with the network", reason=_offered(end.transport.describe())),
        Choice(
            topic="to the device",
            chosen=f"dispatch: {down} bytes a token to the host{quantised}, {up} bytes a received row to the device",
            reason=f"combine: {back} bytes a row to the host, {sums} bytes a token to the device; and weights, biases",
        ),
        Choice(
            topic="host waits",
            chosen="in every call",
            reason="for inputs to be in its memory, and then for other ranks; no call can be captured in a graph",
        ),
    ]


def _offered(facts: dict[str, str]) -> str:
    """Say what the engine would take."""
    kinds = facts.get("ucx memory")
    if kinds is None:
        return "the engine carries host memory alone"
    return f"nothing here sends from it; UCX names {kinds}, and anyep doctor tries whether it carries a GPU's"


def pcie_bytes(end: Endpoint) -> tuple[int, int, int, int]:
    """Return the bytes that cross to the host a token of dispatch, and back a received row; and so of combine.

    Without top-k weights, which are 4 K bytes more each time, and with topk_idx of 8 bytes.
    """
    row, routing = end.wire.row_bytes + end.wire.scale_bytes, 8 * end.num_topk
    summed = end.hidden * end.wire.output_dtype.itemsize
    return row + routing, row + routing, summed, summed
