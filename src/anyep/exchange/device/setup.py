"""From a caller's arguments to endpoints on devices: check, agree, meet, allocate."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import numpy as np
import torch

from anyep.errors import CapacityError, Unavailable
from anyep.exchange import setup as host
from anyep.exchange.device.boards import Boards
from anyep.exchange.device.devices import Device
from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.explain import explain_device
from anyep.exchange.device.faults import Faults, limits_of
from anyep.exchange.device.meeting import (
    SYMMETRIC,
    Ground,
    addresses,
    common_ground,
    find,
    order_on,
    own_ground,
    shares_device,
    tell,
)
from anyep.exchange.device.slots import Slots, slot_rule
from anyep.exchange.device.staged_setup import TRANSPORTS, open_staged_endpoint, spans_hosts
from anyep.exchange.endpoint import Endpoint, ExpertTables
from anyep.exchange.ledger import LedgerShape
from anyep.exchange.options import PRIVATE, BufferOptions
from anyep.exchange.workers import Workers
from anyep.kernels.spec_device import NUM_PLACES, SUMMARY_WORDS
from anyep.layout.placement import Placement
from anyep.layout.regions import MemoryAccount
from anyep.transport.inprocess import Member
from anyep.transport.liveness import blame_for
from anyep.transport.registry import open_transport
from anyep.transport.rendezvous import Rendezvous
from anyep.transport.together import together


def open_device_endpoint(rendezvous: Rendezvous, options: BufferOptions) -> host.Opened:
    """Collective. A rank that cannot take part makes every rank raise, and is named."""
    found: list[Device] = []

    def act() -> dict[str, str]:
        options.check()
        options.place_experts(rendezvous.size)
        _check_what_devices_do(options)
        shared = shares_device(rendezvous, options)
        if rendezvous.rank == 0 or not shared:
            found.append(find(options, rendezvous.size, rendezvous.size if shared and options.concurrent else 1))
        host.load_books()
        told = {name: repr(value) for name, value in asdict(options).items() if name not in PRIVATE}
        return told if shared else told | {"device": "one for each rank"}

    host.check_equal(rendezvous.rank, together(rendezvous, act, what="make its buffer"))
    if spans_hosts(rendezvous, options):
        return open_staged_endpoint(rendezvous, options, found)
    account = device_account(options, rendezvous.size, rendezvous.rank)
    if shares_device(rendezvous, options):
        assert isinstance(rendezvous, Member)
        ground = common_ground(rendezvous, found[0] if found else None, options)
        together(rendezvous, lambda: _check_room(ground.device, account), what="make its buffer")
    else:
        together(rendezvous, lambda: _check_heap(found[0], account), what="make its buffer")
        ground = own_ground(rendezvous, found[0], account.heap_bytes)
    return _open(rendezvous, options, ground, account)


def _check_what_devices_do(options: BufferOptions) -> None:
    if options.make_wire().by_column:
        raise Unavailable(f"wire={options.wire!r} goes with CPU tensors; a device has bf16, fp16, fp32 and fp8")
    if options.record is not None:
        raise Unavailable("record goes with CPU tensors; a device's routing does not come to the host")
    if options.transport not in TRANSPORTS:
        raise Unavailable(
            f"transport={options.transport!r} moves CPU tensors; with device=... use 'auto', 'inprocess' or "
            f"{SYMMETRIC!r}, or between hosts 'gloo' or 'nixl'"
        )


def device_account(options: BufferOptions, num_ranks: int, rank: int) -> MemoryAccount:
    """Add up the memory of one rank: boards, slots and tables at once, all else as steps need it.

    Where others must reach what is allocated, a heap stands for it: ``arena_bytes``, or two balanced steps.
    """
    on_host = replace(options, eager_bytes=0, arena_bytes=0).account(num_ranks, rank)
    placement = options.place_experts(num_ranks)
    boards = Boards.bytes_of(num_ranks, placement.num_experts, options.ring)
    tensors = 2 * on_host.step.balanced_bytes if options.arena_bytes is None else options.arena_bytes
    slots = options.ring * num_ranks * slot_rule(options, num_ranks).slot_bytes
    return replace(
        on_host,
        control_bytes=boards,
        eager_bytes=slots,
        committed_bytes=boards + slots,
        heap_bytes=2 * boards + slots + tensors + (1 << 20),
    )


def _check_room(device: Device, account: MemoryAccount) -> None:
    """Raise CapacityError where not even a balanced step has room on the device."""
    free = device.free_bytes()
    if free < account.committed_bytes + account.step.balanced_bytes:
        raise CapacityError(f"{device.where} has {free / 2**30:.3f} GiB free, too little for this buffer: {account}")


def _check_heap(device: Device, account: MemoryAccount) -> None:
    """Raise CapacityError where the device has no room for what other ranks map, which holds all but small tables."""
    free, gib = device.free_bytes(), 2**30
    if free < account.heap_bytes:
        raise CapacityError(
            f"{device.where} has {free / gib:.3f} GiB free, too little for a heap of {account.heap_bytes / gib:.3f} "
            f"GiB that other ranks map (arena_bytes decides over it) of this buffer: {account}"
        )


def _open(rendezvous: Rendezvous, options: BufferOptions, ground: Ground, account: MemoryAccount) -> host.Opened:
    """Open the lanes and put boards and tables on the device. Collective."""
    plain = replace(options, eager_bytes=0, arena_bytes=0)
    opened = open_transport(
        rendezvous,
        transport="inprocess" if isinstance(rendezvous, Member) else "shm",
        lanes=plain.lanes(rendezvous.size).all(),
        ring=plain.ring,
        heap_bytes=0,
        timeout_s=plain.timeout_s,
    )
    try:
        base = host.endpoint_on(opened.transport, ground.device.kernels, plain.lanes(rendezvous.size), plain)
        endpoint = _on_device(base, rendezvous, options, ground, account)
    except BaseException as error:
        opened.transport.leave(blame_for(error, rendezvous.rank, opened.transport.holders))
        opened.transport.close()
        raise
    return host.Opened(
        endpoint=endpoint,
        explanation=explain_device(
            endpoint, opened.reason, slot_rule(options, rendezvous.size).reason, options.num_sms
        ),
    )


def _on_device(
    base: Endpoint, rendezvous: Rendezvous, options: BufferOptions, ground: Ground, account: MemoryAccount
) -> DeviceEndpoint:
    device, reach, ranks = ground.device, ground.reach, rendezvous.size
    boards = Boards(device, reach, ranks, base.placement.num_experts, options.ring)
    boards.meet(rendezvous.rank, addresses(rendezvous, reach, reach.place(boards.memory)))
    slots = _slots_on(ground, rendezvous, options, account)
    limits = limits_of(
        num_topk=options.num_topk,
        num_experts=options.num_experts,
        num_ranks=ranks,
        max_tokens=options.max_tokens_per_rank,
        static_rows=options.static_rows,
        timeout_s=options.timeout_s,
    )
    faults = Faults(device, ground.stream, limits, ranks)
    order = order_on(ground, rendezvous, boards, faults, options.timeout_s)
    owner, local = (
        torch.from_numpy(np.ascontiguousarray(table)).to(device.where)
        for table in (base.placement.expert_rank_E, base.placement.expert_local_E)
    )
    bases = torch.tensor(reach.base_R, dtype=torch.int64, device=device.where)
    inherited = {field.name: getattr(base, field.name) for field in fields(base)}
    tables = ExpertTables(rank_addr=owner.data_ptr(), local_addr=local.data_ptr(), kept=base.tables.kept)
    workers = Workers(1)  # a device has no use for threads
    lasting = (*boards.tensors(), *order.tensors(), owner, local, bases)
    lasting += () if slots is None else slots.tensors()
    for tensor in lasting:
        device.lend(tensor, ground.stream)  # which may be at work when the buffer is closed, and these are freed
    endpoint = DeviceEndpoint(
        **inherited | {"tables": tables, "workers": workers},
        device=device,
        stream=ground.stream,
        order=order,
        offers=ground.offers,
        boards=boards,
        reach=reach,
        padded_slots=slots,
        base_addr=bases.data_ptr(),
        account=account,
        faults=faults,
        owner_E=owner,
        kept=lasting,
    )
    device.expect_fetches(_most_words(base.placement, rendezvous.rank), 2 + options.max_in_flight)
    device.fetch(boards.memory[:1]).wait()  # what others write to is zeroed, and tables are there, on whatever stream
    tell(rendezvous, 0)
    return endpoint


def _slots_on(ground: Ground, rendezvous: Rendezvous, options: BufferOptions, account: MemoryAccount) -> Slots | None:
    """Make slots, if there shall be any. Collective; CapacityError on every rank where one has no room."""
    rule, reach = slot_rule(options, rendezvous.size), ground.reach
    if not rule.slot_bytes:
        return None
    made: list[Slots] = []

    def act() -> int | None:
        sizes = (rendezvous.size, options.ring, rule.slot_bytes)
        made.append(Slots(ground.device, ground.stream, reach, *sizes, account.__str__))
        return reach.place(made[0].memory)

    places = together(rendezvous, act, what="make its buffer")
    made[0].meet(rendezvous.rank, [base + place for base, place in zip(reach.base_R, places, strict=True)])
    return made[0]


def _most_words(placement: Placement, rank: int) -> int:
    """Return the size of the largest record of a plan, in words of 8 bytes."""
    shape = LedgerShape(placement, rank, by_expert=True, alignment=1, block_rows=1, static_rows=-1)
    return SUMMARY_WORDS + 1 + NUM_PLACES * placement.num_ranks + shape.num_words // 2
