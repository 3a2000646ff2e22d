"""What only a GPU can show: exchanges of CUDA tensors against the oracle, streams, graphs. Skipped without one."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

import anyep
from anyep.errors import Unavailable
from anyep.exchange.device.devices import find_device
from anyep.nn import ops
from anyep.testing.processes import run_processes
from tests.exchange.rounds import Outcome, ReceivedCopy, check, open_buffer
from tests.gpu import drop_in
from tests.gpu.exchanged import WAYS, draw
from tests.nn.test_ops import E, H, K, N, T, layer, with_gradients


@pytest.fixture(scope="module", autouse=True)
def gpu():
    try:
        find_device("cuda")
    except Unavailable as reason:
        pytest.skip(str(reason))


def on_host(received):
    """The same batch, copied to the host."""
    names = ("x", "scales", "topk_idx", "topk_weights", "source_begin", "source_count", "source_token")
    tensors = {name: None if (one := getattr(received, name)) is None else one.cpu() for name in names}
    return ReceivedCopy.of(replace(received, **tensors, counts=list(received.counts)))


def play(case, ep, stream=None):
    """Dispatch, combine, and dispatch again, on ``stream``; return what came, on the host."""
    batch = case.batches[ep.rank]
    weights = None if batch.topk_weights is None else batch.topk_weights.cuda()
    x, idx, bias = batch.x.cuda(), batch.topk_idx.cuda(), [one.cuda() for one in batch.bias]
    dtype = torch.bfloat16 if case.wire == "fp8" else x.dtype
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        received = ep.dispatch(x, idx, weights, layout=case.layout)
        generator = torch.Generator().manual_seed(case.seed + 31 * ep.rank)
        y = torch.randn(received.x.shape, generator=generator).to(dtype).cuda()
        back = received.topk_weights
        result = ep.combine(y, received.handle, topk_weights=back, bias=bias or None, reduce=case.reduce)
        again = ep.dispatch(x, None, weights, handle=received.handle)
    torch.cuda.synchronize()
    return Outcome(
        received=on_host(received),
        again=on_host(again),
        y=y.cpu(),
        combined=(result if back is None else result.x).cpu(),
        weights=None if back is None else result.topk_weights.cpu(),
    )


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("seed", range(2 * len(WAYS)))
def test_exchange_is_exact(seed, concurrent):
    case = replace(draw(seed), hidden=[7, 128, 1030, 7168][seed % 4], num_tokens=(40, 0, 33, 5)[: 1 + seed % 4])

    def rank_main(member):
        with open_buffer(case, member, device="cuda", concurrent=concurrent) as ep:
            return play(case, ep, torch.cuda.Stream() if seed % 2 else None)

    check(case, anyep.local_group(case.num_ranks, timeout_s=600).run(rank_main))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("concurrent", [False, True])
def test_padded_rows_have_left_when_the_first_half_is_over(concurrent, cached):
    everybody = threading.Barrier(2)

    def rank_main(member):
        sizes = {"hidden": 1024, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": 40, "wire": "bf16"}
        with (
            torch.cuda.stream(torch.cuda.Stream()),
            anyep.Buffer(member, **sizes, device="cuda", concurrent=concurrent) as ep,
        ):
            x = torch.randn(40, 1024, device="cuda").bfloat16()
            x.clone().fill_(-1)  # a kernel that is loaded while ranks wait for one another may wait for them
            idx = torch.tensor([[0, 3], [2, 1]] * 20, device="cuda")
            first = ep.dispatch(x, idx, layout="padded")
            how = {"handle": first.handle} if cached else {"layout": "padded"}
            pending = ep.dispatch(x, None if cached else idx, **how, wait=False)
            everybody.wait()
            torch.cuda.synchronize()
            everybody.wait()
            x.fill_(-1)
            second = pending.wait()
            counts = list(first.counts)
            assert list(second.counts) == counts == [40, 40]
            assert all(torch.equal(one[:n], two[:n]) for one, two, n in zip(first.x, second.x, counts, strict=True))

    anyep.local_group(2, timeout_s=600).run(rank_main)


@pytest.mark.parametrize("layout", ["compact", "padded"])
def test_two_graphs_replay_on_other_tokens(layout):
    """y is the received rows: what comes back is each token as often as it went."""
    sizes = {"hidden": 128, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": 6, "wire": "bf16"}
    members = anyep.local_group(2, timeout_s=600)
    buffers = members.run(lambda member: anyep.Buffer(member, **sizes, static_rows=12, device="cuda"))
    x = [torch.zeros(6, 128, dtype=torch.bfloat16, device="cuda") for _ in buffers]
    idx = torch.tensor([[0, 3]] * 6, device="cuda")

    def exchange():
        calls = [ep.dispatch(one, idx, layout=layout, wait=False) for ep, one in zip(buffers, x, strict=True)]
        received = [call.wait() for call in calls]
        back = [ep.combine(one.x, one.handle, wait=False) for ep, one in zip(buffers, received, strict=True)]
        return [call.wait() for call in back]

    exchange()
    torch.cuda.synchronize()
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs.append((graph, exchange()))
    for turn in range(4):
        for rank, one in enumerate(x):
            one.fill_(turn + 10 * rank)
        graph, out = graphs[turn % 2]
        graph.replay()
        torch.cuda.synchronize()
        assert all((sums == 2 * one).all() for sums, one in zip(out, x, strict=True))
    for ep in buffers:
        ep.close()


def play_on_one_gpu(group, rank, path, case):
    """A rank process: torch maps the other's memory on the GPU that both have."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(0)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=group.size)
    try:
        with open_buffer(case, dist.group.WORLD, device="cuda", arena_bytes=256 << 20) as ep:
            return [play(case, ep) for _ in range(2)]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("seed", [3, 8, 11])
