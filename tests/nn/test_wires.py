"""What rows and gradients travel in: FP8 there and BF16 back, two wires, and what would lose bits is refused."""

from __future__ import annotations

import pytest
import torch

import anyep
from anyep import nn
from anyep.numerics.fp8 import dequantise_fp8, quantise_fp8
from anyep.testing.oracle import SCALE_FORMATS
from tests.nn.reference import E, H, K, assert_close, assert_results, collect, local, make_case, on_ranks, reference


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def rounded_reference(case, scales):
    """As the wire rounds what goes in: tokens to FP8, gradients of sums to bfloat16."""
    for x in case.x:
        x.copy_(dequantise_fp8(*quantise_fp8(x.bfloat16(), SCALE_FORMATS[scales]), SCALE_FORMATS[scales]).float())
    for grad in case.grad:
        grad.copy_(grad.bfloat16().float())
    return reference(case)


@pytest.mark.parametrize("scales", ["fp32", "pow2", "ue8m0"])
def test_fp8_there_and_bf16_back(scales):
    """Experts compute in fp32 here, so that what is left is two roundings to bfloat16."""
    case = make_case((7, 0, 5), seed=1)
    raw = [x.bfloat16() for x in case.x]
    expected = rounded_reference(case, scales)

    def rank_main(pair):
        modules = [Fp32(module) for module in local(pair)]
        x = raw[pair.rank].clone().requires_grad_()
        weights = case.weights[pair.rank].clone().requires_grad_()
        out = nn.Experts(pair, modules)(x, case.idx[pair.rank], weights)
        out.backward(case.grad[pair.rank].bfloat16())
        assert x.grad.dtype == out.dtype == torch.bfloat16
        return collect(pair, modules, out, x, weights)

    results = on_ranks(3, rank_main, wire="fp8", scales=scales)
    for rank, (got, want) in enumerate(zip(results, expected, strict=True)):
        if case.num_tokens[rank]:
            assert relative(got.out, want.out) < 6e-3
            assert relative(got.grad_x, want.grad_x) < 1e-2
            assert relative(got.grad_weights, want.grad_weights) < 1e-2
        for expert, grads in got.grad_experts.items():
            for one, other in zip(grads, want.grad_experts[expert], strict=True):
                assert relative(one, other) < 1e-2 or not float(other.abs().max())


class Fp32(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, rows):
        return self.module(rows.float())


def test_gradients_of_rows_in_fp8_are_exact_where_bf16_is():
    """Sums of few small whole numbers: quantising x changes the sums, and not one bit of their gradients."""
    case = make_case((6, 3), seed=2)

    def rank_main(pair):
        rank = pair.rank
        x = case.x[rank].bfloat16().requires_grad_()
        batch = nn.dispatch(pair, x, case.idx[rank])
        grad = torch.randint(-4, 5, (len(x), H), generator=torch.Generator().manual_seed(rank)).bfloat16()
        nn.combine(batch.x, batch).backward(grad)
        assert batch.quantised[0].dtype == torch.float8_e4m3fn
        assert not batch.quantised[1].requires_grad
        return torch.equal(x.grad, grad * (case.idx[rank] >= 0).sum(dim=1, keepdim=True))

    assert on_ranks(2, rank_main, wire="fp8") == [True, True]


def test_the_way_of_gradients_is_made_once():
    case = make_case((6, 3), seed=3)

    def rank_main(pair):
        x = case.x[pair.rank].bfloat16().requires_grad_()
        batch = nn.dispatch(pair, x, case.idx[pair.rank])
        out = nn.combine(batch.x, batch)
        for _ in range(3):
            out.sum().backward(retain_graph=True)
        stats = pair.gradients.stats()
        return stats.dispatches, stats.cached_dispatches

    assert on_ranks(2, rank_main, wire="fp8") == [(1, 2)] * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_fp8_with_a_checkpoint(use_reentrant):
    case = make_case((6, 0, 3), seed=4)

    def rank_main(pair):
        hook = nn.Experts(pair, [Fp32(module) for module in local(pair)])
        grads = []
        for run in (lambda f, *a: f(*a), lambda f, *a: nn.checkpoint(f, *a, use_reentrant=use_reentrant)):
            x = case.x[pair.rank].bfloat16().requires_grad_()
            run(hook, x, case.idx[pair.rank], case.weights[pair.rank]).sum().backward()
            grads.append(x.grad)
        return torch.equal(*grads)

    assert on_ranks(3, rank_main, wire="fp8") == [True] * 3


