"""V1's Buffer and Config beyond a first call: every table, every refusal of streams, communicators, silent ranks."""

from __future__ import annotations

import sys
import threading
import types

import pytest
import torch

import anyep
from anyep.compat import deep_ep
from anyep.compat.deep_ep.native import Natives
from tests.compat.v1_oracle import E, make_inputs, on_ranks, same_bits, send

DISPATCH = {
    2: (24, 256, 6), 4: (6, 256, 6), 8: (6, 256, 6), 16: (36, 288, 20), 24: (32, 288, 8), 32: (32, 288, 8),
    48: (32, 288, 8), 64: (32, 288, 8), 96: (20, 480, 12), 128: (20, 560, 12), 144: (32, 720, 12), 160: (28, 720, 12),
}  # fmt: skip
COMBINE = {
    2: (10, 256, 6), 4: (9, 256, 6), 8: (4, 256, 6), 16: (4, 288, 12), 24: (1, 288, 8), 32: (1, 288, 8),
    48: (1, 288, 8), 64: (1, 288, 8), 96: (1, 480, 8), 128: (1, 560, 8), 144: (2, 720, 8), 160: (2, 720, 8),
}  # fmt: skip


@pytest.mark.parametrize("num_ranks", DISPATCH)
@pytest.mark.parametrize("num_sms", [20, 24])
def test_recommended_configs_ask_for_the_bytes_of_upstreams_tables(num_ranks, num_sms, monkeypatch):
    monkeypatch.setattr(deep_ep.Buffer, "num_sms", num_sms)
    tabled = deep_ep.Buffer.get_dispatch_config(num_ranks), deep_ep.Buffer.get_combine_config(num_ranks)
    for found, numbers in zip(tabled, (DISPATCH[num_ranks], COMBINE[num_ranks]), strict=True):
        wanted = deep_ep.Config(num_sms, *numbers, 128)
        for hint in ("get_nvl_buffer_size_hint", "get_rdma_buffer_size_hint"):
            assert getattr(found, hint)(14336, num_ranks) == getattr(wanted, hint)(14336, num_ranks)


def test_a_program_starts_with_twenty_multiprocessors():
    assert deep_ep.Buffer.num_sms == 20
    assert deep_ep.Config(21).get_nvl_buffer_size_hint(256, 8) == deep_ep.Config(20).get_nvl_buffer_size_hint(256, 8)


STREAMS = [
    {"allocate_on_comm_stream": True},
    {"allocate_on_comm_stream": True, "async_finish": True},
    {"allocate_on_comm_stream": True, "previous_event": True},
]


@pytest.mark.parametrize("options", STREAMS)
@pytest.mark.parametrize("call", ["layout", "dispatch", "cached", "combine"])
def test_memory_on_the_communication_stream_needs_an_event_before_and_one_after(call, options):
    given = make_inputs([9])[0]
    options = {name: deep_ep.Buffer.capture() if name == "previous_event" else on for name, on in options.items()}

    def rank_main(buffer):
        x, *_, handle, _ = send(buffer, given)
        calls = {
            "layout": lambda: buffer.get_dispatch_layout(given.topk_idx, E, **options),
            "dispatch": lambda: send(buffer, given, **options),
            "cached": lambda: buffer.dispatch(given.x, handle=handle, **options),
            "combine": lambda: buffer.combine(x, handle, **options),
        }
        with pytest.raises(RuntimeError, match=r"Assertion exception.*previous_event and async_finish"):
            calls[call]()

    on_ranks(1, rank_main)


def test_an_event_of_a_synchronous_call_may_come_before_any_call():
    given = make_inputs([9, 31])

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, *_, handle, event = send(buffer, mine, previous_event=deep_ep.EventOverlap())
        assert event.event is None
        buffer.get_dispatch_layout(mine.topk_idx, E, previous_event=event)
        return buffer.combine(x, handle, previous_event=event)[2].event

    assert on_ranks(2, rank_main) == [None, None]


def test_deterministic_memory_filling_stops_every_kind_of_call():
    given = make_inputs([9])[0]

    def rank_main(buffer):
        x, *_, handle, _ = send(buffer, given)
        per_rank, _, per_expert, inside, _ = buffer.get_dispatch_layout(given.topk_idx, E)
        rows, _, low, *_ = buffer.low_latency_dispatch(given.x, given.topk_idx, 9, E, use_fp8=False)
        calls = [
            lambda: buffer.dispatch(
                given.x, None, per_rank, None, inside, per_expert, given.topk_idx, given.topk_weights
            ),
            lambda: buffer.dispatch(given.x, handle=handle),
            lambda: buffer.combine(x, handle),
            lambda: buffer.low_latency_dispatch(given.x, given.topk_idx, 9, E),
            lambda: buffer.low_latency_combine(rows, given.topk_idx, given.topk_weights, low),
        ]
        torch.use_deterministic_algorithms(True)
        try:
            for call in calls:
                with pytest.raises(AssertionError, match="fill_uninitialized_memory"):
                    call()
        finally:
            torch.use_deterministic_algorithms(False)
        for call in calls:
            call()

    on_ranks(1, rank_main, low_latency_mode=True)


