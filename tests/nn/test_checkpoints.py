"""Activation checkpointing: the same gradients, bit for bit, along the same ways."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

from anyep import nn
from tests.nn.reference import E, H, K, local, make_case, on_ranks

BOTH = pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensors", "reentrant"])


def counts(pair):
    stats = pair.forward.stats()
    return stats.dispatches, stats.cached_dispatches, stats.combines


def gradients(pair, case, run, *, layers=1):
    """Return the gradients of x, weights and experts, and what was exchanged meanwhile."""
    modules = [local(pair) for _ in range(layers)]
    hooks = [nn.Experts(pair, one) for one in modules]
    x = case.x[pair.rank].clone().requires_grad_()
    weights = case.weights[pair.rank].clone().requires_grad_()

    def block(x, weights):
        for hook in hooks:
            x = torch.tanh(x + hook(x, case.idx[pair.rank], weights))
        return x

    before = counts(pair)
    run(block, x, weights).backward(case.grad[pair.rank])
    exchanged = tuple(after - one for after, one in zip(counts(pair), before, strict=True))
    return [x.grad, weights.grad, *(p.grad for one in modules for m in one for p in m.parameters())], exchanged


@BOTH
@pytest.mark.parametrize("layers", [1, 2])
def test_the_same_bits_without_a_new_layout(use_reentrant, layers):
    """Rank 1 has no tokens, rank 2 receives no rows: what they save, and where they stop, is another thing."""
    case = make_case((6, 0, 5), seed=1, unused=(4, 5))

    def rank_main(pair):
        plain, _ = gradients(pair, case, lambda block, *inputs: block(*inputs), layers=layers)
        again, exchanged = gradients(
            pair, case, lambda block, *inputs: nn.checkpoint(block, *inputs, use_reentrant=use_reentrant), layers=layers
        )
        return all(torch.equal(one, other) for one, other in zip(plain, again, strict=True)), exchanged

    for same, (dispatches, cached, _) in on_ranks(3, rank_main):
        assert same
        assert dispatches == layers
        assert cached == 2 * layers  # once to compute again, once for the gradient of the sums


@BOTH
def test_a_checkpoint_of_torch_works_too(use_reentrant):
    case = make_case((6, 0), seed=2)

    def rank_main(pair):
        plain, _ = gradients(pair, case, lambda block, *inputs: block(*inputs))
        again, exchanged = gradients(
            pair,
            case,
            lambda block, *inputs: torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=use_reentrant),
        )
        return all(torch.equal(one, other) for one, other in zip(plain, again, strict=True)), exchanged[0]

    assert on_ranks(2, rank_main) == [(True, 2)] * 2


def test_a_region_that_ends_with_combine_does_not_combine_again():
    case = make_case((6, 0, 5), seed=3, unused=(4, 5))

    def rank_main(pair):
        hook = nn.Experts(pair, local(pair))
        x = case.x[pair.rank].clone().requires_grad_()
        before = counts(pair)
        nn.checkpoint(hook, x, case.idx[pair.rank], case.weights[pair.rank]).sum().backward()
        return tuple(after - one for after, one in zip(counts(pair), before, strict=True))

    assert on_ranks(3, rank_main) == [(1, 2, 2)] * 3


@BOTH
def test_a_way_that_is_kept_by_hand(use_reentrant):
    """The first dispatch is outside, what is computed again goes along its way."""
    case = make_case((5, 3), seed=4)

    def rank_main(pair):
        idx = case.idx[pair.rank]
        x = case.x[pair.rank].clone().requires_grad_()
        way = nn.dispatch(pair, x.detach(), idx).way
        before = counts(pair)

        def region(x):
            batch = nn.dispatch(pair, x, idx, way=way)
            return nn.combine(torch.sin(batch.x), batch)

        torch.utils.checkpoint.checkpoint(region, x, use_reentrant=use_reentrant).sum().backward()
        times = (idx >= 0).sum(dim=1, keepdim=True)
        right = torch.allclose(x.grad, times * torch.cos(x.detach()), atol=1e-6)
        return right, counts(pair)[0] - before[0]

    assert on_ranks(2, rank_main) == [(True, 0)] * 2


@BOTH
def test_a_whole_layer_counts_its_load_once(use_reentrant):
    def rank_main(pair):
        layer = nn.MoE(pair, nn.Router(H, E, K), nn.GroupedMLP(pair, width=4, seed=0))
        x = torch.randn(5 + pair.rank, H, requires_grad=True)
        nn.checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
        return int(layer.router.load.sum()), pair.forward.stats().dispatches

    assert on_ranks(2, rank_main) == [(15, 1), (18, 1)]


@BOTH
def test_backward_twice(use_reentrant):
    case = make_case((4, 2), seed=5)

    def rank_main(pair):
        x = case.x[pair.rank].clone().requires_grad_()
        hook = nn.Experts(pair, local(pair))
        out = nn.checkpoint(hook, x, case.idx[pair.rank], case.weights[pair.rank], use_reentrant=use_reentrant)
        out.sum().backward(retain_graph=True)
        once = x.grad.clone()
        out.sum().backward()
        return torch.equal(x.grad, 2 * once)

    assert on_ranks(2, rank_main) == [True, True]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda step: ("idx", step), "chose other experts than before"),
        (lambda step: ("times", 1 + step), "this is dispatch 2 of a run that had 1"),
    ],
    ids=["other experts", "more dispatches"],
)
def test_a_function_that_does_something_else_the_second_time(change, text):
    case = make_case((4, 4), seed=6)

    def rank_main(pair):
        runs = []

        def region(x):
            what, value = change(len(runs))
            runs.append(value)
            idx = case.idx[pair.rank].roll(value, 0) if what == "idx" else case.idx[pair.rank]
            for _ in range(value if what == "times" else 1):
                batch = nn.dispatch(pair, x, idx)
                x = torch.sin(nn.combine(torch.sin(batch.x), batch))
            return x

        out = nn.checkpoint(region, case.x[pair.rank].clone().requires_grad_(), use_reentrant=True)
        with pytest.raises(ValueError, match=text):
            out.sum().backward()
        return True

    assert on_ranks(2, rank_main) == [True, True]


@BOTH
def test_ranks_whose_experts_keep_nothing_compute_again_too(use_reentrant):
    """Rank 2 receives no rows and saves nothing for them; it must still come to the dispatch that is done again."""
    case = make_case((6, 0, 5), seed=7, unused=(4, 5))

    def rank_main(pair):
        idx = case.idx[pair.rank]

        def region(x):
            batch = nn.dispatch(pair, x, idx)
            return nn.combine(torch.sin(batch.x) if len(batch.x) else batch.x.detach(), batch)

        x = case.x[pair.rank].clone().requires_grad_()
        nn.checkpoint(region, x, use_reentrant=use_reentrant).sum().backward()
        times = (idx >= 0).sum(dim=1, keepdim=True)
        return torch.allclose(x.grad, times * torch.cos(x.detach()), atol=1e-6)

    assert on_ranks(3, rank_main) == [True] * 3
