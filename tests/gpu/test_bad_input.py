"""What a device's buffer refuses, and that it works afterwards. Fakes stand for devices that this machine lacks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import anyep
from anyep.errors import CapacityError, Unavailable
from anyep.exchange.arguments import check_tensor
from anyep.exchange.device import devices, reach
from anyep.kernels.gpu.target import SM_80
from anyep.testing.pretend_device import PretendDevice, pretended
from tests.exchange.rounds import check, open_buffer, play
from tests.gpu.exchanged import draw

SIZES = {"hidden": 8, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": 6}
GOOD = replace(draw(0), num_tokens=(4, 6), num_experts=4, num_topk=2, spare_rows=None)


@pytest.fixture
def device():
    with pretended(PretendDevice()) as device:
        yield device


def on_two_ranks(act, case=GOOD, **options):
    """Let ``act(ep, batch)`` run on both ranks, and then an exchange that must be right."""

    def rank_main(member):
        with open_buffer(case, member, device="cuda", **options) as ep:
            act(ep, case.batches[ep.rank])
            return play(case, ep)

    check(case, anyep.local_group(2).run(rank_main))


def test_a_tensor_of_the_host_is_refused_with_the_way_out():
    cuda = torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"x is on cpu; this buffer works on cuda:0 tensors: pass x.to\('cuda:0'\)"):
        check_tensor("x", torch.ones(1), dtypes=[torch.float32], shape=[1], legend="[T]", device=cuda)


def test_a_tensor_of_another_device_is_refused(device):
    def act(ep, batch):
        with pytest.raises(ValueError, match="x is on meta; this buffer works on cpu tensors"):
            ep.dispatch(batch.x.to("meta"), batch.topk_idx)

    on_two_ranks(act)


def test_a_strided_tensor_is_refused(device):
    def act(ep, batch):
        with pytest.raises(ValueError, match=r"x must be contiguous, got strides .* pass x.contiguous\(\)"):
            ep.dispatch(batch.x.repeat(1, 2)[:, : ep.options.hidden], batch.topk_idx)

    on_two_ranks(act, replace(GOOD, hidden=16))


def test_a_device_without_fp8_offers_bf16_on_every_rank(device):
    device.target = SM_80

    def rank_main(member):
        with pytest.raises(Unavailable, match="this is sm_80; use wire='bf16'"):
            anyep.Buffer(member, **SIZES, wire="fp8", device="cuda")
        with anyep.Buffer(member, **SIZES, wire="bf16", device="cuda") as ep:
            return ep.explain()

    assert "phase-split" in str(anyep.local_group(2).run(rank_main)[0])


def test_too_little_memory_prints_the_account():
    def rank_main(member):
        with pytest.raises(CapacityError, match=r"GiB free, too little for this buffer: .* a balanced step \d+ rows"):
            anyep.Buffer(member, **SIZES, device="cuda")

    with pretended(PretendDevice(free_bytes=100)):
        anyep.local_group(2).run(rank_main)


def test_an_allocation_that_fails_prints_the_account(monkeypatch):
    def full(*shape, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(devices.torch, "empty", full)
    device = PretendDevice(free_bytes=1 << 30)
    told = r"has 1.000 GiB free, too little for 2.000 GiB; .* the account"
    with pytest.raises(CapacityError, match=told):
        devices.allocate(device, (1 << 29,), torch.float32, lambda: "the account")
    with pytest.raises(CapacityError, match=told):
        devices.allocate_all(device, [None, devices.Wanted((1 << 29,), torch.float32)], lambda: "the account")


def test_a_rank_without_memory_for_its_batch_makes_all_ranks_refuse(device, monkeypatch):
    real = reach.allocate_all

    def act(ep, batch):
        def scarce(where, wanted, account):
            if ep.rank == 1:
                raise CapacityError("full")
            return real(where, wanted, account)

        if ep.rank == 1:
            monkeypatch.setattr(reach, "allocate_all", scarce)
        ep.barrier()
        with pytest.raises(CapacityError, match="rank 1 could not allocate"):
            ep.dispatch(batch.x, batch.topk_idx)
        ep.barrier()
        monkeypatch.setattr(reach, "allocate_all", real)

    on_two_ranks(act)


def bad(topk_idx):
    """Name an expert that does not exist, in the second column of the third token."""
    changed = topk_idx.clone()
    changed[2, 1] = 4
    return changed


def test_a_bad_expert_of_one_rank_is_an_error_on_all(device):
    def act(ep, batch):
        idx = bad(batch.topk_idx) if ep.rank == 1 else batch.topk_idx
        with pytest.raises(
            ValueError, match=r"dispatch 1: rank 1: topk_idx\[2, 1\] names no expert; experts are 0 to 3"
        ):
            ep.dispatch(batch.x, idx)

    on_two_ranks(act)


def test_what_a_dispatch_was_refused_for_is_not_said_again(device):
    def act(ep, batch):
        idx = batch.topk_idx.clone()
        idx[0, 1] = 4
        for _ in range(2):
            with pytest.raises(ValueError, match="names no expert"):
                ep.dispatch(batch.x, idx)
            ep.barrier()
            got = ep.dispatch(batch.x, batch.topk_idx, layout="padded")  # whose faults a later call would say
            ep.combine(got.x, got.handle)

    on_two_ranks(act)


def test_an_index_that_names_no_expert_is_kept_as_one_that_no_kernel_looks_up(device):
    """2 ** 40 behind a table of 4 would be memory that is not there."""

    def rank_main(member):
        with anyep.Buffer(member, **SIZES, static_rows=24, device="cuda") as ep:
            x, idx = torch.ones(2, 8, dtype=torch.bfloat16), torch.tensor([[0, 2**40], [-(2**50), 3]])
            received = ep.dispatch(x, idx)
            assert received.handle.topk_idx().tolist() == [[0, -2], [-2, 3]]
            with pytest.raises(ValueError, match=r"rank 0: topk_idx\[0, 1\] names no expert"):
                ep.barrier()

    anyep.local_group(2).run(rank_main)


@pytest.mark.parametrize("layout", ["compact", "expert", "padded"])
def test_a_bad_expert_that_nobody_waited_for_is_said_by_a_later_call(device, layout):
    case = replace(GOOD, spare_rows=3, layout=layout, alignment=4)

    def act(ep, batch):
        idx = bad(batch.topk_idx) if ep.rank == 1 else batch.topk_idx
        received = ep.dispatch(batch.x, idx, layout=layout)
        assert list(received.counts) == [0, 0]
        if layout != "padded":
            assert (received.topk_idx == -1).all()
            assert (received.x == 0).all()
        bias = torch.ones_like(batch.x)
        refused = "an earlier dispatch: rank 1: topk_idx"
        with pytest.raises(ValueError, match=refused):
            ep.combine(received.x, received.handle, bias=bias)
        assert torch.equal(ep.combine(received.x, received.handle, bias=bias), bias)

    on_two_ranks(act, case)


@pytest.mark.parametrize(
    ("layout", "reason"), [("compact", "static_rows=2 is too small"), ("padded", "R \\* max_tokens_per_rank = 12 rows")]
)
def test_a_batch_that_does_not_fit_is_said_by_the_barrier(device, layout, reason):
    def rank_main(member):
        with anyep.Buffer(member, **SIZES, static_rows=2, device="cuda") as ep:
            x, idx = torch.ones(6, 8, dtype=torch.bfloat16), torch.zeros(6, 2, dtype=torch.int64)
            received = ep.dispatch(x, idx, layout=layout)
            with pytest.raises(CapacityError, match=reason):
                ep.barrier()
            ep.barrier()
            return list(received.counts)

    assert anyep.local_group(2).run(rank_main) == [[0, 0], [0, 0]]


def test_a_graph_of_what_the_host_must_wait_for_is_refused(device):
    def act(ep, batch):
        ep.dispatch(batch.x, batch.topk_idx, layout="padded")
        ep.barrier()
        device.captures = True
        with pytest.raises(
            Unavailable, match=r"layout='compact' without static_rows waits.* make the buffer with static"
        ):
            ep.dispatch(batch.x, batch.topk_idx)
        with pytest.raises(Unavailable, match="a barrier waits for the device: call it outside of graphs"):
            ep.barrier()
        announced = torch.zeros((2, 2 + 4), dtype=torch.int32)
        with pytest.raises(Unavailable, match="recall waits for the device: call it outside of graphs"):
            ep.handles.recall(batch.topk_idx, announced)
        ep.dispatch(batch.x, batch.topk_idx, layout="padded")
        device.captures = False
        ep.barrier()

    on_two_ranks(act)


def test_a_graph_of_a_call_that_makes_tables_is_refused_until_it_was_made_once(device):
    def act(ep, batch):
        ep.barrier()
        device.captures = True
        with pytest.raises(Unavailable, match="make this call once outside of it before"):
            ep.dispatch(batch.x, batch.topk_idx, layout="padded")
        device.captures = False
        ep.barrier()
        ep.dispatch(batch.x, batch.topk_idx, layout="padded")
        ep.barrier()
        device.captures = True
        ep.dispatch(batch.x, batch.topk_idx, layout="padded")
        device.captures = False
        ep.barrier()

    on_two_ranks(act)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"device": "cuda", "kernels": "cpu"}, ValueError, "kernels='cpu' work on host memory, got device='cuda'"),
        ({"num_sms": 4}, ValueError, "num_sms goes with device='cuda'"),
        ({"concurrent": True}, ValueError, "concurrent goes with device='cuda'"),
        ({"device": "cuda", "num_sms": 0}, ValueError, "num_sms must be at least 1"),
        ({"device": "cuda", "wire": "raw8"}, Unavailable, "a device has bf16, fp16, fp32 and fp8"),
        ({"device": "cuda", "record": "somewhere.npz"}, Unavailable, "record goes with CPU tensors"),
        ({"device": "cuda", "transport": "shm"}, Unavailable, "use .auto., .inprocess. or .cuda_symmetric."),
    ],
)
def test_arguments_that_do_not_go_together(device, options, kind, words):
    def rank_main(member):
        with pytest.raises(kind, match=words):
            anyep.Buffer(member, **SIZES, **options)

    anyep.local_group(2).run(rank_main)


@pytest.mark.parametrize("device", ["abacus", "meta"])
def test_what_is_no_cuda_device_is_refused(device):
    def rank_main(member):
        with pytest.raises(ValueError, match=f"got '{device}'"):
            anyep.Buffer(member, **SIZES, device=device)

    anyep.local_group(1).run(rank_main)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_that_is_said():
    def rank_main(member):
        with pytest.raises(Unavailable, match=r"device='cuda' needs a GPU, and torch .*; device='cpu' works"):
            anyep.Buffer(member, **SIZES, device="cuda")

    anyep.local_group(2).run(rank_main)
