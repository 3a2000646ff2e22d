"""How ranks meet on devices: all on one, in this process, or each on its own, with memory that the others map."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from anyep.exchange.device import devices
from anyep.exchange.device.boards import Boards
from anyep.exchange.device.concurrent import Concurrent
from anyep.exchange.device.devices import Device, Stream
from anyep.exchange.device.faults import Faults
from anyep.exchange.device.offers import Offers
from anyep.exchange.device.order import Order, PhaseSplit
from anyep.exchange.device.reach import OneDevice, OwnDevices, Reach
from anyep.exchange.options import BufferOptions
from anyep.transport import cuda_symmetric
from anyep.transport.inprocess import Member
from anyep.transport.rendezvous import Rendezvous

SYMMETRIC = "cuda_symmetric"


@dataclass(frozen=True, kw_only=True, eq=False)
class Ground:
    """What one rank stands on. ``order`` is None where each rank has its own; ``offers`` are of all this process's."""

    device: Device
    reach: Reach
    stream: Stream
    order: PhaseSplit | None
    offers: Offers


def shares_device(rendezvous: Rendezvous, options: BufferOptions) -> bool:
    """Return whether ranks are threads that share one device, and not processes with one each."""
    return isinstance(rendezvous, Member) and options.transport != SYMMETRIC


def find(options: BufferOptions, num_ranks: int, at_once: int) -> Device:
    """Load a device and its kernels; Unavailable where it lacks what the wire needs."""
    assert options.device is not None
    most_local = int(options.place_experts(num_ranks).experts_per_rank_R.max())
    device = devices.find_device(options.device, options.num_sms, at_once, (options.num_topk, num_ranks, most_local))
    if options.wire == "fp8":
        device.check_fp8()
    return device


def common_ground(member: Member, device: Device | None, options: BufferOptions) -> Ground:
    """Stand on the first rank's device, and on its stream unless each has its own. Collective."""
    mine = None
    if device is not None:
        mine = Ground(
            device=device,
            reach=OneDevice(device, member.size),
            stream=device.new_stream(),
            order=PhaseSplit(member.size),
            offers=Offers(),
        )
    ground: Ground = member.exchange(mine)[0]
    if not options.concurrent:
        return ground
    return replace(ground, stream=ground.device.new_stream(), order=None)


def own_ground(rendezvous: Rendezvous, device: Device, heap_bytes: int) -> Ground:
    """Stand on this rank's device, and map a heap of every other's. Collective."""
    most = max(tell(rendezvous, heap_bytes))
    heap = cuda_symmetric.open_heap(rendezvous, most, device.where)
    reach = OwnDevices(device, heap)
    return Ground(device=device, reach=reach, stream=device.new_stream(), order=None, offers=Offers())


def tell(rendezvous: Rendezvous, number: int) -> list[int]:
    """Return every rank's number. Collective."""
    return [int(json.loads(item)) for item in rendezvous.allgather(json.dumps(number).encode())]


def addresses(rendezvous: Rendezvous, reach: Reach, place: int | None) -> list[int]:
    """Return where every rank's memory begins here, given this rank's place. Collective."""
    assert place is not None, "what ranks write to lies where they can reach it"
    return [base + there for base, there in zip(reach.base_R, tell(rendezvous, place), strict=True)]


def order_on(ground: Ground, rendezvous: Rendezvous, boards: Boards, faults: Faults, timeout_s: float) -> Order:
    """Return the order of halves: that of all ranks, or this rank's own. Collective."""
    if ground.order is not None:
        return ground.order
    device = ground.device
    order = Concurrent(
        device,
        ground.reach,
        ground.stream,
        boards,
        rendezvous.rank,
        limit=device.looks_in(timeout_s),
        late_addr=faults.late_addr,
    )
    order.meet(addresses(rendezvous, ground.reach, ground.reach.place(order.words)))
    return order