def test_processes_that_share_a_gpu_map_one_another_s_memory(tmp_path, seed):
    case = replace(draw(seed), num_tokens=(6, 5), hidden=1024)
    played = run_processes(2, play_on_one_gpu, str(tmp_path / "store"), case, timeout_s=250)
    for outcomes in zip(*played, strict=True):
        check(case, list(outcomes))


@pytest.mark.parametrize("layout", ["compact", "padded"])
def test_an_index_far_beyond_all_experts_is_said_and_harms_nothing(layout):
    """A kernel that looked it up would read memory that is not there, which ends the process's use of the GPU."""
    idx = torch.tensor([[0, 2**40], [-(2**50), 1]], device="cuda")
    x = torch.ones(2, 128, dtype=torch.bfloat16, device="cuda")

    def rank_main(member):
        sizes = {"hidden": 128, "num_experts": 2, "num_topk": 2, "max_tokens_per_rank": 2}
        with anyep.Buffer(member, **sizes, static_rows=4, device="cuda") as ep:
            ep.dispatch(x, idx, layout=layout)
            with pytest.raises(ValueError, match=r"rank 0: topk_idx\[0, 1\] names no expert"):
                ep.barrier()
            received = ep.dispatch(x, idx.clamp(0, 1), layout=layout)
            assert sum(received.counts) == 4

    anyep.local_group(1, timeout_s=600).run(rank_main)


def test_a_graph_that_would_have_to_wait_is_refused():
    def rank_main(member):
        with anyep.Buffer(member, hidden=8, num_experts=2, num_topk=1, max_tokens_per_rank=4, device="cuda") as ep:
            x = torch.ones(4, 8, dtype=torch.bfloat16, device="cuda")
            idx = torch.zeros(4, 1, dtype=torch.int64, device="cuda")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                x.add_(1)  # torch warns of a graph of nothing
                with pytest.raises(Unavailable, match="make the buffer with static_rows"):
                    ep.dispatch(x, idx)
                with pytest.raises(Unavailable, match="a barrier waits for the device"):
                    ep.barrier()
                with pytest.raises(Unavailable, match="make this call once outside of it before"):
                    ep.dispatch(x, idx, layout="padded")
            received = ep.dispatch(x, idx)
            assert (received.x == 1).all()
            graph.replay()
            assert (ep.dispatch(x, handle=received.handle).x == 2).all()

    anyep.local_group(1, timeout_s=600).run(rank_main)


def test_ranks_that_share_a_gpu_learn_in_threads_of_their_own():
    """Torch has one thread for all backward passes on a GPU, where one rank would wait for the next."""
    sizes = {"hidden": H, "num_experts": E, "num_topk": K, "max_tokens_per_rank": T, "wire": "fp32", "static_rows": N}

    def rank_main(member, device):
        with anyep.Buffer(member, **sizes, device=device) as ep:
            link = ops.Link(ep)

            def act(*inputs):
                return layer(link, *(one.to(device) for one in inputs))

            if device == "cuda":
                with pytest.raises(Unavailable, match="torch runs all their backward passes in one thread"):
                    with_gradients(act, member.rank)
            with torch.autograd.set_multithreading_enabled(False):
                return [one.cpu() for one in with_gradients(act, member.rank)]

    found, expected = (
        anyep.local_group(2, timeout_s=600).run(partial(rank_main, device=one)) for one in ("cuda", "cpu")
    )
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("act", [drop_in.first_version, drop_in.second_version])
def test_deep_ep_has_the_bits_of_cpu_tensors(monkeypatch, act):
    on_host = anyep.local_group(drop_in.RANKS, timeout_s=600).run(act)
    monkeypatch.setattr(drop_in, "WHERE", "cuda")
    drop_in.assert_same(anyep.local_group(drop_in.RANKS, timeout_s=600).run(act), on_host)


def test_batches_of_unknown_size_go_on_after_a_graph_was_captured():
    """Torch gives its pinned memory back then; to pin more while a rank waits on the device would wait for it."""
    everybody = threading.Barrier(2)

    def rank_main(member):
        sizes = {"hidden": 128, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": 6}
        with (
            torch.cuda.stream(torch.cuda.Stream()),
            anyep.Buffer(member, **sizes, device="cuda", concurrent=True) as ep,
        ):
            x = torch.ones(6, 128, dtype=torch.bfloat16, device="cuda")
            idx = torch.tensor([[0, 3]] * 6, device="cuda")
            for turn in range(4):
                received = ep.dispatch(x, idx)
                assert len(received.x) == 12
                assert (ep.combine(received.x, received.handle) == 2).all()
                torch.cuda.synchronize()
                everybody.wait()
                if turn % 2 == ep.rank:
                    with torch.cuda.graph(torch.cuda.CUDAGraph()):
                        x.add(1)
                everybody.wait()

    anyep.local_group(2, timeout_s=600).run(rank_main)
