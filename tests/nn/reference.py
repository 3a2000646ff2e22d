"""The layer in one process, without ranks: what outputs and gradients must be.

Legend: T tokens of a rank, H hidden, K top-k, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import anyep
from anyep import nn

H, K, E, W = 12, 3, 6, 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """What every rank has."""

    num_tokens: Sequence[int]
    """[R]"""
    idx: list[torch.Tensor] = field(default_factory=list)
    x: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    grad: list[torch.Tensor] = field(default_factory=list)
    """gradients of the outputs [T, H]"""

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)


def make_case(num_tokens: Sequence[int], seed: int = 0, unused: Sequence[int] = (4,)) -> Case:
    """Choose at random, with tokens that go nowhere, experts chosen twice by one token, and experts nobody chooses."""
    generator = torch.Generator().manual_seed(seed)
    case = Case(num_tokens=num_tokens)
    used = torch.tensor([expert for expert in range(E) if expert not in unused])
    for T in num_tokens:
        idx = used[torch.randint(len(used), (T, K), generator=generator)]
        idx[torch.rand(T, K, generator=generator) < 0.2] = -1
        if T > 2:
            idx[0] = -1
            idx[1] = 3
            idx[2, :2] = 0
        case.idx.append(idx)
        case.x.append(torch.randn(T, H, generator=generator))
        case.weights.append(torch.rand(T, K, generator=generator))
        case.grad.append(torch.randn(T, H, generator=generator))
    return case


def make_experts() -> list[torch.nn.Module]:
    """Return E small experts, the same each time."""
    experts = []
    for expert in range(E):
        generator = torch.Generator().manual_seed(100 + expert)
        layers = torch.nn.Sequential(torch.nn.Linear(H, W), torch.nn.Tanh(), torch.nn.Linear(W, H))
        with torch.no_grad():
            for parameter in layers.parameters():
                parameter.normal_(0, 0.5, generator=generator)
        experts.append(layers)
    return experts


def dense_sum(
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    x: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Return sum over k of weights[t, k] * experts[idx[t, k]](x[t]), token by token in float64 if x is."""
    out = torch.zeros_like(x)
    for expert, compute in enumerate(experts):
        factor = (weights * (idx == expert)).sum(dim=1, keepdim=True)
        out = out + factor * compute(x)
    return out


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """Outputs and gradients of one rank, or of the reference; experts by their global number."""

    out: torch.Tensor
    grad_x: torch.Tensor | None
    grad_weights: torch.Tensor | None
    grad_experts: dict[int, list[torch.Tensor]]


def reference(case: Case) -> list[Result]:
    """Compute everything in one process in float64; gradients of experts are sums over all ranks' tokens."""
    experts = [expert.double() for expert in make_experts()]
    outs = []
    leaves = []
    for x, idx, weights, grad in zip(case.x, case.idx, case.weights, case.grad, strict=True):
        leaf = x.double().requires_grad_(), weights.double().requires_grad_()
        out = dense_sum(experts, leaf[0], idx, leaf[1])
        out.backward(grad.double())
        leaves.append(leaf)
        outs.append(out.detach())
    grads = {expert: [p.grad for p in module.parameters()] for expert, module in enumerate(experts)}
    return [
        Result(out=out, grad_x=x.grad, grad_weights=w.grad, grad_experts=grads)
        for out, (x, w) in zip(outs, leaves, strict=True)
    ]


def on_ranks(num_ranks: int, function: Callable[[nn.BufferPair], Any], **options: Any) -> list[Any]:
    """Call ``function(pair)`` on ranks as threads."""
    sizes = {
        "hidden": H,
        "num_experts": E,
        "num_topk": K,
        "max_tokens_per_rank": 16,
        "wire": "fp32",
        "timeout_s": 30.0,
    }

    def rank_main(member):
        with nn.open_pair(member, **{**sizes, **options}) as pair:
            return function(pair)

    return anyep.local_group(num_ranks).run(rank_main)


def local(pair: nn.BufferPair) -> list[torch.nn.Module]:
    everybody = make_experts()
    return [everybody[expert] for expert in pair.local_experts]


def collect(pair: nn.BufferPair, modules: Sequence[torch.nn.Module], out, x, weights) -> Result:
    return Result(
        out=out.detach(),
        grad_x=x.grad,
        grad_weights=weights.grad,
        grad_experts={
            expert: [p.grad for p in module.parameters()]
            for expert, module in zip(pair.local_experts, modules, strict=True)
        },
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Compare with the largest number of the expected tensor as the measure; fp32 rounds at 6e-8 of it."""
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max()
        assert error <= tolerance * max(1.0, float(expected.abs().max())), float(error)


def assert_results(actual: Sequence[Result], expected: Sequence[Result], tolerance: float = 2e-6) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert_close(got.out, want.out, tolerance)
        assert_close(got.grad_x, want.grad_x, tolerance)
        assert_close(got.grad_weights, want.grad_weights, tolerance)
        for expert, grads in got.grad_experts.items():
            for one, other in zip(grads, want.grad_experts[expert], strict=True):
                assert_close(one, other, tolerance)
