"""Padded batches whose rows arrive in slots with their announcement: they have left when the first half is over."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import anyep
from anyep.errors import CapacityError
from anyep.exchange.device.setup import device_account
from anyep.exchange.device.slots import slot_rule
from anyep.exchange.options import BufferOptions
from anyep.exchange.wire import make_wire
from anyep.testing.lazy_device import LazyDevice
from anyep.testing.pretend_device import PretendDevice, pretended
from tests.exchange.rounds import check, open_buffer, play
from tests.gpu.exchanged import WAYS, draw

R, T = 2, 6
SIZES = {"hidden": 8, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": T, "wire": "fp32"}
IDX = [[0, 3], [1, 0], [-1, 2], [3, 3], [-1, -1], [2, 0]]
PADDED = [seed for seed, (layout, _) in enumerate(WAYS) if layout == "padded"]
NO_SLOTS = {"eager_bytes": 0}


def dispatch_and_overwrite(device, member, everybody, *, cached, **options):
    """Return what arrives of tokens that are overwritten between the halves, and what would without."""
    x, idx = torch.arange(T * 8.0).view(T, 8) + 100 * member.rank, torch.tensor(IDX)
    with anyep.Buffer(member, **SIZES, device="cuda", **options) as ep:
        right = ep.dispatch(x, idx, layout="padded")
        how = {"handle": right.handle} if cached else {"layout": "padded"}
        pending = ep.dispatch(x, None if cached else idx, **how, wait=False)
        everybody.wait()
        stream = ep._end.stream
        device.run(device.mark(stream))
        assert stream.next is None, "between the halves nothing of the exchange is on the device"
        everybody.wait()
        x.fill_(-1)
        return filled(pending.wait()), filled(right)


def filled(received):
    counts = list(received.counts)
    return [
        (block[:count].tolist(), token[:count].tolist())
        for block, token, count in zip(received.x, received.source_token, counts, strict=True)
    ]


def on_ranks(seed, **options):
    everybody = threading.Barrier(R)
    with pretended(LazyDevice(seed)) as device:
        return anyep.local_group(R).run(lambda member: dispatch_and_overwrite(device, member, everybody, **options))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("concurrent", [False, True])
def test_rows_have_left_before_anybody_waits(concurrent, cached):
    for seed in range(3):
        for arrived, right in on_ranks(seed, concurrent=concurrent, cached=cached):
            assert arrived == right
            assert sum(len(tokens) for _, tokens in right) > 0


@pytest.mark.parametrize("concurrent", [False, True])
def test_without_slots_they_have_not(concurrent):
    """A test of the test."""
    assert all(one != right for one, right in on_ranks(0, concurrent=concurrent, cached=False, **NO_SLOTS))


@pytest.mark.parametrize("seed", PADDED)
@pytest.mark.parametrize("concurrent", [False, True])
def test_with_and_without_slots_every_byte_is_right(seed, concurrent):
    case = replace(draw(seed), num_tokens=(6, 0, 5))

    def rank_main(member, **options):
        with open_buffer(case, member, device="cuda", concurrent=concurrent, **options) as ep:
            assert (ep._end.padded_slots is None) == (options == NO_SLOTS)
            return play(case, ep)

    for options in ({}, NO_SLOTS):
        with pretended(LazyDevice(seed)):
            check(case, anyep.local_group(3).run(lambda member, options=options: rank_main(member, **options)))


@pytest.mark.parametrize("concurrent", [False, True])
def test_slots_come_round_when_nobody_reads_them_any_more(concurrent):
    """Operations in flight and barriers between them, some with nothing to send."""
    idx = torch.tensor(IDX)

    def rank_main(member):
        options = {**SIZES, "max_in_flight": 2, "device": "cuda", "concurrent": concurrent}
        with anyep.Buffer(member, **options) as ep:
            xs = [torch.full((T, 8), 10.0 * turn + member.rank) for turn in range(9)]
            late, sums = None, []
            for turn, x in enumerate(xs):
                tokens = T if (turn + member.rank) % 3 else 0
                pending = ep.dispatch(x[:tokens], idx[:tokens], layout="padded", wait=False)
                for one in (late, pending) if turn % 2 else ():
                    received = one.wait()
                    sums.append(ep.combine(received.x, received.handle))
                late = pending
                if turn % 4 == 3:
                    ep.barrier()
            last = late.wait()
            sums.append(ep.combine(last.x, last.handle))
            expected = [(idx >= 0).sum(dim=1)[:, None] * x for x in xs]
            return all(torch.equal(one, right[: len(one)]) for one, right in zip(sums, expected, strict=True))

    for seed in range(4):
        with pretended(LazyDevice(seed)):
            assert anyep.local_group(R).run(rank_main) == [True] * R


@pytest.mark.parametrize("concurrent", [False, True])
def test_nothing_is_made_of_the_rows_of_a_refused_batch(concurrent, monkeypatch):
    """Its blocks are too small for them: also a handle of it must not bring them."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: poison(empty(*shape, **options)))
    idx = torch.full((T, 2), 3)
    x = torch.ones(T, 8)

    def rank_main(member):
        with anyep.Buffer(member, **SIZES, device="cuda", concurrent=concurrent) as ep:
            refused = ep.dispatch(x, idx, layout="padded")
            assert list(refused.counts) == [0, 0]
            assert untouched(refused)
            with pytest.raises(CapacityError, match="names one expert twice"):
                ep.barrier()
            assert untouched(ep.dispatch(x, None, handle=refused.handle))
            good = ep.dispatch(x, torch.tensor(IDX), layout="padded")
            return sum(good.counts)

    with pretended(LazyDevice(0)):
        assert sum(anyep.local_group(R).run(rank_main)) == R * sum(one >= 0 for pair in IDX for one in pair)


