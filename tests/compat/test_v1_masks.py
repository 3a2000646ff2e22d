"""Masked ranks: neither sent to nor waited for, and nothing of theirs counts."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import anyep
from anyep.compat import deep_ep
from anyep.compat.deep_ep.native import Natives
from anyep.testing.processes import RankProcesses
from tests.compat.v1_oracle import E, make_inputs, on_ranks, same_bits

H, TMAX = 128, 24
SHRINK = {"low_latency_mode": True, "enable_shrink": True}


@pytest.fixture(params=[None, "2", "1"], ids=["one host", "2 a host", "1 a host"])
def hosts(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setenv("ANYEP_RANKS_PER_HOST", request.param)


def step(buffer, mine, experts=E, most=TMAX):
    """A decode step whose experts return what they get."""
    x, count, handle, _, _ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, most, experts, use_fp8=False)
    out, _, _ = buffer.low_latency_combine(x, mine.topk_idx, mine.topk_weights, handle)
    return x, count, handle, out


def without(given, rank, masked, experts=E):
    """What ``rank``'s sum is when the experts of masked ranks do not answer."""
    mine = given[rank]
    owner = torch.where(mine.topk_idx < 0, -1, mine.topk_idx // (experts // len(given)))
    weights = mine.topk_weights.masked_fill(torch.isin(owner, torch.tensor([-1, *masked])), 0)
    total = torch.zeros(mine.x.shape)
    for column in range(weights.shape[1]):
        total = total + mine.x.float() * weights[:, column : column + 1]
    return total.bfloat16()


def check_going_on(given, away, experts=E, *, most=TMAX, steps=2):
    """Let one rank rest after a step, which the others mask; hold all that they get against plain torch."""
    ranks, local = len(given), experts // len(given)
    present = [rank for rank in range(ranks) if rank != away]

    def rank_main(buffer):
        mine = given[buffer.rank]
        assert same_bits(step(buffer, mine, experts, most)[3], without(given, buffer.rank, [], experts))
        if buffer.rank != away:
            buffer.low_latency_update_mask_buffer(away, True)
            status = torch.full((ranks,), 7, dtype=torch.int32)
            buffer.low_latency_query_mask_buffer(status)
            assert status.tolist() == [int(rank == away) for rank in range(ranks)]
            for _ in range(steps):
                x, count, handle, out = step(buffer, mine, experts, most)
                assert same_bits(out, without(given, buffer.rank, [away], experts))
                assert (handle[1][:, away] & 0xFFFFFFFF == 0).all()
                for expert in range(local):
                    wanted = [
                        given[source].x[token]
                        for source in present
                        for token, row in enumerate(given[source].topk_idx.tolist())
                        if buffer.rank * local + expert in row
                    ]
                    assert count[expert] == len(wanted)
                    assert not wanted or same_bits(x[expert, : len(wanted)], torch.stack(wanted))
        buffer.group.allgather(b"all have gone on")
        return True

    assert on_ranks(ranks, rank_main, **SHRINK) == [True] * ranks


def test_a_rank_that_does_not_call_is_left_out_and_taken_in_again(hosts):
    check_going_on(make_inputs([9, 24, 5], hidden=H), away=1)


def test_a_token_whose_experts_are_all_masked_is_zero(hosts):
    idx = torch.tensor([[6, 7], [0, 7], [-1, -1]])
    x = torch.ones(3, H).bfloat16()

    def rank_main(buffer):
        step(buffer, make_inputs([2, 2], hidden=H)[buffer.rank])
        if buffer.rank == 0:
            buffer.low_latency_update_mask_buffer(1, mask=True)
            rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, TMAX, E, use_fp8=False)
            out, _, _ = buffer.low_latency_combine(rows, idx, torch.ones(3, 2), handle)
            assert out[:, 0].tolist() == [0, 1, 0]

    on_ranks(2, rank_main, **SHRINK)