class Communicator:
    """What mpi4py's communicators offer of themselves, between the threads of a local group."""

    def __init__(self, member):
        self.member = member

    def Get_rank(self):  # noqa: N802 - MPI's name
        return self.member.rank

    def Get_size(self):  # noqa: N802
        return self.member.size

    def allgather(self, item):
        return self.member.allgather(item)


def test_a_communicator_of_mpi_stands_for_a_group(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", types.SimpleNamespace(Comm=Communicator))
    given = make_inputs([9, 31])

    def rank_main(member):
        comm = Communicator(member)
        buffer = deep_ep.Buffer(None, explicitly_destroy=True, comm=comm)
        assert (buffer.rank, buffer.group_size, buffer.group) == (member.rank, 2, comm)
        x = send(buffer, given[buffer.rank])[0]
        buffer.destroy()
        return x

    expected = on_ranks(2, lambda buffer: send(buffer, given[buffer.rank])[0])
    for x, wanted in zip(anyep.local_group(2).run(rank_main), expected, strict=True):
        assert same_bits(x, wanted)


def test_local_memory_from_an_offset_on_ends_with_the_buffer():
    def rank_main(member):
        buffer = deep_ep.Buffer(member, 256)
        buffer.get_local_buffer_tensor(torch.uint8).copy_(torch.arange(256))
        rest = buffer.get_local_buffer_tensor(torch.uint8, offset=250)
        assert rest.tolist() == [250, 251, 252, 253, 254, 255]
        with pytest.raises(AssertionError, match="fit"):
            buffer.get_local_buffer_tensor(torch.uint8, torch.Size([7]), offset=250)

    anyep.local_group(1).run(rank_main)


@pytest.mark.parametrize("call", ["dispatch", "cached", "combine", "low-latency dispatch", "low-latency combine"])
def test_a_silent_rank_is_named_by_every_kind_of_call(monkeypatch, call):
    monkeypatch.setitem(Natives.__init__.__kwdefaults__, "timeout_s", 0.5)
    given, over = make_inputs([9, 31]), threading.Barrier(2)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, *_, handle, _ = send(buffer, mine)
        rows, _, low, *_ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, 32, E, use_fp8=False)
        calls = {
            "dispatch": lambda: send(buffer, mine),
            "cached": lambda: buffer.dispatch(mine.x, handle=handle),
            "combine": lambda: buffer.combine(x, handle),
            "low-latency dispatch": lambda: buffer.low_latency_dispatch(mine.x, mine.topk_idx, 32, E),
            "low-latency combine": lambda: buffer.low_latency_combine(rows, mine.topk_idx, mine.topk_weights, low),
        }
        if buffer.rank == 0:
            with pytest.raises(anyep.PeerTimeout, match=call.split()[-1].replace("cached", "dispatch")) as caught:
                calls[call]()
            assert caught.value.ranks == (1,)
        over.wait(20)

    on_ranks(2, rank_main, low_latency_mode=True)


def test_legacy_names_of_the_index_width_count_too(monkeypatch):
    from anyep.config import topk_idx_bits

    monkeypatch.delenv("EP_NUM_TOPK_IDX_BITS", raising=False)
    assert topk_idx_bits() == 64
    monkeypatch.setenv("TOPK_IDX_BITS", "16")
    assert topk_idx_bits() == 16
    monkeypatch.setenv("EP_NUM_TOPK_IDX_BITS", "32")
    assert topk_idx_bits() == 32
    monkeypatch.setenv("EP_NUM_TOPK_IDX_BITS", "7")
    with pytest.raises(ValueError, match="EP_NUM_TOPK_IDX_BITS"):
        topk_idx_bits()


def test_the_depth_of_queue_pairs_is_told_where_upstream_has_some(monkeypatch):
    def depth(buffer):
        return getattr(buffer, "nvshmem_qp_depth", None)

    monkeypatch.delenv("NVSHMEM_QP_DEPTH", raising=False)
    assert on_ranks(2, depth) == [None, None]
    assert on_ranks(1, depth, low_latency_mode=True) == [1024]
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "2048")
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "1")
    assert on_ranks(2, depth) == [2048, 2048]
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "deep")
    with pytest.raises(ValueError, match="NVSHMEM_QP_DEPTH"):
        on_ranks(2, depth)
