"""Calls that decoding programs capture in graphs: none is refused, and none asks a device for numbers meanwhile.

The device is pretended, and says that it captures; torch's ways from a tensor to a number raise. That graphs replay
what was launched is held below this interface (tests/gpu/test_graphs.py).
"""

from __future__ import annotations

import sys
import threading

import pytest
import torch

import anyep
from anyep.compat.deep_ep import Buffer, ElasticBuffer, native
from anyep.testing.pretend_device import PretendDevice, pretended
from tests.compat.v1_oracle import make_inputs, same_bits, send

E, TMAX = 8, 16
GIVEN = make_inputs([7, 5], hidden=128, experts=E)
TO_NUMBERS = ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__index__", "__float__")


def elastic(expand):
    def make(member):
        buffer = ElasticBuffer(member, num_bytes=2 << 20, num_max_tokens_per_rank=TMAX)

        def act(mine):
            asked = {"num_experts": E, "do_cpu_sync": False, "do_expand": expand}
            x, _, weights, handle, _ = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights, **asked)
            fields = handle.psum_num_recv_tokens_per_scaleup_rank, handle.psum_num_recv_tokens_per_expert
            assert handle.num_recv_tokens_per_expert_list == []
            again = buffer.dispatch(mine.x, handle=handle, do_expand=expand)[0]
            return [x, weights, again, *fields, *buffer.combine(x, handle, topk_weights=weights)[:2]]

        return act

    return make


def low_latency(member):
    buffer = Buffer(member, low_latency_mode=True)

    def act(mine):
        (q, _), count, handle, _, hook = buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, TMAX, E, return_recv_hook=True
        )
        hook()
        y = torch.ones(q.shape, dtype=torch.bfloat16)
        out = torch.empty_like(mine.x)
        _, _, hook = buffer.low_latency_combine(
            y, mine.topk_idx, mine.topk_weights, handle, return_recv_hook=True, out=out
        )
        hook()
        return [count, out]

    return act


def normal(member):
    buffer = Buffer(member)

    def act(mine):
        x, idx, weights, counts, handle, _ = send(buffer, mine, experts=E, num_worst_tokens=2 * TMAX)
        assert counts == []
        again = buffer.dispatch(mine.x, handle=handle)[0]
        return [x, idx, weights, again, *buffer.combine(x, handle, weights)[:2]]

    return act


@pytest.mark.parametrize(
    "make", [elastic(False), elastic(True), low_latency, normal], ids=["V2", "V2 expanded", "low latency", "normal"]
)
def test_no_call_is_refused_or_asks_for_numbers_while_a_graph_is_captured(make, monkeypatch):
    monkeypatch.setattr(native, "device_of", lambda rows: "cuda")
    turn = threading.Barrier(2, timeout=60)
    with pretended(PretendDevice()) as device, pytest.MonkeyPatch.context() as patch:

        def begin():
            device.captures = True
            for name in TO_NUMBERS:
                patch.setattr(torch.Tensor, name, _but_in_kernels(name))

        def end():
            patch.undo()
            device.captures = False

        def rank_main(member):
            mine, act = GIVEN[member.rank], make(member)
            first = [one.clone() for one in act(mine)]
            for change in (begin, end):
                if turn.wait() == 0:
                    change()
                turn.wait()
                if change is begin:
                    captured = act(mine)
            return all(same_bits(one, other) for one, other in zip(first, captured, strict=True))

        assert anyep.local_group(2).run(rank_main) == [True, True]


def test_what_needs_a_number_is_refused_with_what_does_not(monkeypatch):
    monkeypatch.setattr(native, "device_of", lambda rows: "cuda")
    with pretended(PretendDevice()) as device:

        def rank_main(member):
            buffer = ElasticBuffer(member, num_bytes=2 << 20, num_max_tokens_per_rank=TMAX)
            mine = GIVEN[0]
            buffer.dispatch(mine.x, mine.topk_idx, num_experts=E)
            device.captures = True
            with pytest.raises(anyep.Unavailable, match="static"):
                buffer.dispatch(mine.x, mine.topk_idx, num_experts=E)
            device.captures = False

        anyep.local_group(1).run(rank_main)


def _but_in_kernels(name):
    """Return a method that raises, but for the pretended device's own kernels, which are plain torch."""
    real = getattr(torch.Tensor, name)

    def refuse(tensor, *arguments, **options):
        frame = sys._getframe(1)
        while frame is not None:
            if "/kernels/" in frame.f_code.co_filename:
                return real(tensor, *arguments, **options)
            frame = frame.f_back
        raise AssertionError(f"Tensor.{name} while a graph is captured")

    return refuse
