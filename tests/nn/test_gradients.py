"""Outputs and gradients are those of one process that has all experts."""

from __future__ import annotations

import pytest
import torch

from anyep import nn
from tests.nn.reference import (
    E,
    H,
    K,
    assert_close,
    assert_results,
    collect,
    dense_sum,
    local,
    make_case,
    on_ranks,
    reference,
)

TOKENS = {1: (9,), 2: (9, 4), 3: (7, 0, 5), 4: (5, 3, 0, 8)}


def play(case, **how):
    """One forward and backward of the hook on every rank."""

    def rank_main(pair):
        modules = local(pair)
        layer = nn.Experts(pair, modules, reduce=how.get("reduce", "expert"))
        x = case.x[pair.rank].clone().requires_grad_()
        weights = case.weights[pair.rank].clone().requires_grad_()
        out = layer(x, case.idx[pair.rank], weights)
        out.backward(case.grad[pair.rank])
        return collect(pair, modules, out, x, weights)

    return on_ranks(case.num_ranks, rank_main, **how.get("options", {}))


@pytest.mark.parametrize("reduce", ["expert", "rank"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_they_are_the_dense_ones_on_any_number_of_ranks(num_ranks, reduce):
    case = make_case(TOKENS[num_ranks], seed=num_ranks)
    assert_results(play(case, reduce=reduce), reference(case))


@pytest.mark.parametrize(
    "options",
    [
        {"expert_alignment": 4},
        {"static_rows": 60},
        {"placement": [2, 0, 0, 2, 2, 0]},
        {"eager_bytes": 0},
        {"gradient_wire": "fp32", "wire": "fp32"},
    ],
    ids=["padded groups", "a fixed number of rows", "a rank without experts", "rows that go directly", "one buffer"],
)
def test_they_are_the_dense_ones_however_the_buffer_is_made(options):
    case = make_case((7, 2, 5), seed=5)
    assert_results(play(case, options=options), reference(case))


def test_they_are_the_dense_ones_when_nobody_has_tokens():
    case = make_case((0, 0))
    assert_results(play(case), reference(case))


def test_they_are_the_dense_ones_when_all_go_to_one_rank():
    case = make_case((6, 6), seed=3, unused=range(3, 6))
    case.idx[0][case.idx[0] == 3] = -1
    case.idx[1][case.idx[1] == 3] = -1
    assert_results(play(case), reference(case))


def test_the_output_has_the_same_bits_on_any_number_of_ranks():
    """An expert that computes number by number gives a row's output the same bits in any batch."""
    case = make_case((9,), seed=8)
    weights = torch.randn(E, H, generator=torch.Generator().manual_seed(1))

    def rank_main(pair):
        share = torch.arange(9)[pair.rank :: pair.num_ranks]
        own = weights[pair.local_experts]
        layer = nn.Experts(pair, lambda batch: batch.x * own.repeat_interleave(torch.tensor(batch.counts), dim=0))
        x = case.x[0][share].requires_grad_()
        factors = case.weights[0][share].requires_grad_()
        out = layer(x, case.idx[0][share], factors)
        out.backward(case.grad[0][share])
        return share, out.detach(), x.grad, factors.grad

    whole = on_ranks(1, rank_main)[0]
    for num_ranks in (2, 3, 4):
        for share, *parts in on_ranks(num_ranks, rank_main):
            for part, expected in zip(parts, whole[1:], strict=True):
                assert torch.equal(part, expected[share])


def test_compact_rows_have_gradients_too():
    """One row a rank: the experts of a row are added up where they are, and weights of others get no gradient."""
    case = make_case((7, 0, 5), seed=2)
    expected = reference(case)

    def rank_main(pair):
        modules = local(pair)
        x = case.x[pair.rank].clone().requires_grad_()
        weights = case.weights[pair.rank].clone().requires_grad_()
        batch = nn.dispatch(pair, x, case.idx[pair.rank], weights, layout="compact")
        out = nn.combine(dense_sum(modules, batch.x, batch.topk_idx, batch.topk_weights), batch)
        out.backward(case.grad[pair.rank])
        return collect(pair, modules, out, x, weights)

    assert_results(on_ranks(3, rank_main), expected)


@pytest.mark.parametrize("layout", ["expert", "compact"])
def test_weights_that_travel_back_have_gradients(layout):
    """combine(topk_weights) is the adjoint of dispatch's: columns that a row does not serve are not its business."""
    case = make_case((6, 4), seed=6)

    def rank_main(pair):
        idx, weights = case.idx[pair.rank], case.weights[pair.rank].clone().requires_grad_()
        batch = nn.dispatch(pair, case.x[pair.rank], idx, weights, layout=layout)
        back = nn.combine(batch.x, batch, topk_weights=batch.topk_weights.square() + 7)
        (back.topk_weights * torch.arange(1, K + 1)).sum().backward()
        return back.topk_weights.detach(), weights.grad

    for rank, (back, grad) in enumerate(on_ranks(2, rank_main)):
        sent = (case.idx[rank] >= 0).float()
        assert_close(back, (case.weights[rank].square() + 7) * sent)
        assert_close(grad, 2 * case.weights[rank] * torch.arange(1, K + 1) * sent)


def test_gradcheck_agrees():
    """On one rank alone, as every evaluation has to come on all of them; fp32, so with a coarse step."""
    case = make_case((4,), seed=4)
    idx = case.idx[0]

    def rank_main(pair):
        def layer(x, weights):
            batch = nn.dispatch(pair, x, idx, weights)
            return nn.combine(batch.x * batch.row_weights().unsqueeze(1), batch)

        inputs = case.x[0].clone().requires_grad_(), case.weights[0].clone().requires_grad_()
        return torch.autograd.gradcheck(layer, inputs, eps=1e-2, atol=1e-3, rtol=1e-3, nondet_tol=0.0)

    with pytest.warns(UserWarning, match="double precision"):
        assert on_ranks(1, rank_main) == [True]


def test_the_gradient_of_a_gradient():
    """x * x * w, summed: d/dw of the sum of d/dx is 2 x."""
    case = make_case((5, 0, 3), seed=9)

    def rank_main(pair):
        x = case.x[pair.rank].clone().requires_grad_()
        weights = case.weights[pair.rank].clone().requires_grad_()
        batch = nn.dispatch(pair, x, case.idx[pair.rank], weights)
        out = nn.combine(batch.x * batch.x * batch.row_weights().unsqueeze(1), batch)
        (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), (weights, x))

    for rank, (by_weights, by_x) in enumerate(on_ranks(3, rank_main)):
        sent = (case.idx[rank] >= 0).float()
        assert_close(by_weights, sent * 2 * case.x[rank].sum(dim=1, keepdim=True))
        assert_close(by_x, 2 * (case.weights[rank] * sent).sum(dim=1, keepdim=True).expand(-1, H))


def test_two_combines_of_one_dispatch():
    case = make_case((5, 3), seed=10)

    def rank_main(pair):
        x = case.x[pair.rank].clone().requires_grad_()
        batch = nn.dispatch(pair, x, case.idx[pair.rank])
        (nn.combine(batch.x * 2, batch) + nn.combine(batch.x * batch.x, batch)).sum().backward()
        return x.grad

    for rank, grad in enumerate(on_ranks(2, rank_main)):
        times = (case.idx[rank] >= 0).sum(dim=1, keepdim=True)
        assert_close(grad, times * (2 + 2 * case.x[rank]))


def test_the_same_way_again():
    """A second batch along a way: no layout and counts, and gradients of its own."""
    case = make_case((5, 3), seed=11)

    def rank_main(pair):
        idx = case.idx[pair.rank]
        first = nn.dispatch(pair, case.x[pair.rank], idx)
        before = pair.forward.stats()
        x = case.grad[pair.rank].clone().requires_grad_()
        again = nn.dispatch(pair, x, idx, way=first.way)
        nn.combine(again.x * 3, again).sum().backward()
        after = pair.forward.stats()
        return x.grad, after.dispatches - before.dispatches, after.cached_dispatches - before.cached_dispatches

    for rank, (grad, plain, cached) in enumerate(on_ranks(2, rank_main)):
        assert_close(grad, 3.0 * (case.idx[rank] >= 0).sum(dim=1, keepdim=True).expand(-1, H))
        assert (plain, cached) == (0, 2)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "every other"])
def test_gradients_and_inputs_of_any_strides(kind):
    case = make_case((6, 5), seed=12)

    def odd(t):
        if kind == "transposed":
            return t.t().contiguous().t()
        if kind == "every other":
            return torch.stack([t, t + 1], dim=2)[..., 0]
        return t

    def rank_main(pair):
        rank = pair.rank
        x = odd(case.x[rank]).detach().requires_grad_()
        weights = odd(case.weights[rank]).detach().requires_grad_()
        batch = nn.dispatch(pair, x, case.idx[rank], weights)
        out = nn.combine(odd(batch.x * batch.row_weights().unsqueeze(1)), batch)
        grad = torch.ones(1, 1).expand(out.shape) if kind == "expanded" else odd(torch.ones(out.shape))
        out.backward(grad)
        return out.detach(), x.grad, weights.grad

    for rank, (out, grad_x, grad_weights) in enumerate(on_ranks(2, rank_main)):
        sent = (case.idx[rank] >= 0).float()
        factor = (case.weights[rank] * sent).sum(dim=1, keepdim=True)
        assert_close(out, factor * case.x[rank])
        assert_close(grad_x, factor.expand(-1, H))
        assert_close(grad_weights, sent * case.x[rank].sum(dim=1, keepdim=True))
