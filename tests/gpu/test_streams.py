"""Streams: what the exchange launches begins after what the caller has launched, and the caller goes on behind it."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest

import anyep
from anyep.errors import CapacityError, PeerLost
from anyep.exchange.device.faults import Faults, Limits
from anyep.exchange.device.streams import Visit
from anyep.exchange.opening import RefusedError
from anyep.testing.lazy_device import LazyDevice
from anyep.testing.pretend_device import PretendDevice, pretended
from tests.exchange.rounds import check, open_buffer, play
from tests.gpu.exchanged import WAYS, draw


def run(case):
    def rank_main(member):
        with open_buffer(case, member, device="cuda") as ep:
            return play(case, ep)

    return anyep.local_group(case.num_ranks).run(rank_main)


@pytest.mark.parametrize("seed", range(len(WAYS)))
def test_streams_that_run_as_late_as_they_may_bring_the_same_bits(seed):
    case = replace(draw(seed), num_tokens=(6, 0, 5))
    with pretended(LazyDevice(seed)):
        check(case, run(case))


def is_right(case, seed):
    try:
        with pretended(LazyDevice(seed)):
            check(case, run(case))
    except (AssertionError, RuntimeError, ValueError, CapacityError):
        return False
    return True


def test_a_caller_who_does_not_follow_the_exchange_is_found_out(monkeypatch):
    """A test of the test."""
    follow = LazyDevice.follow

    def careless(device, stream, event):
        if stream is not device.current_stream():
            follow(device, stream, event)

    monkeypatch.setattr(LazyDevice, "follow", careless)
    case = replace(draw(11), num_tokens=(6, 4, 5), num_topk=2, num_experts=8)
    assert not all(is_right(case, seed) for seed in range(6))


def test_the_memory_of_a_call_that_broke_off_is_kept_and_that_of_a_refused_one_is_not_in_use():
    device, abandoned = Noted(), []
    for error in (RefusedError(ValueError("refused")), PeerLost("lost", ranks=[1], step="")):
        visit = Visit.begin(device, "exchange")
        with pytest.raises(type(error)), visit.cleared(error, abandoned):
            raise error
    assert abandoned == [error]
    assert device.notes == [("exchange", "caller"), ("caller", "exchange"), ("exchange", "caller")]


class Noted(PretendDevice):
    """Notes which stream follows which."""

    def __init__(self):
        super().__init__()
        self.current, self.notes = "caller", []

    def current_stream(self):
        return self.current

    def mark(self, stream):
        return stream

    def follow(self, stream, event):
        self.notes.append((stream, event))

    def lend(self, tensor, stream):
        self.notes.append((stream, tensor))


def test_the_exchange_follows_the_caller_and_then_the_caller_the_exchange():
    device = Noted()
    visit = Visit.begin(device, "exchange")
    visit.end(["x", None])
    assert device.notes == [("exchange", "caller"), ("caller", "exchange")]


def test_memory_of_an_earlier_call_on_another_stream_is_lent_to_the_exchange():
    device = Noted()
    visit = Visit.begin(device, "exchange")
    visit.borrow("of this stream", "caller")
    visit.borrow(None, "other")
    visit.borrow("of another", "other")
    assert device.notes[1:] == [("exchange", "of another")]


def test_what_lives_as_long_as_the_buffer_is_lent_to_the_exchange():
    """Else the allocator would hand it out when the buffer is closed, whatever still runs."""
    for concurrent in (False, True):
        device, lent = PretendDevice(), []
        device.lend = lambda tensor, stream, lent=lent: lent.append(tensor.data_ptr())

        def rank_main(member, concurrent=concurrent, lent=lent):
            sizes = {"hidden": 8, "num_experts": 2, "num_topk": 1, "max_tokens_per_rank": 2}
            with anyep.Buffer(member, **sizes, device="cuda", concurrent=concurrent) as ep:
                end = ep._end
                assert {end.boards.first_addr, end.base_addr, end.tables.rank_addr} <= set(lent)
                assert not concurrent or end.order.first_addr in lent

        with pretended(device):
            anyep.local_group(1).run(rank_main)


def test_memory_for_what_goes_wrong_is_known_to_belong_to_the_exchange():
    """Torch keeps pinned memory that a stream has copied until that stream has come to where it was freed."""
    device, copies = Noted(), []
    device.on = lambda stream: mock.patch.object(device, "current", stream)
    device.copy = lambda source, target: (target.copy_(source), copies.append((target.data_ptr(), device.current)))
    faults = Faults(device, "exchange", Limits(num_topk=1, num_experts=2, static_rows=-1, block_rows=2, timeout_s=1), 2)
    assert copies == [(faults.addr, "exchange")]
    faults.look()
    faults.settle()


def test_results_that_are_awaited_on_another_stream_are_lent_to_it():
    device = Noted()
    visit = Visit.begin(device, "exchange")
    device.current = "other"
    visit.end(["x", None])
    assert device.notes[1:] == [("caller", "exchange"), ("other", "exchange"), ("other", "x")]
