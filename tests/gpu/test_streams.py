"""Streams: what the exchange launches begins after what the caller has launched, and the caller goes on behind it."""

from __future__ import annotations

from dataclasses import replace

import pytest

import anyep
from anyep.testing.pretend_device import LazyDevice, pretended
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


@pytest.mark.parametrize("forgotten", ["before", "after"])
def test_an_event_that_is_forgotten_is_found_out(monkeypatch, forgotten):
    """A test of the test: the exchange must not begin too early, nor the caller go on too early."""
    follow = LazyDevice.follow

    def careless(device, stream, event):
        own = stream is device.current_stream()
        if own != (forgotten == "after"):
            follow(device, stream, event)

    monkeypatch.setattr(LazyDevice, "follow", careless)
    case = replace(draw(11), num_tokens=(6, 4, 5), num_topk=2, num_experts=8)
    with pretended(LazyDevice(0)), pytest.raises((AssertionError, RuntimeError, ValueError)):
        check(case, run(case))
