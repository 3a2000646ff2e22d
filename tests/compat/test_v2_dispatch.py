"""V2 dispatch, rows as they come: what arrives where, and the handle that tells of it."""

from __future__ import annotations

import pytest
import torch

from tests.compat.v2_world import World, poisoned, same_bits  # noqa: F401

WORLD = World()
WORLDS = [
    WORLD,
    World(num_tokens=(6,), num_experts=5),
    World(num_tokens=(4, 3), num_topk=1),
    World(num_tokens=(3, 9, 1), num_experts=6, num_topk=7, hidden=1),
    World(num_tokens=(0, 0)),
]


def dispatch(buffer, inputs, **options):
    return buffer.dispatch(inputs.x, inputs.idx, inputs.weights, num_experts=WORLD.num_experts, **options)


@pytest.mark.parametrize("world", WORLDS)
def test_tokens_arrive_once_a_rank_in_the_order_of_source_and_token(world):
    results = world.run(lambda buffer, i: buffer.dispatch(i.x, i.idx, i.weights, num_experts=world.num_experts)[0])
    for rank, x in enumerate(results):
        expected = [world.inputs[source].x[token] for source, token in world.arrivals(rank)]
        assert same_bits(x, torch.stack(expected) if expected else torch.zeros(0, world.hidden).bfloat16())


@pytest.mark.parametrize("world", WORLDS)
def test_indices_are_local_where_this_rank_owns_the_expert_and_minus_one_elsewhere(world):
    results = world.run(lambda buffer, i: buffer.dispatch(i.x, i.idx, i.weights, num_experts=world.num_experts)[1])
    for rank, idx in enumerate(results):
        assert idx.tolist() == [world.local_idx(rank, *arrival) for arrival in world.arrivals(rank)]
        assert idx.dtype == torch.int64


def test_weights_arrive_as_they_were_given_in_columns_of_other_ranks_too():
    for rank, weights in enumerate(WORLD.run(lambda buffer, i: dispatch(buffer, i)[2])):
        expected = [WORLD.inputs[source].weights[token] for source, token in WORLD.arrivals(rank)]
        assert same_bits(weights, torch.stack(expected))


def test_without_weights_none_arrive():
    results = WORLD.run(lambda buffer, i: buffer.dispatch(i.x, i.idx, num_experts=8)[2])
    assert results == [None] * WORLD.num_ranks


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int16, torch.float32, torch.complex128])
def test_rows_of_any_dtype_arrive_bit_by_bit(dtype):
    def data(inputs):
        return (inputs.x * 8).to(torch.int8).view(torch.uint8).repeat(1, dtype.itemsize).view(dtype)

    results = WORLD.run(lambda buffer, i: buffer.dispatch(data(i), i.idx, num_experts=8)[0])
    for rank, x in enumerate(results):
        expected = [data(WORLD.inputs[source])[token] for source, token in WORLD.arrivals(rank)]
        assert same_bits(x, torch.stack(expected))


def fp8_and_scales(inputs, packs, dtype, strided):
    generator = torch.Generator().manual_seed(len(inputs.x))
    words = torch.randint(-(2**31), 2**31, (len(inputs.x), packs), generator=generator).int()
    scales = words.view(dtype)
    return inputs.x.to(torch.float8_e4m3fn), scales.t().contiguous().t() if strided else scales


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("packs", "dtype"), [(1, torch.float32), (3, torch.int32), (7, torch.float32)])
def test_any_number_of_scales_arrives_row_major_whatever_their_strides(packs, dtype, strided):
    def rank_main(buffer, i):
        return buffer.dispatch(fp8_and_scales(i, packs, dtype, strided), i.idx, num_experts=8)[0]

    for rank, (x, scales) in enumerate(WORLD.run(rank_main)):
        sent = [fp8_and_scales(inputs, packs, dtype, False) for inputs in WORLD.inputs]
        assert same_bits(x, torch.stack([sent[s][0][t] for s, t in WORLD.arrivals(rank)]))
        assert same_bits(scales, torch.stack([sent[s][1][t] for s, t in WORLD.arrivals(rank)]))
        assert scales.is_contiguous()


