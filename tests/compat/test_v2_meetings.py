"""Where V2's ranks wait for each other and for how long, and what a call's own numbers decide."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import anyep
from anyep.compat.deep_ep import ElasticBuffer
from tests.compat.v2_world import MIB2, World, poisoned, same_bits  # noqa: F401

WORLD = World()
PAIR = World(num_tokens=(5, 7))
ONE = World(num_tokens=(3,))


def dispatch(buffer, inputs, **options):
    return buffer.dispatch(inputs.x, inputs.idx, inputs.weights, num_experts=8, **options)


@pytest.mark.parametrize("options", [{}, {"use_comm_stream": False, "with_cpu_sync": True, "sequential": False}])
@pytest.mark.parametrize("exchanged", [False, True])
def test_nobody_leaves_a_barrier_before_the_last_has_come(exchanged, options):
    came = []

    def rank_main(buffer, i):
        if exchanged:
            dispatch(buffer, i)
        for late in range(4):
            if buffer.rank_idx == late:
                time.sleep(0.03)
                came.append(late)
            buffer.barrier(**options)
            assert came[: late + 1] == list(range(late + 1))
            buffer.barrier(**options)
        return True

    assert all(WORLD.run(rank_main))


def test_nobody_has_a_buffer_or_ends_one_before_all_ranks_do():
    made, left = [], []

    def rank_main(member):
        if member.rank == 1:
            time.sleep(0.1)
            made.append(True)
        buffer = ElasticBuffer(member, num_bytes=MIB2, explicitly_destroy=True)
        assert made
        if member.rank == 0:
            time.sleep(0.1)
            left.append(True)
        buffer.destroy()
        assert left

    anyep.local_group(2).run(rank_main)


@pytest.mark.parametrize("call", ["dispatch", "cached", "combine", "barrier"])
def test_a_silent_rank_is_named_when_the_callers_seconds_are_over(call):
    over = threading.Barrier(2)

    def rank_main(buffer, i):
        x, _, _, handle, _ = dispatch(buffer, i)
        calls = {
            "dispatch": lambda: dispatch(buffer, i),
            "cached": lambda: buffer.dispatch(i.x, handle=handle),
            "combine": lambda: buffer.combine(x, handle),
            "barrier": buffer.barrier,
        }
        if buffer.rank_idx == 0:
            with pytest.raises(anyep.PeerTimeout) as caught:
                calls[call]()
            assert caught.value.ranks == (1,)
            assert call.replace("cached", "dispatch") in caught.value.step
        over.wait(30)
        return True

    assert all(PAIR.run(rank_main, num_cpu_timeout_secs=1))


def test_deterministic_memory_filling_stops_every_kind_of_call():
    def rank_main(buffer, i):
        x, _, _, handle, _ = dispatch(buffer, i)
        calls = [
            lambda: dispatch(buffer, i),
            lambda: buffer.dispatch(i.x, handle=handle),
            lambda: buffer.combine(x, handle),
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
        return True

    assert ONE.run(rank_main) == [True]


@pytest.mark.parametrize("sync", [True, False])
def test_statistics_of_expanded_batches_count_rows_without_padding(sync):
    def rank_main(buffer, i):
        stats = torch.full((WORLD.num_local,), 7, dtype=torch.int32)
        options = {"do_expand": True, "expert_alignment": 16, "do_cpu_sync": sync}
        dispatch(buffer, i, cumulative_local_expert_recv_stats=stats, **options)
        dispatch(buffer, i, cumulative_local_expert_recv_stats=stats, async_with_compute_stream=True, **options)
        return stats.tolist()

    assert WORLD.run(rank_main) == [[7 + 2 * n for n in WORLD.counts(rank)] for rank in range(WORLD.num_ranks)]


def test_the_token_limit_of_a_call_numbers_the_tokens_at_large():
    def rank_main(buffer, i):
        return dispatch(buffer, i, num_max_tokens_per_rank=100)[3]

    for rank, handle in enumerate(WORLD.run(rank_main)):
        arrivals = WORLD.arrivals(rank)
        assert handle.num_max_tokens_per_rank == 100
        assert handle.recv_src_metadata[:, 0].tolist() == [source * 100 + token for source, token in arrivals]
        slots = handle.dst_buffer_slot_idx
        assert (slots[slots >= 0] // 100 == rank).all()


def test_without_the_hybrid_mode_all_ranks_are_one_scaleup_domain(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    for rank, b in enumerate(WORLD.run(lambda buffer, _: buffer, allow_hybrid_mode=False)):
        assert b.get_physical_domain_size() == (b.num_rdma_ranks, b.num_nvlink_ranks) == (2, 2)
        assert b.get_logical_domain_size() == (b.num_scaleout_ranks, b.num_scaleup_ranks) == (1, 4)
        assert (b.scaleout_rank_idx, b.scaleup_rank_idx) == (0, rank)
        assert b.num_allocated_qps == 17


def test_the_constructors_token_limit_holds_and_may_be_reached():
    def rank_main(buffer, i):
        return len(dispatch(buffer, i)[0])

    assert ONE.run(rank_main, num_max_tokens_per_rank=3) == [len(ONE.arrivals(0))]
    with pytest.raises(RuntimeError, match="num_max_tokens_per_rank=2"):
        ONE.run(rank_main, num_max_tokens_per_rank=2)


@pytest.mark.parametrize("per_host", [4, 2])
def test_weights_of_a_column_without_expert_come_back_as_zero(monkeypatch, per_host):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))

    def rank_main(buffer, i):
        given = i.weights.masked_fill(i.idx < 0, float("nan"))
        x, _, weights, handle, _ = buffer.dispatch(i.x, i.idx, given, num_experts=8)
        return buffer.combine(x, handle, weights)[1]

    for rank, back in enumerate(WORLD.run(rank_main)):
        inputs = WORLD.inputs[rank]
        assert same_bits(back, torch.where(inputs.idx >= 0, inputs.weights, 0.0))
