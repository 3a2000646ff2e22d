"""V2 combine: every sum bit by bit in upstream's order, weights from the ranks that own the columns, biases first."""

from __future__ import annotations

import pytest
import torch

from tests.compat.v2_world import World, poisoned, rounded_sum, same_bits  # noqa: F401

WORLDS = {
    1: World(num_tokens=(6,), num_experts=5, num_topk=5),
    2: World(num_tokens=(6, 5), num_experts=8, num_topk=6),
    3: World(num_tokens=(0, 6, 9), num_experts=9, num_topk=7, hidden=37),
    4: World(num_tokens=(7, 6, 0, 9), num_experts=8, num_topk=8),
}
ALIGNMENT = 3


def returned(world: World, rank: int, handle) -> torch.Tensor:
    """Return this rank's outputs: large numbers that cancel and small ones that they swallow, as the order will."""
    generator = torch.Generator().manual_seed(77 + rank)
    numbers = torch.tensor([2.0**26, -(2.0**26), 2.0**9, -(2.0**9), 3.0, 0.5])
    return numbers[torch.randint(len(numbers), (handle.num_rows, world.hidden), generator=generator)].bfloat16()


def expected_token(world: World, rank: int, token: int, outputs, *, expand, multi, per_host, biases) -> torch.Tensor:
    """Return the sum of a token as the reference spells it, one stage after the other."""
    masters = world.masters(rank, token)
    terms: dict[int, torch.Tensor] = {}  # by column
    for owner, master in masters.items():
        y = outputs[owner]
        if not expand:
            terms[master] = y[world.arrivals(owner).index((rank, token))]
            continue
        _, places = world.expanded(owner, ALIGNMENT)
        columns = [k for k in range(world.num_topk) if (rank, token, k) in places]
        rows = [y[places[rank, token, k]] for k in columns]
        if multi:
            terms[master] = rounded_sum(rows)
        else:
            terms |= dict(zip(columns, rows, strict=True))
    if multi and per_host < world.num_ranks:
        hosts: dict[int, list[int]] = {}
        for owner, master in masters.items():
            hosts.setdefault(owner // per_host, []).append(master)
        terms = {max(columns): rounded_sum([terms[k] for k in sorted(columns)]) for columns in hosts.values()}
    parts = [bias[token] for bias in biases] + [terms[k] for k in sorted(terms)]
    return rounded_sum(parts) if parts else torch.zeros(world.hidden).bfloat16()


def check_sums(world: World, *, expand: bool, multi: bool, num_bias: int, per_host: int, **options) -> None:
    def rank_main(buffer, i):
        _, _, _, handle, _ = buffer.dispatch(
            i.x, i.idx, num_experts=world.num_experts, do_expand=expand, expert_alignment=ALIGNMENT, **options
        )
        y = returned(world, buffer.rank_idx, handle)
        bias = (None, i.bias[0], i.bias)[num_bias]
        return y, buffer.combine(y, handle, bias=bias)[0]

    results = world.run(rank_main, allow_multiple_reduction=multi, deterministic=True)
    outputs = [y for y, _ in results]
    for rank, (_, combined) in enumerate(results):
        biases = world.inputs[rank].bias[:num_bias]
        assert combined.shape == world.inputs[rank].x.shape
        for token in range(world.num_tokens[rank]):
            expected = expected_token(
                world, rank, token, outputs, expand=expand, multi=multi, per_host=per_host, biases=biases
            )
            assert torch.equal(combined[token], expected), (rank, token)


@pytest.mark.parametrize("num_bias", [0, 1, 2])
@pytest.mark.parametrize("multi", [True, False])
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_sums_have_the_bits_that_upstreams_order_gives(num_ranks, expand, multi, num_bias):
    check_sums(WORLDS[num_ranks], expand=expand, multi=multi, num_bias=num_bias, per_host=num_ranks)


@pytest.mark.parametrize("num_bias", [0, 1, 2])
@pytest.mark.parametrize("multi", [True, False])
@pytest.mark.parametrize("expand", [False, True])
def test_with_several_hosts_each_host_is_summed_and_rounded_first(monkeypatch, expand, multi, num_bias):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    check_sums(WORLDS[4], expand=expand, multi=multi, num_bias=num_bias, per_host=2)


def test_without_the_hybrid_mode_several_hosts_are_as_one(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    world = WORLDS[4]

    def rank_main(buffer, i):
        handle = buffer.dispatch(i.x, i.idx, num_experts=8)[3]
        return buffer.combine(returned(world, buffer.rank_idx, handle), handle)[0]

    split = world.run(rank_main, allow_hybrid_mode=False)
    monkeypatch.delenv("ANYEP_RANKS_PER_HOST")
    assert all(same_bits(a, b) for a, b in zip(split, world.run(rank_main), strict=True))


@pytest.mark.parametrize("per_host", [4, 2])
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("multi", [True, False])
def test_a_batch_that_did_not_wait_for_the_cpu_goes_back_the_same_way(monkeypatch, expand, multi, per_host):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    world = WORLDS[4]

    def rank_main(buffer, i):
        sums = []
        for sync in (True, False):
            options = {"num_experts": 8, "do_expand": expand, "do_cpu_sync": sync}
            x, _, _, handle, _ = buffer.dispatch(i.x, i.idx, **options)
            sums.append(buffer.combine(x, handle)[0])
        return sums

    results = world.run(rank_main, allow_multiple_reduction=multi)
    assert all(same_bits(exact, open_) for exact, open_ in results)


@pytest.mark.parametrize("per_host", [4, 2])
@pytest.mark.parametrize("expand", [False, True])
def test_weights_come_back_from_the_owner_of_each_column(monkeypatch, expand, per_host):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    world = WORLDS[4]

    def rank_main(buffer, i):
        x, _, weights, handle, _ = buffer.dispatch(i.x, i.idx, i.weights, num_experts=8, do_expand=expand)
        _, back, _ = buffer.combine(x, handle, weights * (buffer.rank_idx + 2))
        return back

    for rank, back in enumerate(world.run(rank_main)):
        inputs = world.inputs[rank]
        owners = inputs.idx.div(world.num_local, rounding_mode="floor")
        assert same_bits(back, torch.where(inputs.idx >= 0, inputs.weights * (owners + 2), 0.0))


def test_what_stands_in_columns_of_other_ranks_does_not_come_back():
    world = WORLDS[4]

    def rank_main(buffer, i):
        x, idx, weights, handle, _ = buffer.dispatch(i.x, i.idx, i.weights, num_experts=8)
        weights[idx < 0] = float("nan")
        return buffer.combine(x, handle, weights)[1]

    for rank, back in enumerate(world.run(rank_main)):
        inputs = world.inputs[rank]
        assert same_bits(back, torch.where(inputs.idx >= 0, inputs.weights, 0.0))


def test_a_batch_in_the_order_of_scaleup_ranks_goes_back_to_its_tokens(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")

    def rank_main(buffer, i):
        x, _, weights, handle, _ = buffer.dispatch(i.x, i.idx, i.weights, num_experts=8)
        return buffer.combine(x, handle, weights)[:2]

    world = World(num_topk=1)
    for rank, (x, weights) in enumerate(world.run(rank_main)):
        inputs = world.inputs[rank]
        named = inputs.idx[:, :1] >= 0
        assert torch.equal(x, torch.where(named, inputs.x, 0.0))
        assert torch.equal(weights, torch.where(named, inputs.weights, 0.0))


def test_rows_of_another_width_than_the_dispatched_ones_come_back():
    def rank_main(buffer, i):
        _, _, _, handle, _ = buffer.dispatch(i.x.to(torch.float8_e4m3fn), i.idx, num_experts=8)
        y = torch.ones(handle.num_rows, 3 * WORLDS[4].hidden).bfloat16()
        return buffer.combine(y, handle)[0]

    for rank, combined in enumerate(WORLDS[4].run(rank_main)):
        copies = [float(len(WORLDS[4].masters(rank, t))) for t in range(WORLDS[4].num_tokens[rank])]
        assert combined.float().tolist() == [[n] * (3 * WORLDS[4].hidden) for n in copies]


def test_strided_gradients_are_taken_as_they_are():
    def rank_main(buffer, i):
        x, _, _, handle, _ = buffer.dispatch(i.x.t().contiguous().t(), i.idx, num_experts=8)
        strided = x[:, :1].expand(-1, x.shape[1])
        dense = buffer.combine(strided.contiguous(), handle)[0]
        return same_bits(buffer.combine(strided, handle)[0], dense)

    assert all(WORLDS[4].run(rank_main))
