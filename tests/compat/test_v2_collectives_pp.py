"""pp_set_config, pp_send and pp_recv: tensors between neighbours, first in, first out."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import anyep
from tests.compat.elastic_host import on_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_tensors_reach_both_neighbours_in_order(num_ranks):
    def program(buffer):
        buffer.pp_set_config(1 << 10, 3)
        after, before = (buffer.rank_idx + 1) % num_ranks, (buffer.rank_idx - 1) % num_ranks
        got = []
        for turn in range(10):
            buffer.pp_send(torch.full((16, 4), 100 * buffer.rank_idx + turn), after)
            buffer.pp_send(torch.full((8,), -turn, dtype=torch.float32), before)
            forward, backward = torch.empty((16, 4), dtype=torch.int64), torch.empty(8)
            if after == before:  # one queue: the next that came
                buffer.pp_recv(forward, before)
                buffer.pp_recv(backward, after)
            else:
                buffer.pp_recv(backward, after)
                buffer.pp_recv(forward, before)
            got.append((int(forward[15, 3]), float(backward[7])))
        return got

    for rank, got in enumerate(on_ranks(num_ranks, program)):
        assert got == [(100 * ((rank - 1) % num_ranks) + turn, -float(turn)) for turn in range(10)]


def test_a_sender_waits_for_a_free_slot():
    sent = []

    def program(buffer):
        buffer.pp_set_config(32, 2)
        if buffer.rank_idx == 0:
            for number in range(5):
                buffer.pp_send(torch.full((8,), float(number)), 1)
                sent.append(number)
            return None
        while len(sent) < 2:
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(sent) == 2
        there = torch.empty(8)
        got = []
        for _ in range(5):
            buffer.pp_recv(there, 0)
            got.append(float(there[0]))
        return got

    assert on_ranks(2, program)[1] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_another_configuration_starts_afresh():
    def program(buffer):
        peer = 1 - buffer.rank_idx
        buffer.pp_set_config(64, 2)
        buffer.pp_send(torch.ones(8), peer)
        buffer.pp_set_config(1 << 12, 1)
        buffer.pp_send(torch.full((1024,), 2.0), peer)
        there = torch.empty(1024)
        buffer.pp_recv(there, peer)
        return float(there.sum())

    assert on_ranks(2, program) == [2048.0, 2048.0]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda b: b.pp_send(torch.ones(8), 2), "rank 2 is no neighbour of rank 0: 1 and 3 are"),
        (lambda b: b.pp_recv(torch.ones(8), 0), "no neighbour"),
        (lambda b: b.pp_send(torch.ones(8, 8).T, 1), "contiguous"),
        (lambda b: b.pp_send(torch.ones(7), 1), "multiple of 32 bytes up to 1024, got 28"),
        (lambda b: b.pp_recv(torch.ones(264), 1), "up to 1024, got 1056"),
        (lambda b: b.pp_set_config(31, 1), "multiple of 32"),
        (lambda b: b.pp_set_config(32, 0), "at least 1"),
        (lambda b: b.pp_set_config(1 << 20, 2), "this takes 8388608 bytes, and the buffer has 4194304"),
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_what_upstream_refuses_is_refused(call, text, kind):
    def program(buffer):
        buffer.pp_set_config(1024, 1)
        if buffer.rank_idx == 0:
            with pytest.raises(kind, match=text):
                call(buffer)

    on_ranks(4, program)


def test_a_tensor_of_another_size_is_refused_and_waits_for_the_right_one():
    def program(buffer):
        buffer.pp_set_config(1024, 1)
        buffer.pp_send(torch.ones(8), 0)
        with pytest.raises(RuntimeError, match="contiguous cpu tensor \\[32\\]"):
            buffer.pp_recv(torch.empty(16), 0)
        there = torch.empty(8)
        buffer.pp_recv(there, 0)
        return float(there.sum())

    assert on_ranks(1, program) == [8.0]


def test_it_has_to_be_configured_first():
    def program(buffer):
        with pytest.raises(RuntimeError, match="pp_set_config"):
            buffer.pp_send(torch.ones(8), 0)

    on_ranks(1, program)


def test_a_silent_neighbour_is_our_own_error():
    released = threading.Event()

    def program(buffer):
        buffer.pp_set_config(32, 1)
        if buffer.rank_idx == 1:
            assert released.wait(20)
            return None
        with pytest.raises(anyep.PeerTimeout, match="recv 1 from rank 1"):
            buffer.pp_recv(torch.empty(8), 1)
        released.set()
        return True

    assert on_ranks(2, program, timeout_s=0.2)[0] is True
