"""Which experts a token goes to, and with which weights: functions of scores, without a device, a group or a clock.

Selection and weights are DeepSeek-V3's (https://arxiv.org/abs/2412.19437, section 2.1.2, equations 12 to 16): a bias
takes part in the choice of experts and not in their weights. Limiting a token to some groups of experts is
section 2.1.2's node-limited routing, in the form in which the model was published: a group is as good as its two best
experts together, biases included, where scores are sigmoids (V3), and as its best one where they are softmax (V2).

Legend: T tokens, E experts, K top-k, B sequences, S tokens of a sequence.
"""

from __future__ import annotations

import torch

SCORINGS = ("softmax", "sigmoid")
_TINY = 1e-20
"""keeps 0 / 0 out of weights when every chosen score has underflowed"""


def score(logits_TE: torch.Tensor, scoring: str) -> torch.Tensor:
    """Return the affinities of tokens to experts, [T, E], from the gate's outputs.

    >>> score(torch.tensor([[0.0, 0.0]]), "softmax").tolist(), score(torch.tensor([[0.0, 0.0]]), "sigmoid").tolist()
    ([[0.5, 0.5]], [[0.5, 0.5]])
    """
    return logits_TE.softmax(dim=-1) if scoring == "softmax" else logits_TE.sigmoid()


def choose(
    scores_TE: torch.Tensor,
    num_topk: int,
    *,
    bias_E: torch.Tensor | None = None,
    num_groups: int = 1,
    groups_per_token: int = 1,
    best_per_group: int = 1,
) -> torch.Tensor:
    """Return the K best experts by score + bias, int64 [T, K], in descending order.

    Experts are in ``num_groups`` equal groups of neighbours, of which the ``groups_per_token`` with the largest sum of
    their ``best_per_group`` best may be chosen from.

    >>> scores = torch.tensor([[0.9, 0.1, 0.6, 0.5]])
    >>> choose(scores, 2).tolist(), choose(scores, 2, num_groups=2, best_per_group=2).tolist()
    ([[0, 2]], [[2, 3]])
    >>> choose(scores, 1, bias_E=torch.tensor([0.0, 1.0, 0.0, 0.0])).tolist()
    [[1]]
    """
    merit_TE = scores_TE.detach()
    if bias_E is not None:
        merit_TE = merit_TE + bias_E
    if num_groups > 1 and groups_per_token < num_groups:
        merit_TE = _within_groups(merit_TE, num_groups, groups_per_token, best_per_group)
    return merit_TE.topk(num_topk, dim=-1).indices


def _within_groups(merit_TE: torch.Tensor, num_groups: int, groups_per_token: int, best_per_group: int) -> torch.Tensor:
    grouped = merit_TE.view(*merit_TE.shape[:-1], num_groups, merit_TE.shape[-1] // num_groups)
    merit_of_group = grouped.topk(best_per_group, dim=-1).values.sum(dim=-1)
    allowed = merit_of_group.topk(groups_per_token, dim=-1).indices
    barred = torch.ones_like(merit_of_group, dtype=torch.bool).scatter_(-1, allowed, False)
    return grouped.masked_fill(barred.unsqueeze(-1), float("-inf")).flatten(-2)


def weigh(
    scores_TE: torch.Tensor, topk_idx_TK: torch.Tensor, *, norm_topk_prob: bool, routed_scaling_factor: float
) -> torch.Tensor:
    """Return the chosen experts' weights [T, K]: their scores without bias, made to sum to 1, scaled. Differentiable.

    >>> scores = torch.tensor([[0.2, 0.6, 0.5]])
    >>> weigh(scores, torch.tensor([[1, 0]]), norm_topk_prob=True, routed_scaling_factor=2.0).tolist()
    [[1.5, 0.5]]
    """
    weights_TK = scores_TE.gather(-1, topk_idx_TK)
    if norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + _TINY)
    return weights_TK * routed_scaling_factor


def count_load(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return how many (token, column) pairs chose each expert, int64 [E]; -1 chose none.

    >>> count_load(torch.tensor([[0, 2], [2, -1]]), 3).tolist()
    [1, 0, 2]
    """
    return torch.bincount(topk_idx.flatten() + 1, minlength=num_experts + 1)[1:]


def moved_bias(bias_E: torch.Tensor, load_E: torch.Tensor, rate: float) -> torch.Tensor:
    """Return bias + rate * sign(mean load - load): what is chosen too often becomes less likely.

    DeepSeek-V3, section 2.1.2, "Auxiliary-Loss-Free Load Balancing" (there gamma = 0.001).

    >>> moved_bias(torch.zeros(3), torch.tensor([4, 2, 0]), 0.5).tolist()
    [-0.5, 0.0, 0.5]
    """
    load = load_E.to(torch.float64)
    return bias_E + rate * torch.sign(load.mean() - load).to(bias_E.dtype)


def sequence_balance_loss(scores_BSE: torch.Tensor, num_topk: int) -> torch.Tensor:
    """Return DeepSeek-V3's sequence-wise balance loss, without its factor alpha, as a mean over the B sequences.

    Equations 17 to 20: sum over e of f_e * P_e. f_e is E / (K S) times the number of tokens that have e among their K
    best scores (without bias); P_e is the mean of the scores after each token's were made to sum to 1. Gradients pass
    through P. 1 when everything is even, 0 where there are no tokens.

    >>> sequence_balance_loss(torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]]), 2)
    tensor(1.)
    """
    if scores_BSE.shape[:-1].numel() == 0:
        return scores_BSE.sum()  # a mean of nothing is no number
    num_tokens, num_experts = scores_BSE.shape[-2:]
    best = scores_BSE.detach().topk(num_topk, dim=-1).indices
    chosen = torch.zeros_like(scores_BSE).scatter_(-1, best, 1.0)
    f_BE = chosen.sum(dim=-2) * (num_experts / (num_topk * num_tokens))
    P_BE = (scores_BSE / (scores_BSE.sum(dim=-1, keepdim=True) + _TINY)).mean(dim=-2)
    return (f_BE * P_BE).sum(dim=-1).mean()


def switch_balance_loss(scores_TE: torch.Tensor, topk_idx_TK: torch.Tensor) -> torch.Tensor:
    """Return the Switch Transformer's balance loss, without its factor alpha, for any K.

    https://arxiv.org/abs/2101.03961, equations 4 to 6: E * sum over e of f_e * P_e; f_e is the fraction of the (token,
    column) pairs that chose e, P_e the mean of its scores. 1 when everything is even, 0 where there are no tokens.

    >>> switch_balance_loss(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([[0], [1]]))
    tensor(1.)
    """
    if scores_TE.shape[:-1].numel() == 0:
        return scores_TE.sum()  # a mean of nothing is no number
    num_experts = scores_TE.shape[-1]
    load_E = count_load(topk_idx_TK, num_experts)
    f_E = load_E.to(scores_TE.dtype) / load_E.sum().clamp_min(1)
    return num_experts * (f_E * scores_TE.flatten(0, -2).mean(dim=0)).sum()