def test_masks_set_between_calls_hold_for_the_combine_and_for_several_dispatches_under_way():
    given = make_inputs([9, 24, 5], hidden=H)
    rested = threading.Barrier(3)

    def begin(buffer):
        mine = given[buffer.rank]
        return buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, TMAX, E, use_fp8=False, return_recv_hook=True
        )  # fmt: skip

    def total(buffer, begun):
        mine = given[buffer.rank]
        return buffer.low_latency_combine(begun[0], mine.topk_idx, mine.topk_weights, begun[2])[0]

    def rank_main(buffer):
        begun = begin(buffer)
        begun[4]()
        if buffer.rank != 1:
            buffer.low_latency_update_mask_buffer(1, True)
            assert same_bits(total(buffer, begun), without(given, buffer.rank, [1]))
            copies = tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in begun[2])
            assert same_bits(total(buffer, (*begun[:2], copies)), without(given, buffer.rank, [1]))
            for _ in range(3):
                several = [begin(buffer) for _ in range(3)]
                for begun in reversed(several):
                    begun[4]()
                    assert same_bits(total(buffer, begun), without(given, buffer.rank, [1]))
                    assert not (begun[2][1][:, 1] & 0xFFFFFFFF).any()
        rested.wait(20)
        return True

    assert on_ranks(3, rank_main, **SHRINK) == [True] * 3