@pytest.mark.parametrize("expand", [False, True])
def test_scales_for_a_tensor_memory_accelerator_are_columns_of_whole_16_bytes(expand):
    def rank_main(buffer, i):
        given = fp8_and_scales(i, 3, torch.float32, False)
        options = {"num_experts": 8, "do_expand": expand, "expert_alignment": 2}
        plain = buffer.dispatch(given, i.idx, **options)[0]
        turned = buffer.dispatch(given, i.idx, use_tma_aligned_col_major_sf=True, **options)[0]
        return plain[1], turned[1]

    for plain, turned in WORLD.run(rank_main):
        assert turned.stride() == (1, -(-len(turned) // 4) * 4)
        assert same_bits(plain, turned)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_indices_keep_their_width(dtype):
    results = WORLD.run(lambda buffer, i: buffer.dispatch(i.x, i.idx.to(dtype), num_experts=8)[1])
    assert all(idx.dtype == dtype for idx in results)


def test_an_expert_may_be_named_twice_for_a_token():
    world = World(num_tokens=(1, 0), num_topk=3, num_experts=2)
    world.inputs[0].idx[0] = torch.tensor([1, 1, 0])

    def rank_main(buffer, i):
        compact = buffer.dispatch(i.x, i.idx, num_experts=2)
        expanded = buffer.dispatch(i.x, i.idx, num_experts=2, do_expand=True)
        return compact[0].shape[0], compact[3].num_unaligned_recv_tokens_per_expert.tolist(), expanded[0].shape[0]

    assert world.run(rank_main) == [(1, [1], 1), (1, [2], 2)]


def test_without_waiting_for_the_cpu_the_batch_is_as_large_as_it_can_be_and_its_tail_defined():
    def rank_main(buffer, i):
        x, idx, weights, handle, _ = dispatch(buffer, i, do_cpu_sync=False)
        exact = dispatch(buffer, i)
        return x, idx, weights, handle, exact

    for x, idx, weights, handle, exact in WORLD.run(rank_main):
        rows, valid = WORLD.num_ranks * WORLD.max_tokens, exact[0].shape[0]
        assert [len(one) for one in (x, idx, weights, handle.recv_src_metadata)] == [rows] * 4
        assert (handle.num_recv_tokens, handle.num_recv_tokens_per_expert_list) == (rows, [])
        assert int(handle.psum_num_recv_tokens_per_scaleup_rank[-1]) == valid
        assert same_bits(x[:valid], exact[0])
        assert same_bits(idx[:valid], exact[1])
        assert same_bits(weights[:valid], exact[2])
        assert (x[valid:] == 0).all()
        assert (weights[valid:] == 0).all()
        assert (idx[valid:] == -1).all()


def test_statistics_grow_by_the_tokens_of_each_local_expert_without_padding():
    def rank_main(buffer, i):
        stats = torch.full((WORLD.num_local,), 7, dtype=torch.int32)
        for _ in range(2):
            dispatch(buffer, i, cumulative_local_expert_recv_stats=stats, expert_alignment=16)
        return stats.tolist()

    assert WORLD.run(rank_main) == [[7 + 2 * n for n in WORLD.counts(rank)] for rank in range(WORLD.num_ranks)]


def test_the_token_limit_of_a_call_replaces_the_constructors():
    def rank_main(buffer, i):
        return dispatch(buffer, i, num_max_tokens_per_rank=32, do_cpu_sync=False)[0].shape[0]

    assert WORLD.run(rank_main, num_max_tokens_per_rank=0) == [4 * 32] * 4


def check_order(world, per_host, **options):
    """Dispatch; hold rows, indices, weights and where the handle says that they come from against plain torch."""

    def rank_main(buffer, i):
        x, idx, weights, handle, _ = buffer.dispatch(i.x, i.idx, i.weights, num_experts=world.num_experts)
        return x, idx, weights, handle.recv_src_metadata, handle.psum_num_recv_tokens_per_scaleup_rank

    for rank, (x, idx, weights, metadata, ends) in enumerate(world.run(rank_main, **options)):
        arrivals = world.arrivals(rank)
        if not options.get("deterministic"):
            arrivals.sort(key=lambda arrival: arrival[0] % per_host)
        assert torch.equal(x, torch.stack([world.inputs[s].x[t] for s, t in arrivals] or [x.new_zeros(0)]).view_as(x))
        assert idx.tolist() == [world.local_idx(rank, *arrival) for arrival in arrivals]
        assert weights.tolist() == [world.inputs[s].weights[t].tolist() for s, t in arrivals]
        assert metadata[:, 0].tolist() == [s * world.max_tokens + t for s, t in arrivals]
        assert ends.tolist() == [sum(s % per_host <= scaleup for s, _ in arrivals) for scaleup in range(per_host)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_with_several_hosts_rows_are_grouped_by_scaleup_rank_unless_they_shall_be_sorted(monkeypatch, deterministic):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    check_order(WORLD, 2, deterministic=deterministic)


def test_the_same_rows_may_go_with_another_topk_or_width_of_indices_from_call_to_call():
    def rank_main(buffer, given):
        found = []
        for columns in (4, 2, 4, 1):
            for dtype in (torch.int64, torch.int32):
                idx, weights = given.idx[:, :columns].to(dtype), given.weights[:, :columns]
                x, local, sent, handle, _ = buffer.dispatch(given.x, idx, weights, num_experts=8)
                assert handle.topk_idx.dtype == local.dtype == dtype
                assert local.shape == sent.shape == (len(x), columns)
                assert handle.topk_idx.shape == idx.shape
                found.append(buffer.combine(x, handle)[0].clone())
        with pytest.raises(RuntimeError, match="topk_weights must be float32"):
            buffer.dispatch(given.x, given.idx, given.weights.double(), num_experts=8)
        with pytest.raises(AssertionError, match="topk_idx must be given"):
            buffer.dispatch(given.x, num_experts=8)
        with pytest.raises(RuntimeError, match="topk_idx must be int64"):
            buffer.dispatch(given.x, given.idx.short(), given.weights, num_experts=8)
        return found

    for rank, found in enumerate(World().run(rank_main)):
        x, idx = World().inputs[rank].x, World().inputs[rank].idx
        for sums, columns in zip(found, (4, 4, 2, 2, 4, 4, 1, 1), strict=True):
            ranks = torch.where(idx < 0, -1, idx // 2)[:, :columns]
            copies = torch.stack([(ranks == owner).any(1) for owner in range(4)]).sum(0)
            assert torch.equal(sums, (x.float() * copies.unsqueeze(1)).bfloat16())
