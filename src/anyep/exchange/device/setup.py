"""From a caller's arguments to endpoints on a device: check, find the device once for all ranks, meet, allocate."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch

from anyep.errors import CapacityError, Unavailable
from anyep.exchange import setup as host
from anyep.exchange.device import devices
from anyep.exchange.device.boards import Boards
from anyep.exchange.device.concurrent import Concurrent
from anyep.exchange.device.devices import Device, Stream
from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.explain import explain_device
from anyep.exchange.device.faults import Faults, Limits
from anyep.exchange.device.order import Order, PhaseSplit
from anyep.exchange.endpoint import Endpoint, ExpertTables
from anyep.exchange.options import PRIVATE, BufferOptions
from anyep.exchange.workers import Workers
from anyep.layout.regions import MemoryAccount
from anyep.transport.inprocess import Member
from anyep.transport.liveness import blame_for
from anyep.transport.registry import open_transport
from anyep.transport.rendezvous import Rendezvous
from anyep.transport.together import together


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """What ranks of one process share: the device, one stream, and the order of their halves."""

    device: Device
    stream: Stream
    order: PhaseSplit


def _order_of(
    device: Device, stream: Stream, boards: Boards, member: Member, shared: Shared, faults: Faults, timeout_s: float
) -> Order:
    """Return the order of halves on ``stream``: that of all ranks, or this rank's own. Collective."""
    if stream is shared.stream:
        return shared.order
    order = Concurrent(
        device, stream, boards, member.rank, limit=device.looks_in(timeout_s), late_addr=faults.late_addr
    )
    order.meet(member.exchange(order.first_addr))
    return order


def open_device_endpoint(rendezvous: Rendezvous, options: BufferOptions) -> host.Opened:
    """Collective. A rank that cannot take part makes every rank raise, and is named."""
    found: list[Device] = []

    def act() -> dict[str, str]:
        options.check()
        options.place_experts(rendezvous.size)
        _check_what_devices_do(options)
        if not isinstance(rendezvous, Member):
            raise Unavailable(
                "CUDA tensors need ranks that are members of anyep.local_group(R), which share one GPU; between "
                "processes CPU tensors are exchanged"
            )
        if rendezvous.rank == 0:
            found.append(_find(options, rendezvous.size))
        host.load_books()
        return {name: repr(value) for name, value in asdict(options).items() if name not in PRIVATE}

    host.check_equal(rendezvous.rank, together(rendezvous, act, what="make its buffer"))
    assert isinstance(rendezvous, Member)
    mine = Shared(device=found[0], stream=found[0].new_stream(), order=PhaseSplit(rendezvous.size)) if found else None
    shared: Shared = rendezvous.exchange(mine)[0]
    account = device_account(options, rendezvous.size, rendezvous.rank)
    together(rendezvous, lambda: _check_room(shared.device, account), what="make its buffer")
    return _open(rendezvous, options, shared, account)


def _check_what_devices_do(options: BufferOptions) -> None:
    if options.make_wire().by_column:
        raise Unavailable(f"wire={options.wire!r} goes with CPU tensors; a device has bf16, fp16, fp32 and fp8")
    if options.record is not None:
        raise Unavailable("record goes with CPU tensors; a device's routing does not come to the host")
    if options.transport not in ("auto", "inprocess"):
        raise Unavailable(
            f"transport={options.transport!r} moves CPU tensors; with device=... use 'auto' or 'inprocess'"
        )


def _find(options: BufferOptions, num_ranks: int) -> Device:
    """Load the device and its kernels; Unavailable where it lacks what the wire needs."""
    assert options.device is not None
    device = devices.find_device(options.device, options.num_sms, num_ranks if options.concurrent else 1)
    if options.wire == "fp8":
        device.check_fp8()
    return device


def device_account(options: BufferOptions, num_ranks: int, rank: int) -> MemoryAccount:
    """Add up the memory of one rank: boards and tables at once, all else from torch's allocator as steps need it."""
    on_host = replace(options, eager_bytes=0, arena_bytes=0).account(num_ranks, rank)
    placement = options.place_experts(num_ranks)
    boards = Boards.bytes_of(num_ranks, placement.num_experts, options.ring)
    return replace(on_host, control_bytes=boards, committed_bytes=boards, heap_bytes=0)


def _check_room(device: Device, account: MemoryAccount) -> None:
    """Raise CapacityError where not even a balanced step has room on the device."""
    free = device.free_bytes()
    if free < account.committed_bytes + account.step.balanced_bytes:
        raise CapacityError(f"{device.where} has {free / 2**30:.3f} GiB free, too little for this buffer: {account}")


def _open(member: Member, options: BufferOptions, shared: Shared, account: MemoryAccount) -> host.Opened:
    """Open the lanes and put boards and tables on the device. Collective."""
    plain = replace(options, eager_bytes=0, arena_bytes=0)
    opened = open_transport(
        member,
        transport="inprocess",
        lanes=plain.lanes(member.size).all(),
        ring=plain.ring,
        heap_bytes=0,
        timeout_s=plain.timeout_s,
    )
    try:
        base = host.endpoint_on(opened.transport, shared.device.kernels, plain.lanes(member.size), plain)
        endpoint = _on_device(base, member, options, shared, account)
    except BaseException as error:
        opened.transport.leave(blame_for(error, member.rank))
        opened.transport.close()
        raise
    return host.Opened(endpoint=endpoint, explanation=explain_device(endpoint, opened.reason))


def _on_device(
    base: Endpoint, member: Member, options: BufferOptions, shared: Shared, account: MemoryAccount
) -> DeviceEndpoint:
    device, ranks, experts = shared.device, member.size, base.placement.num_experts
    boards = Boards(device, ranks, experts, options.ring)
    boards.meet(member.rank, member.exchange(boards.first_addr))
    owner, local = (
        torch.from_numpy(np.ascontiguousarray(table)).to(device.where)
        for table in (base.placement.expert_rank_E, base.placement.expert_local_E)
    )
    bases = torch.zeros(ranks, dtype=torch.int64, device=device.where)
    limits = Limits(
        num_topk=options.num_topk,
        num_experts=experts,
        static_rows=-1 if options.static_rows is None else options.static_rows,
        block_rows=ranks * options.max_tokens_per_rank,
        timeout_s=options.timeout_s,
    )
    stream = device.new_stream() if options.concurrent else shared.stream
    faults = Faults(device, stream, limits, ranks)
    order = _order_of(device, stream, boards, member, shared, faults, options.timeout_s)
    inherited = {field.name: getattr(base, field.name) for field in fields(base)}
    tables = ExpertTables(rank_addr=owner.data_ptr(), local_addr=local.data_ptr(), kept=base.tables.kept)
    workers = Workers(1)  # a device has no use for threads
    endpoint = DeviceEndpoint(
        **inherited | {"tables": tables, "workers": workers},
        device=device,
        stream=stream,
        order=order,
        boards=boards,
        base_addr=bases.data_ptr(),
        account=account,
        faults=faults,
        kept=(owner, local, bases),
    )
    # tables were written on this thread's stream, and all ranks' exchange may begin on another
    device.follow(stream, device.mark(device.current_stream()))
    member.exchange(None)
    return endpoint