def test_cleaning_takes_every_rank_in_again(hosts):
    given = make_inputs([9, 24], hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        step(buffer, mine)
        buffer.low_latency_update_mask_buffer(1 - buffer.rank, True)
        buffer.low_latency_clean_mask_buffer()
        status = torch.ones(2, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, 0]
        *_, out = step(buffer, mine)
        assert same_bits(out, without(given, buffer.rank, []))

    on_ranks(2, rank_main, **SHRINK)


def test_masks_need_shrink_mode_and_a_rank_of_the_group():
    def rank_main(buffer):
        for call in (
            lambda: buffer.low_latency_update_mask_buffer(0, True),
            lambda: buffer.low_latency_query_mask_buffer(torch.zeros(1, dtype=torch.int32)),
            buffer.low_latency_clean_mask_buffer,
        ):
            with pytest.raises(RuntimeError, match="Shrink mode must be enabled"):
                call()

    def shrinking(buffer):
        with pytest.raises(RuntimeError, match="no rank 5"):
            buffer.low_latency_update_mask_buffer(5, True)
        with pytest.raises(RuntimeError, match="itself"):
            buffer.low_latency_update_mask_buffer(0, True)
        with pytest.raises(RuntimeError, match="mask_status"):
            buffer.low_latency_query_mask_buffer(torch.zeros(1))

    on_ranks(1, rank_main, low_latency_mode=True)
    on_ranks(1, shrinking, **SHRINK)


def outlive(group, rank, ranks_per_host):
    os.environ["ANYEP_RANKS_PER_HOST"] = str(ranks_per_host)
    given = make_inputs([9, 24, 5], hidden=H)
    buffer = deep_ep.Buffer(group, low_latency_mode=True, enable_shrink=True, explicitly_destroy=True)
    step(buffer, given[rank])
    if rank == 2:
        os.kill(os.getpid(), 9)
    buffer.low_latency_update_mask_buffer(2, True)
    for _ in range(3):
        *_, out = step(buffer, given[rank])
        assert same_bits(out, without(given, rank, [2]))
    buffer.destroy()
    return "went on"


@pytest.mark.parametrize("ranks_per_host", [3, 2, 1])
def test_the_survivors_of_a_rank_that_died_go_on_once_they_have_masked_it(ranks_per_host):
    with RankProcesses(3, outlive, ranks_per_host) as ranks:
        outcomes = ranks.outcomes(timeout_s=60)
    assert [outcome.how for outcome in outcomes] == ["returned", "returned", "died"], [o.tell() for o in outcomes]


def test_a_rank_cannot_leave_out_itself_or_ranks_that_do_not_exist():
    def rank_main(member):
        with anyep.Buffer(member, hidden=8, num_experts=2, num_topk=1, max_tokens_per_rank=2) as ep:
            with pytest.raises(ValueError, match="itself"):
                ep.leave_out([0])
            with pytest.raises(ValueError, match="at most 0"):
                ep.leave_out([1])

    anyep.local_group(1).run(rank_main)


def miss(group, rank):
    given = make_inputs([9, 24, 5], hidden=H)
    buffer = deep_ep.Buffer(group, low_latency_mode=True, enable_shrink=True, explicitly_destroy=True)
    step(buffer, given[rank])
    if rank == 2:
        os.kill(os.getpid(), 9)
    for _ in range(3):  # the first time it is missed, then it is masked
        *_, out = step(buffer, given[rank])
        assert same_bits(out, without(given, rank, [2]))
    status = torch.zeros(3, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    with pytest.raises(RuntimeError, match="expelled"):
        buffer.low_latency_clean_mask_buffer()
    buffer.destroy()
    return status.tolist()


def test_a_rank_that_died_is_masked_by_the_call_that_misses_it():
    with RankProcesses(3, miss) as ranks:
        outcomes = ranks.outcomes(timeout_s=60)
    assert [outcome.value for outcome in outcomes[:2]] == [[0, 0, 1]] * 2, [o.tell() for o in outcomes]


def check_silence(where, monkeypatch):
    """Let rank 1 be silent in a call until the others have masked it; then it calls, and learns it."""
    monkeypatch.setitem(Natives.__init__.__kwdefaults__, "timeout_s", 1.0)
    given = make_inputs([9, 24, 5], hidden=H)
    went_on = threading.Barrier(3)

    def rank_main(buffer):
        mine = given[buffer.rank]
        step(buffer, mine)
        if buffer.rank == 1:
            late = lambda: step(buffer, mine)  # noqa: E731
            if where == "combine":
                x, _, handle, *_ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, TMAX, E, use_fp8=False)
                late = lambda: buffer.low_latency_combine(x, mine.topk_idx, mine.topk_weights, handle)  # noqa: E731
            went_on.wait(60)
            with pytest.raises(anyep.PeerLost, match=r"rank 1 \(this rank\)"):
                late()
            return
        for _ in range(3):
            *_, handle, out = step(buffer, mine)
            assert same_bits(out, without(given, buffer.rank, [1]))
        assert (handle[1][:, 1] & 0xFFFFFFFF == 0).all()
        status = torch.zeros(3, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, 1, 0]
        with pytest.raises(RuntimeError, match="expelled"):
            buffer.low_latency_clean_mask_buffer()
        went_on.wait(60)

    on_ranks(3, rank_main, **SHRINK)


@pytest.mark.parametrize("where", ["dispatch", "combine"])
def test_a_silent_rank_is_masked_when_time_is_up_and_learns_it_when_it_calls(where, monkeypatch):
    check_silence(where, monkeypatch)


def test_between_hosts_a_mask_set_behind_a_dispatch_is_for_the_next_one(monkeypatch):
    """Others forward then than those to whom the rows went, so that the dispatch's own combine is refused."""
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    given = make_inputs([9, 24, 5], hidden=H)
    rested = threading.Barrier(3)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, handle, _, _ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, TMAX, E, use_fp8=False)
        if buffer.rank != 1:
            buffer.low_latency_update_mask_buffer(1, True)
            with pytest.raises(ValueError, match="others were left out when this handle was made"):
                buffer.low_latency_combine(x, mine.topk_idx, mine.topk_weights, handle)
            *_, out = step(buffer, mine)
            assert same_bits(out, without(given, buffer.rank, [1]))
        rested.wait(20)
        return True

    assert on_ranks(3, rank_main, **SHRINK) == [True] * 3


def test_between_hosts_masks_that_are_refused_stay_as_they_were(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "1")

    def rank_main(buffer):
        mine = make_inputs([2, 2], hidden=H)[buffer.rank]
        begun = buffer.low_latency_dispatch(mine.x, mine.topk_idx, TMAX, E, use_fp8=False, return_recv_hook=True)
        with pytest.raises(RuntimeError, match="operations are in flight"):
            buffer.low_latency_update_mask_buffer(1 - buffer.rank, True)
        status = torch.ones(2, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(status)
        assert not status.any()
        begun[4]()
        step(buffer, mine)
        return True

    assert on_ranks(2, rank_main, **SHRINK) == [True] * 2