def poison(tensor):
    tensor.view(torch.uint8).fill_(0xFF) if tensor.numel() else None
    return tensor


def untouched(received):
    return bool((received.x.view(torch.uint8) == 0xFF).all()) and bool((received.source_token == -1).all())


def options_with(**changed):
    sizes = {"hidden": 7168, "num_experts": 256, "num_topk": 8, "max_tokens_per_rank": 128, "wire": "fp8"}
    return BufferOptions(**{**sizes, "device": "cuda", "kernels": "gpu", **changed})


def test_slots_are_in_the_account_and_are_made_where_they_are_small_or_asked_for():
    pair = 128 * (7168 + 4 * 56 + 8 * 8 + 4)
    decode = options_with()
    assert slot_rule(decode, 8).slot_bytes == pair
    account = device_account(decode, 8, 0)
    assert account.eager_bytes == 8 * 8 * pair
    assert account.committed_bytes == account.control_bytes + account.eager_bytes
    assert slot_rule(options_with(eager_bytes=pair - 1), 8).slot_bytes == 0
    assert slot_rule(options_with(eager_bytes=pair), 8).slot_bytes == pair
    assert slot_rule(options_with(eager_bytes=2 * pair), 8).slot_bytes == 2 * pair, "variants may have larger rows"
    prefill = options_with(max_tokens_per_rank=4096)
    rule = slot_rule(prefill, 8)
    assert rule.slot_bytes == device_account(prefill, 8, 0).eager_bytes == 0
    assert rule.reason.endswith(f"at most 256; eager_bytes={32 * pair} makes them")
    assert slot_rule(options_with(max_tokens_per_rank=4096, eager_bytes=32 * pair), 8).slot_bytes == 32 * pair


@pytest.mark.parametrize("concurrent", [False, True])
def test_rows_of_other_kinds_use_slots_that_are_large_enough_and_handles_serve_all_of_them(concurrent):
    narrow, wide = make_wire("fp32", "fp32", 4), make_wire("fp32", "fp32", 40)

    def rank_main(member):
        with anyep.Buffer(member, **SIZES, device="cuda", concurrent=concurrent) as ep:
            kinds = [
                (calls, wire.hidden, has_slots)
                for wire, has_slots in ((narrow, True), (wide, False))
                for calls in [ep.variant(wire=wire, num_topk=2, max_tokens_per_rank=T)]
            ]
            kinds.append((ep, SIZES["hidden"], True))
            idx, weights = torch.tensor(IDX), torch.ones(T, 2)
            for first, hidden, _ in kinds:
                got = first.dispatch(torch.ones(T, hidden), idx, weights, layout="padded")
                for calls, width, has_slots in kinds:
                    geometry = calls._end.geometry("padded", 8, has_weights=True)
                    assert (calls._end.slots_of(geometry, T) is not None) == has_slots
                    x = torch.arange(T * width).float().view(T, width) + 1000 * ep.rank
                    again = calls.dispatch(x, None, weights, handle=got.handle)
                    out = calls.combine(again.x, again.handle)
                    assert torch.equal(out, (idx >= 0).sum(dim=1)[:, None] * x)

    with pretended(LazyDevice(0)):
        anyep.local_group(R).run(rank_main)


def test_slots_that_do_not_fit_are_refused_with_the_account():
    def rank_main(member):
        with pytest.raises(CapacityError, match=r"too little for this buffer: .* 0\.0 MiB of eager slots"):
            anyep.Buffer(member, **SIZES, device="cuda")
        with anyep.Buffer(member, **SIZES, **NO_SLOTS, device="cuda") as ep:
            assert "when the batch is awaited" in str(ep.explain())

    device = PretendDevice()
    account = device_account(BufferOptions(**SIZES, device="cuda", kernels="gpu"), R, 0)
    device.free_bytes = lambda: account.committed_bytes + account.step.balanced_bytes - 1
    with pretended(device):
        anyep.local_group(R).run(rank_main)


def test_where_one_rank_finds_no_room_all_are_told(monkeypatch):
    """Ranks that share a device may each have seen the same free memory."""
    empty, area = torch.empty, device_account(BufferOptions(**SIZES, device="cuda", kernels="gpu"), R, 0).eager_bytes
    taken = []

    def one_fits(shape, **options):
        if shape == (area,):
            taken.append(shape)
            if len(taken) == 2:
                raise torch.OutOfMemoryError("no more")
        return empty(shape, **options)

    monkeypatch.setattr(torch, "empty", one_fits)

    def rank_main(member):
        with pytest.raises(CapacityError, match=r"GiB free, too little for .*This one: .* of eager slots"):
            anyep.Buffer(member, **SIZES, device="cuda", timeout_s=5)
        return True

    with pretended(PretendDevice()):
        assert anyep.local_group(R, timeout_s=20).run(rank_main) == [True] * R


def test_explain_says_when_rows_leave():
    def rank_main(member):
        with anyep.Buffer(member, **SIZES, device="cuda") as ep:
            return str(ep.explain())

    with pretended(PretendDevice()):
        for told in anyep.local_group(R).run(rank_main):
            assert "leave with the announcement, to slots at each receiver" in told
