"""The gate: formulas by hand, gradients, balance."""

from __future__ import annotations

import pytest
import torch

import anyep
from anyep import nn
from anyep.nn import routing
from anyep.testing.processes import run_processes

T, H, E, K = 7, 8, 8, 3


def router(**how):
    """A gate that is the same on ranks that are threads and share torch's generator."""
    gate = nn.Router(H, E, K, **how)
    with torch.no_grad():
        gate.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    return gate


def tokens(seed=0):
    return torch.randn(T, H, generator=torch.Generator().manual_seed(seed))


def by_hand(gate, x, bias):
    """DeepSeek-V3's choice for one token after the other, in plain Python."""
    logits = x.double() @ gate.weight.detach().double().T
    scores = logits.sigmoid() if gate.scoring == "sigmoid" else logits.softmax(dim=1)
    chosen, weights = [], []
    size = E // gate.n_group
    for row in scores.tolist():
        merit = [s + b for s, b in zip(row, bias, strict=True)]
        groups = []
        for g in range(gate.n_group):
            best = sorted(merit[g * size : (g + 1) * size], reverse=True)
            groups.append((sum(best[: 2 if gate.scoring == "sigmoid" else 1]), g))
        allowed = {g for _, g in sorted(groups, reverse=True)[: gate.topk_group]}
        able = [(m, e) for e, m in enumerate(merit) if e // size in allowed]
        best_experts = [e for _, e in sorted(able, reverse=True)[:K]]
        raw = [row[e] for e in best_experts]
        total = sum(raw) if gate.norm_topk_prob else 1.0
        chosen.append(best_experts)
        weights.append([gate.routed_scaling_factor * w / total for w in raw])
    return torch.tensor(chosen), torch.tensor(weights)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (2, 1), (4, 4)])