@pytest.mark.parametrize("layout", ["expert", "compact"])
def test_bf16_rows_with_fp32_gradients(layout):
    """One buffer for each; the gradient of a sum is not rounded to bfloat16 on its way."""
    case = make_case((6, 3), seed=5)

    def rank_main(pair):
        x = case.x[pair.rank].bfloat16().requires_grad_()
        scale = torch.ones(H, requires_grad=True)
        batch = nn.dispatch(pair, x, case.idx[pair.rank], layout=layout)
        nn.combine(batch.x.float() * scale, batch).backward(case.grad[pair.rank])
        return batch.x.detach().double(), scale.grad, batch.x.shape

    results = on_ranks(2, rank_main, wire="bf16", gradient_wire="fp32")
    copies = [(idx >= 0).sum(dim=1, keepdim=True) for idx in case.idx]
    if layout == "compact":
        ranks = [torch.stack([((idx >= 0) & (idx // 3 == r)).any(1) for r in (0, 1)], 1) for idx in case.idx]
        copies = [rank.sum(dim=1, keepdim=True) for rank in ranks]
    whole = sum(
        (g.double() * x.bfloat16().double() * n).sum(0) for g, x, n in zip(case.grad, case.x, copies, strict=True)
    )
    assert_close(results[0][1] + results[1][1], whole)


def test_bf16_all_the_way():
    case = make_case((7, 4), seed=6)
    for x, grad in zip(case.x, case.grad, strict=True):
        x.copy_(x.bfloat16())
        grad.copy_(grad.bfloat16())

    def rank_main(pair):
        modules = [Fp32(module) for module in local(pair)]
        x = case.x[pair.rank].bfloat16().requires_grad_()
        weights = case.weights[pair.rank].clone().requires_grad_()
        out = nn.Experts(pair, modules)(x, case.idx[pair.rank], weights)
        out.backward(case.grad[pair.rank].bfloat16())
        return collect(pair, modules, out, x, weights)

    assert_results(on_ranks(2, rank_main, wire="bf16"), reference(case), tolerance=2e-2)


def test_autocast_computes_experts_in_bf16_and_chooses_in_fp32():
    def rank_main(pair):
        torch.manual_seed(1)
        layer = nn.MoE(pair, nn.Router(H, E, K), [torch.nn.Linear(H, H) for _ in pair.local_experts])
        seen = []
        layer.experts.compute.experts[0].register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
        x = torch.randn(6, H, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
        out.sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = layer.router(x).scores
        return seen, out.dtype, x.grad.dtype, torch.equal(scores, layer.router(x).scores)

    assert on_ranks(2, rank_main) == [([torch.bfloat16], torch.float32, torch.float32, True)] * 2


def test_outputs_whose_gradients_would_lose_bits_are_refused():
    def rank_main(pair):
        batch = nn.dispatch(pair, torch.ones(2, H).bfloat16(), torch.zeros(2, K, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"lose bits.*gradient_wire='fp32'"):
            nn.combine(batch.x.float(), batch)
        with torch.no_grad():
            return nn.combine(batch.x.float(), batch).dtype

    assert on_ranks(2, rank_main, wire="bf16") == [torch.float32] * 2


def test_a_plain_buffer_will_do():
    case = make_case((4, 3), seed=7)

    def rank_main(member):
        sizes = {"hidden": H, "num_experts": E, "num_topk": K, "max_tokens_per_rank": 16, "wire": "fp32"}
        with anyep.Buffer(member, **sizes) as ep:
            x = case.x[member.rank].clone().requires_grad_()
            batch = nn.dispatch(ep, x, case.idx[member.rank])
            nn.combine(batch.x * 2, batch).sum().backward()
            return x.grad

    for rank, grad in enumerate(anyep.local_group(2).run(rank_main)):
        assert_close(grad, 2.0 * (case.idx[rank] >= 0).sum(dim=1, keepdim=True).expand(-1, H))


def test_a_plain_buffer_of_fp8_is_sent_to_open_pair():
    def rank_main(member):
        with (
            anyep.Buffer(member, hidden=H, num_experts=E, num_topk=K, max_tokens_per_rank=4, wire="fp8") as ep,
            pytest.raises(ValueError, match="open_pair"),
        ):
            nn.dispatch(ep, torch.ones(1, H).bfloat16(), torch.zeros(1, K, dtype=torch.int64))

    anyep.local_group(1).run(rank_main)


def test_a_pair_closes_both_of_its_buffers():
    def rank_main(pair):
        pair.close()
        pair.close()
        for buffer in (pair.forward, pair.gradients):
            with pytest.raises(anyep.ClosedError):
                buffer.barrier()
        return pair.forward is pair.gradients

    assert on_ranks(2, rank_main, wire="fp8") == [False, False]
    assert on_ranks(2, rank_main, wire="bf16") == [True, True]


@pytest.mark.parametrize("bad", [{"gradient_wire": "fp8"}, {"gradient_wire": "bf17"}, {"num_topk": 0}])
def test_bad_pairs(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        on_ranks(1, lambda pair: None, **bad)
