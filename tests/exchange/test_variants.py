"""Variants: rows of other kinds in one buffer, results whose tensors are known before they are filled, staged sums."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import anyep
from anyep.exchange.wire import carrying_wire, make_wire

E, K, T, H = 8, 3, 20, 64
RING = 8
"""Desks of a buffer: operations up to where memory comes into use again."""


def on_ranks(num_ranks, rank_main, eager_bytes=None):
    def main(member):
        with anyep.Buffer(
            member,
            hidden=8,
            num_experts=E,
            num_topk=1,
            max_tokens_per_rank=4,
            timeout_s=20,
            arena_bytes=0,
            eager_bytes=eager_bytes,
        ) as ep:
            return rank_main(ep)

    return anyep.local_group(num_ranks).run(main)


def routing(rank, tokens=T):
    generator = torch.Generator().manual_seed(rank)
    return torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(tokens)])


def rows(rank, dtype, width=H, tokens=T):
    generator = torch.Generator().manual_seed(100 + rank)
    size = dtype.itemsize * width
    return torch.randint(0, 256, (tokens, size), dtype=torch.uint8, generator=generator).view(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def compact(**more):
    return {"num_topk": K, "max_tokens_per_rank": 1 << 30} | more


@pytest.mark.parametrize("eager_bytes", [0, 1 << 20])
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.int16, torch.float64, torch.complex64, torch.float8_e5m2]
)
def test_rows_of_any_dtype_arrive_as_they_are_with_their_token_numbers(dtype, eager_bytes):
    def rank_main(ep):
        x = rows(ep.rank, dtype, 7)
        other = ep.variant(wire=carrying_wire(dtype, 7, 0, torch.float32), **compact(source_tokens=True))
        received = other.dispatch(x, routing(ep.rank))
        begin = 0
        for source in range(3):
            count = int(received.handle.pair_rows[source, ep.rank])
            tokens = received.source_token[begin : begin + count].long()
            assert torch.equal(bits(received.x[begin : begin + count]), bits(rows(source, dtype, 7))[tokens])
            begin += count
        assert begin == len(received.x)
        assert received.x.dtype == dtype

    on_ranks(3, rank_main, eager_bytes)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int32])
def test_any_number_of_scales_travels_with_its_row(scale_dtype):
    def rank_main(ep):
        wire = carrying_wire(torch.int8, H, 5, scale_dtype)
        x, scales = rows(ep.rank, torch.int8), torch.arange(T * 5).view(5, T).T.to(scale_dtype)
        received = ep.variant(wire=wire, **compact(source_tokens=True)).dispatch((x, scales), routing(ep.rank))
        assert torch.equal(received.scales, scales[received.source_token.long()])

    on_ranks(2, rank_main)


def test_a_handle_serves_rows_of_another_kind():
    def rank_main(ep):
        idx = routing(ep.rank)
        first = ep.variant(wire=make_wire("bf16", "fp32", H), **compact()).dispatch(torch.ones(T, H).bfloat16(), idx)
        other = ep.variant(wire=carrying_wire(torch.float64, 3, 0, torch.float32), **compact())
        again = other.dispatch(torch.full((T, 3), float(ep.rank), dtype=torch.float64), handle=first.handle)
        sums = other.combine(again.x.float(), first.handle)
        reach = (idx // (E // 2)).unsqueeze(2).eq(torch.arange(2)).any(1).sum(1)
        assert torch.equal(sums[:, 0], ep.rank * reach.float())

    on_ranks(2, rank_main)


def test_sums_by_a_handle_that_outlives_the_variant_which_summed_first():
    """What was worked out for the first sums stays with the handle, also what the variant that has gone had made."""

    def rank_main(ep):
        def variant():
            return ep.variant(wire=carrying_wire(torch.uint8, 2, 0, torch.float32), **compact())

        received = variant().dispatch(rows(ep.rank, torch.uint8, 2, 6), routing(ep.rank, 6))
        y = received.x.to(torch.bfloat16)
        first = variant()
        expected = [first.combine(y, received.handle) for _ in range(RING)]
        del first
        gc.collect()
        reused = [np.full(2, 64, np.int64) for _ in range(100)]
        before = ep.stats().eager_rows
        sums = [variant().combine(-y, received.handle) for _ in range(RING)]
        assert ep.stats().eager_rows > before
        assert len(reused) == 100
        assert all(torch.equal(one, -expected[0]) for one in sums)

    on_ranks(2, rank_main, eager_bytes=1 << 20)


def test_ranks_with_other_rows_all_hear_of_it():
    def rank_main(ep):
        wire = carrying_wire(torch.uint8, 8 + ep.rank, 0, torch.float32)
        with pytest.raises(ValueError, match="bytes a row is 8 on rank 0 and 9 on rank 1"):
            ep.variant(wire=wire, **compact()).dispatch(rows(0, torch.uint8, 8 + ep.rank), routing(0))
        ep.barrier()

    on_ranks(2, rank_main)


def test_counts_of_experts_can_be_given_where_columns_stand_for_ranks():
    def rank_main(ep):
        first_of_rank = torch.tensor([[0, 4], [-1, 4]], dtype=torch.int32)
        ranks = ep.variant(wire=make_wire("bf16", "fp32", H), **compact(num_topk=2))
        given = torch.arange(E, dtype=torch.int32)
        received = ranks.dispatch(torch.zeros(2, H).bfloat16(), first_of_rank, expert_rows=given)
        assert received.counts == (2 * given).tolist()[4 * ep.rank : 4 * ep.rank + 4]
        assert len(received.x) == [2, 4][ep.rank]

    on_ranks(2, rank_main)


@pytest.mark.parametrize("scales", ["fp32", "ue8m0"])
def test_the_tensors_of_a_padded_batch_are_known_before_they_are_filled(scales):
    def rank_main(ep):
        decode = ep.variant(wire=make_wire("fp8", scales, H), num_topk=K, max_tokens_per_rank=T)
        pending = decode.dispatch(rows(ep.rank, torch.int16).float(), routing(ep.rank), layout="padded", wait=False)
        targets = pending.targets
        inside = targets.x[1, 2:]
        received = pending.wait()
        assert targets.x.data_ptr() == received.x.data_ptr()
        assert targets.scales.data_ptr() == received.scales.data_ptr()
        assert targets.scales.stride() == received.scales.stride()
        assert targets.source_token.data_ptr() == received.source_token.data_ptr()
        assert torch.equal(bits(inside), bits(received.x[1, 2:]))
        same = decode.dispatch(rows(ep.rank, torch.int16).float(), routing(ep.rank), layout="padded")
        for expert, count in enumerate(received.counts):
            assert torch.equal(bits(same.x[expert, :count]), bits(received.x[expert, :count]))
            assert torch.equal(same.scales[expert, :count], received.scales[expert, :count])

    on_ranks(2, rank_main)


def test_the_tensors_of_a_sum_are_known_before_they_are_filled():
    def rank_main(ep):
        plain = ep.variant(wire=make_wire("bf16", "fp32", H), **compact())
        weights = torch.rand(T, K, generator=torch.Generator().manual_seed(ep.rank))
        received = plain.dispatch(torch.ones(T, H).bfloat16(), routing(ep.rank), weights)
        pending = plain.combine(received.x, received.handle, topk_weights=received.topk_weights, wait=False)
        targets = pending.targets
        combined = pending.wait()
        assert targets.x is combined.x
        assert targets.topk_weights is combined.topk_weights
        assert torch.equal(combined.topk_weights, weights)

    on_ranks(2, rank_main)


@pytest.mark.parametrize("num_bias", [0, 2])
@pytest.mark.parametrize(("num_ranks", "group"), [(4, 2), (3, 2), (4, 1), (4, 9)])
def test_partial_sums_of_groups_are_rounded_before_they_are_added(num_ranks, group, num_bias):
    def rank_main(ep):
        plain = ep.variant(wire=make_wire("bf16", "fp32", H), **compact())
        idx = routing(ep.rank).clone()
        idx[3] = -1
        received = plain.dispatch(torch.zeros(T, H).bfloat16(), idx)
        bias = [torch.randn(T, H).bfloat16() for _ in range(num_bias)]
        y = torch.randn(len(received.x), H, generator=torch.Generator().manual_seed(ep.rank)).bfloat16()
        out = plain.combine(y, received.handle, bias=bias, group=group)
        return idx, bias, y, received.handle.pair_rows.copy(), out

    results = on_ranks(num_ranks, rank_main)
    expert_rank = torch.arange(num_ranks).repeat_interleave(-(-E // num_ranks))[:E]
    if E % num_ranks:
        expert_rank = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    for rank, (idx, bias, _, pair_rows, out) in enumerate(results):
        slot = [0] * num_ranks
        for token in range(T):
            owners = sorted({int(expert_rank[e]) for e in idx[token] if e >= 0})
            total = sum((one[token].float() for one in bias), torch.zeros(H))
            for first in range(0, num_ranks, group):
                members = [owner for owner in owners if first <= owner < first + group]
                part = torch.zeros(H)
                for owner in members:
                    begin = int(pair_rows[:rank, owner].sum())
                    part = part + results[owner][2][begin + slot[owner]].float()
                    slot[owner] += 1
                total = total + part.bfloat16().float()
            assert torch.equal(out[token], total.bfloat16())


def test_groups_are_refused_where_rows_are_grouped_by_expert():
    def rank_main(ep):
        plain = ep.variant(wire=make_wire("bf16", "fp32", H), **compact())
        received = plain.dispatch(torch.zeros(T, H).bfloat16(), routing(ep.rank), layout="expert")
        with pytest.raises(ValueError, match="layout='compact'"):
            plain.combine(received.x, received.handle, group=2)

    on_ranks(1, rank_main)
