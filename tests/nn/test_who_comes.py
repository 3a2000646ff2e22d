"""Every rank comes to every exchange of a backward pass, whatever it sees of the graph; and to none without one."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import anyep
from anyep import nn
from tests.nn.reference import H, assert_close, local, make_case, on_ranks


def test_a_rank_whose_experts_ignore_their_rows():
    case = make_case((5, 4), seed=1)

    def rank_main(pair):
        x = case.x[pair.rank].clone().requires_grad_()
        batch = nn.dispatch(pair, x, case.idx[pair.rank])
        y = torch.ones_like(batch.x).detach() if pair.rank else batch.x * 2
        nn.combine(y, batch).sum().backward()
        return x.grad

    for rank, grad in enumerate(on_ranks(2, rank_main)):
        to_rank_0 = ((case.idx[rank] >= 0) & (case.idx[rank] < 3)).sum(dim=1, keepdim=True)
        assert_close(grad, 2.0 * to_rank_0.expand(-1, H))


def test_a_rank_whose_x_needs_no_gradient():
    case = make_case((5, 0), seed=2)

    def rank_main(pair):
        modules = local(pair)
        x = case.x[pair.rank].clone().requires_grad_(pair.rank == 0)
        layer = nn.Experts(pair, modules)
        layer(x, case.idx[pair.rank], case.weights[pair.rank]).sum().backward()
        return x.grad is not None, all(p.grad is not None for module in modules for p in module.parameters())

    assert on_ranks(2, rank_main) == [(True, True), (False, True)]


@pytest.mark.parametrize("needed", ["x", "weights", "experts"])
def test_only_one_kind_of_gradient_is_asked_for(needed):
    case = make_case((5, 3), seed=3)

    def rank_main(pair):
        modules = local(pair)
        for module in modules:
            module.requires_grad_(needed == "experts")
        x = case.x[pair.rank].clone().requires_grad_(needed == "x")
        weights = case.weights[pair.rank].clone().requires_grad_(needed == "weights")
        nn.Experts(pair, modules)(x, case.idx[pair.rank], weights).sum().backward()
        has = {"x": x.grad, "weights": weights.grad, "experts": next(modules[0].parameters()).grad}
        return {name for name, grad in has.items() if grad is not None}

    assert on_ranks(2, rank_main) == [{needed}, {needed}]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept_and_nothing_comes_back(mode):
    case = make_case((5, 3), seed=4)

    def rank_main(pair):
        layer = nn.Experts(pair, local(pair))
        x = case.x[pair.rank].clone().requires_grad_()
        with mode():
            out = layer(x, case.idx[pair.rank], case.weights[pair.rank])
        learned = layer(x, case.idx[pair.rank], case.weights[pair.rank])
        return out.requires_grad, torch.equal(out, learned)

    assert on_ranks(2, rank_main) == [(False, True)] * 2


def test_layers_side_by_side_go_back_in_one_order():
    """Rank 1 receives nothing in the first layer, so that its graph has another shape."""
    case = make_case((6, 6), seed=5)
    near = [idx.clamp(max=2) for idx in case.idx]

    def rank_main(pair):
        x = case.x[pair.rank].clone().requires_grad_()
        first, second = nn.Experts(pair, local(pair)), nn.Experts(pair, local(pair))
        weights = case.weights[pair.rank]
        for _ in range(3):
            (first(x, near[pair.rank], weights) + second(x, case.idx[pair.rank], weights)).sum().backward()
        return bool(x.grad.isfinite().all())

    assert on_ranks(2, rank_main) == [True, True]


def test_batches_that_overlap_go_back_in_one_order():
    case = make_case((6, 6), seed=6)
    near = [idx.clamp(max=2) for idx in case.idx]

    def rank_main(pair):
        x = case.x[pair.rank].clone().requires_grad_()
        first = nn.dispatch(pair, x, near[pair.rank])
        second = nn.dispatch(pair, x * 2, case.idx[pair.rank])
        y = [batch.x * 3 if len(batch.x) else batch.x.detach() for batch in (first, second)]
        (nn.combine(y[0], first) - nn.combine(y[1], second)).sum().backward()
        return x.grad

    for rank, grad in enumerate(on_ranks(2, rank_main)):
        times = [(idx[rank] >= 0).sum(dim=1, keepdim=True) for idx in (near, case.idx)]
        assert_close(grad, (3.0 * times[0] - 6.0 * times[1]).expand(-1, H))


def test_a_rank_that_does_not_come_is_named():
    case = make_case((4, 4), seed=7)

    def rank_main(pair):
        out = nn.Experts(pair, local(pair))(case.x[pair.rank], case.idx[pair.rank], case.weights[pair.rank])
        if pair.rank == 0:
            with pytest.raises(anyep.PeerError) as caught:
                out.sum().backward()
            return caught.value.ranks
        return None

    assert on_ranks(2, rank_main, timeout_s=2.0)[0] == (1,)


def test_ranks_that_do_different_things_are_told():
    case = make_case((4, 4), seed=8)

    def rank_main(pair):
        x = case.x[pair.rank].clone().requires_grad_()
        out = nn.Experts(pair, local(pair))(x, case.idx[pair.rank], case.weights[pair.rank])
        step = out.sum().backward if pair.rank == 0 else partial(nn.dispatch, pair, x, case.idx[pair.rank])
        with pytest.raises(ValueError, match="rank"):
            step()
        return True

    assert on_ranks(2, rank_main) == [True, True]


def test_a_buffer_that_is_closed_between_forward_and_backward():
    case = make_case((4, 4), seed=9)

    def rank_main(pair):
        x = case.x[pair.rank].clone().requires_grad_()
        out = nn.Experts(pair, local(pair))(x, case.idx[pair.rank], case.weights[pair.rank])
        pair.close()
        with pytest.raises(anyep.ClosedError, match="closed"):
            out.sum().backward()
        return True

    assert on_ranks(2, rank_main) == [True, True]


@pytest.mark.parametrize("how", [{"layout": "compact"}, {"reduce": "rank"}], ids=["layout", "reduce"])
def test_modules_that_differ_between_ranks_are_told_on_every_rank(how):
    case = make_case((4, 4), seed=10)

    def rank_main(pair):
        own = how if pair.rank else {}
        with pytest.raises(ValueError, match="rank"):
            both_ways(pair, case, own)
        both_ways(pair, case, how)  # the buffer goes on
        return True

    def both_ways(pair, case, own):
        batch = nn.dispatch(pair, case.x[pair.rank], case.idx[pair.rank], **own)
        nn.combine(batch.x, batch)

    assert on_ranks(2, rank_main) == [True, True]


def test_pairs_that_differ_between_ranks_are_told_on_every_rank():
    def rank_main(member):
        sizes = {"hidden": H + member.rank, "num_experts": 6, "num_topk": 3, "max_tokens_per_rank": 4}
        with pytest.raises(ValueError, match="hidden"):
            nn.open_pair(member, wire="fp8", **sizes)
        return True

    assert anyep.local_group(2).run(rank_main) == [True, True]