@pytest.mark.parametrize("norm", [True, False])
def test_choice_and_weights_are_the_published_ones(scoring, groups, norm):
    gate = router(
        scoring=scoring, n_group=groups[0], topk_group=groups[1], norm_topk_prob=norm, routed_scaling_factor=2.5
    )
    gate.bias.copy_(torch.linspace(-0.2, 0.2, E))
    found = gate(tokens())
    chosen, weights = by_hand(gate, tokens(), gate.bias.tolist())
    assert torch.equal(found.topk_idx, chosen)
    assert torch.allclose(found.topk_weights, weights, atol=1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_a_rank_without_tokens_chooses_nothing(scoring, groups):
    n_group, topk_group = groups
    gate = router(scoring=scoring, n_group=n_group, topk_group=topk_group)
    chosen = gate(torch.empty(0, H, requires_grad=True))
    assert chosen.topk_idx.shape == chosen.topk_weights.shape == (0, K)
    chosen.topk_weights.sum().backward()
    assert not gate.weight.grad.any()


def test_a_bias_chooses_and_does_not_weigh():
    gate = router(scoring="sigmoid", norm_topk_prob=False)
    gate.bias[5] = 100.0
    found = gate(tokens())
    assert torch.equal(found.topk_idx[:, 0], torch.full((T,), 5))
    assert torch.equal(found.topk_weights, found.scores.gather(1, found.topk_idx))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_gradients_pass_through_the_weights_to_the_gate(scoring):
    """Against the same formula in float64, with the choice held fixed."""
    gate = router(scoring=scoring, n_group=4, topk_group=2)
    x = tokens().requires_grad_()
    found = gate(x)
    factors = torch.arange(1.0, K + 1)
    (found.topk_weights * factors).sum().backward()
    weight, x64 = gate.weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    scores = routing.score(x64 @ weight.T, scoring).gather(1, found.topk_idx)
    (scores / scores.sum(1, keepdim=True) * factors).sum().backward()
    assert torch.allclose(gate.weight.grad.double(), weight.grad, atol=1e-5)
    assert torch.allclose(x.grad.double(), x64.grad, atol=1e-5)
    assert gate.bias.grad is None


def test_load_is_counted_in_training_only():
    gate = router()
    gate(tokens())
    gate(tokens(1))
    assert int(gate.load.sum()) == 2 * T * K
    gate.eval()
    gate(tokens())
    assert int(gate.load.sum()) == 2 * T * K


def test_a_bias_update_makes_a_crowded_expert_less_likely():
    gate = router(scoring="sigmoid")
    with torch.no_grad():
        gate.weight[2] += 3 * torch.sign(tokens().mean(0))
    first = gate(tokens())
    crowd = first.topk_idx.flatten().bincount(minlength=E)
    gate.update_bias(rate=0.01)
    expected = 0.01 * torch.sign(crowd.float().mean() - crowd)
    assert torch.allclose(gate.bias, expected)
    assert int(gate.load.sum()) == 0


def test_updates_even_out_the_load():
    gate = router(scoring="sigmoid")
    x = torch.randn(256, H, generator=torch.Generator().manual_seed(1)) + 1.0

    def imbalance():
        load = gate(x).topk_idx.flatten().bincount(minlength=E).float()
        return float(load.max() / load.mean())

    before = imbalance()
    for _ in range(200):
        gate(x)
        gate.update_bias(rate=0.01)
    assert before > 1.5
    assert imbalance() < 1.2


def bias_after_a_step(group, rank, num_tokens):
    gate = router(scoring="sigmoid")
    gate(tokens(rank)[: num_tokens[rank]])
    gate.update_bias(rate=0.5, over_ranks=nn.RankSum(group))
    return gate.bias


def test_load_is_summed_over_ranks():
    sizes = (7, 0, 4)
    whole = router(scoring="sigmoid")
    for rank, size in enumerate(sizes):
        whole(tokens(rank)[:size])
    whole.update_bias(rate=0.5)
    threads = anyep.local_group(3).run(lambda member: bias_after_a_step(member, member.rank, sizes))
    processes = run_processes(3, bias_after_a_step, sizes)
    for bias in (*threads, *processes):
        assert torch.equal(bias, whole.bias)


def test_the_bias_is_saved_and_the_load_is_not():
    assert set(router().state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("shape", [(0, E), (2, 0, E), (0, 5, E)])
def test_a_rank_without_tokens_adds_nothing_to_balance_losses(shape):
    scores = torch.empty(shape, requires_grad=True)
    idx = torch.empty(*shape[:-1], K, dtype=torch.int64)
    for loss in (nn.switch_balance_loss(scores, idx), nn.sequence_balance_loss(scores, K)):
        assert loss.item() == 0
        loss.backward()


def test_sequence_wise_loss_by_hand():
    scores = torch.rand(2, 5, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    total = 0.0
    for sequence in scores.tolist():
        for expert in range(E):
            chosen = sum(expert in sorted(range(E), key=lambda e: -row[e])[:K] for row in sequence)
            f = E / (K * len(sequence)) * chosen
            P = sum(row[expert] / sum(row) for row in sequence) / len(sequence)
            total += f * P / len(scores)
    assert float(nn.sequence_balance_loss(scores, K)) == pytest.approx(total)


def test_balance_losses_pull_scores_off_a_crowded_expert():
    logits = torch.zeros(1, 6, E)
    logits[..., 1] = 2.0
    logits.requires_grad_()
    scores = logits.softmax(dim=-1)
    nn.sequence_balance_loss(scores, K).backward(retain_graph=True)
    first = logits.grad.clone()
    nn.switch_balance_loss(scores[0], scores[0].topk(1).indices).backward()
    assert float(first[0, :, 1].min()) > 0
    assert float((logits.grad - first)[0, :, 1].min()) > 0


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"scoring": "tanh"}, "scoring must be one of 'softmax', 'sigmoid'"),
        ({"n_group": 3}, "n_group=3 must divide num_experts=8"),
        ({"n_group": 4, "topk_group": 1}, "num_topk=3 experts cannot come from topk_group=1"),
        ({"n_group": 8, "topk_group": 8, "scoring": "sigmoid"}, "two best experts"),
        ({"topk_group": 2}, "topk_group must be at least 1 and at most 1"),
        ({"n_group": 0}, "n_group must be at least 1"),
    ],
)
def test_sizes_that_do_not_go_together(sizes, text):
    with pytest.raises(ValueError, match=text):
        nn.Router(H, E, K, **sizes)


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"x must have shape \[T, hidden\] = \[any, 8\], got \[2, 7, 8\]"):
        router()(torch.zeros(2, 7, 8))
