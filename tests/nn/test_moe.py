"""The layer as a whole: any experts, two products, shared experts, and gradients of what every rank has."""

from __future__ import annotations

import copy

import pytest
import torch

import anyep
from anyep import nn
from anyep.testing.processes import run_processes
from tests.nn.reference import E, H, K, assert_close, dense_sum, local, make_case, make_experts, on_ranks

WIDTH = 8


def batch_of(pair, num_tokens, idx):
    x = torch.randn(num_tokens, H, generator=torch.Generator().manual_seed(pair.rank))
    return nn.dispatch(pair, x, idx, torch.ones(num_tokens, K))


def swiglu(layer, expert):
    def compute(x):
        gate, up = (x.double() @ layer.gate_up[expert].double()).chunk(2, dim=1)
        return (torch.nn.functional.silu(gate) * up) @ layer.down[expert].double()

    return compute


@pytest.mark.parametrize(
    "options", [{}, {"expert_alignment": 4}, {"static_rows": 40}], ids=["plain", "groups", "fixed"]
)
@pytest.mark.parametrize("product", ["grouped", "loop"])
def test_grouped_experts_are_the_experts(product, options):
    """Outputs, and gradients of rows and of every expert's matrices, one of which nobody chose."""
    case = make_case((9, 3), seed=1)

    def rank_main(pair):
        layer = nn.GroupedMLP(pair, width=WIDTH, product=product, seed=5)
        x = case.x[pair.rank].clone().requires_grad_()
        out = nn.Experts(pair, layer)(x, case.idx[pair.rank], case.weights[pair.rank])
        out.sum().backward()
        return layer, out.detach(), x.grad

    results = on_ranks(2, rank_main, **options)
    whole = on_ranks(1, lambda pair: nn.GroupedMLP(pair, width=WIDTH, product="loop", seed=5))[0]
    experts = [swiglu(whole, expert) for expert in range(E)]
    for rank, (_, out, grad_x) in enumerate(results):
        x = case.x[rank].double().requires_grad_()
        expected = dense_sum(experts, x, case.idx[rank], case.weights[rank].double())
        expected.sum().backward()
        assert_close(out, expected.detach())
        assert_close(grad_x, x.grad, 1e-5)
    for name in ("gate_up", "down"):
        actual = torch.cat([getattr(layer, name).grad for layer, *_ in results])
        assert_close(actual, getattr(whole, name).grad, 1e-5)


def test_a_gradient_with_strides_of_zero_reaches_grouped_experts():
    idx = torch.tensor([[0, 1, 2], [5, 4, 3]])

    def rank_main(pair):
        layer = nn.GroupedMLP(pair, width=WIDTH, product="grouped", seed=5)
        layer(batch_of(pair, 2, idx)).sum().backward()
        return bool(layer.down.grad.isfinite().all())

    assert on_ranks(2, rank_main) == [True, True]


def test_the_product_is_told():
    def rank_main(pair):
        return [
            repr(nn.GroupedMLP(pair, **how)) for how in ({"width": 8}, {"width": 8, "product": "loop"}, {"width": 5})
        ]

    grouped, asked, odd = on_ranks(2, rank_main)[0]
    assert "3 experts of width 8, product='grouped' (torch.nn.functional.grouped_mm)" in grouped
    assert "product='loop' (asked for)" in asked
    assert "product='loop' (rows of width=5 torch.float32 are no multiple of 16 bytes)" in odd


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"width": 8, "product": "magic"}, "product must be"),
        ({"width": 5, "product": "grouped"}, "product='grouped' is impossible: rows of width=5"),
        ({"width": 0}, "width must be at least 1"),
    ],
)
def test_products_that_cannot_be(how, text):
    with pytest.raises(ValueError, match=text):
        on_ranks(1, lambda pair: nn.GroupedMLP(pair, **how))


def test_a_seed_fills_experts_alike_on_any_number_of_ranks():
    whole = on_ranks(1, lambda pair: nn.GroupedMLP(pair, width=WIDTH, seed=7))[0]
    parts = on_ranks(4, lambda pair: nn.GroupedMLP(pair, width=WIDTH, seed=7))
    assert torch.equal(torch.cat([part.gate_up for part in parts]), whole.gate_up)
    assert torch.equal(torch.cat([part.down for part in parts]), whole.down)


def filled(module):
    """Fill parameters from a generator of their own: ranks that are threads share torch's."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return module


def layer_step(pair, x, grad):
    """One step of a whole layer; returns the output and all gradients, those of copies summed over ranks."""
    shared = filled(torch.nn.Linear(H, H))
    gate = filled(nn.Router(H, E, K, scoring="sigmoid", n_group=3, topk_group=2))
    layer = nn.MoE(pair, gate, local(pair), shared=shared)
    leaf = x.clone().requires_grad_()
    out = layer(leaf)
    out.backward(grad)
    experts = [p.grad for module in layer.experts.compute.experts for p in module.parameters()]
    return layer, out.detach(), leaf.grad, experts


def check_layer(num_ranks, seed=3):
    """Hold outputs and all gradients of a layer on ranks against the same layer on one."""
    case = make_case((12,), seed=seed)
    x, grad = case.x[0].view(3, 4, H), case.grad[0].view(3, 4, H)

    def rank_main(pair, member):
        share = slice(4 * pair.rank // num_ranks, 4 * (pair.rank + 1) // num_ranks)
        layer, out, grad_x, experts = layer_step(pair, x[:, share], grad[:, share])
        nn.sum_gradients(layer.replicated_parameters(), nn.RankSum(member))
        return share, out, grad_x, experts, [p.grad for p in layer.replicated_parameters()]

    layer, out, grad_x, experts = on_ranks(1, lambda pair: layer_step(pair, x, grad))[0]
    sizes = {"hidden": H, "num_experts": E, "num_topk": K, "max_tokens_per_rank": 16, "wire": "fp32"}

    def with_member(member):
        with nn.open_pair(member, **sizes) as pair:
            return rank_main(pair, member)

    results = anyep.local_group(num_ranks).run(with_member)
    for share, *_ in results:
        assert out[:, share].shape[1] == share.stop - share.start
    for share, out_r, grad_r, _, copies in results:
        assert_close(out_r, out[:, share])
        assert_close(grad_r, grad_x[:, share])
        for one, parameter in zip(copies, layer.replicated_parameters(), strict=True):
            assert_close(one, parameter.grad, 1e-5)
    for one, other in zip([g for result in results for g in result[3]], experts, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_a_layer_on_ranks_is_the_layer_on_one(num_ranks):
    check_layer(num_ranks)


def process_step(group, rank, x, grad):
    sizes = {"hidden": H, "num_experts": E, "num_topk": K, "max_tokens_per_rank": 16, "wire": "fp32"}
    with nn.open_pair(group, **sizes) as pair:
        _, out, grad_x, _ = layer_step(pair, x[rank::2], grad[rank::2])
        return out, grad_x


def test_processes_give_the_bits_of_threads():
    case = make_case((12,), seed=4)
    x, grad = case.x[0], case.grad[0]
    threads = on_ranks(2, lambda pair: layer_step(pair, x[pair.rank :: 2], grad[pair.rank :: 2])[1:3])
    for one, other in zip(run_processes(2, process_step, x, grad), threads, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_the_hook_takes_the_place_of_dense_experts():
    """An existing layer keeps its gate and its forward; two lines change where its experts compute."""

    class Dense(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.gate = torch.nn.Linear(H, E)
            self.experts = DenseExperts()

        def forward(self, x):
            weights, idx = self.gate(x).softmax(dim=1).topk(K)
            return self.experts(x, idx, weights)

    class DenseExperts(torch.nn.ModuleList):
        def __init__(self):
            super().__init__(make_experts())

        def forward(self, x, idx, weights):
            return dense_sum(self, x, idx, weights)

    x = torch.randn(6, H, generator=torch.Generator().manual_seed(1))
    expected = Dense()(x).detach()
    models = [Dense(), Dense()]  # made here: threads share torch's one generator

    def rank_main(pair):
        model = models[pair.rank]
        mine = [model.experts[expert] for expert in pair.local_experts]
        model.experts = nn.Experts(pair, mine)
        return model(x[pair.rank :: 2]).detach()

    for rank, out in enumerate(on_ranks(2, rank_main)):
        assert_close(out, expected[rank::2])


def test_a_gradient_that_is_missing_on_one_rank_counts_as_zeros():
    def rank_main(member):
        one, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        if member.rank:
            one.grad = torch.arange(3.0)
        other.grad = torch.full((2,), 1.0 + member.rank, dtype=torch.float64)
        nn.sum_gradients([one, other], nn.RankSum(member))
        return one.grad.tolist(), other.grad.tolist()

    assert anyep.local_group(2).run(rank_main) == [([0.0, 1.0, 2.0], [3.0, 3.0])] * 2


def test_sums_of_different_sizes_are_refused():
    def rank_main(member):
        with pytest.raises(ValueError, match="all ranks must sum tensors of one size"):
            nn.RankSum(member)(torch.ones(2 + member.rank))

    anyep.local_group(2).run(rank_main)


def gloo_sum(group, rank, path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        return nn.RankSum(dist.group.WORLD)(torch.arange(3.0) + rank).tolist()
    finally:
        dist.destroy_process_group()


def test_a_process_group_sums_by_itself(tmp_path):
    assert run_processes(2, gloo_sum, str(tmp_path / "store")) == [[1.0, 3.0, 5.0]] * 2


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda pair: nn.Experts(pair, make_experts()), "owns the 3 experts .* got 6"),
        (lambda pair: nn.MoE(pair, nn.Router(H, E, K + 1), local(pair)), "router has num_topk=4"),
        (lambda pair: nn.MoE(pair, nn.Router(H, E + 1, K), local(pair)), "router has num_experts=7"),
    ],
)
def test_modules_that_do_not_fit_the_buffer(make, text):
    with pytest.raises(ValueError, match=text):
        on_ranks(2, make)


def test_experts_that_lose_a_row():
    def rank_main(pair):
        hook = nn.Experts(pair, lambda batch: batch.x[1:])
        with pytest.raises(ValueError, match="one row for each they got"):
            hook(torch.ones(2, H), torch.zeros(2, K, dtype=torch.int64).fill_(pair.rank * 3), torch.ones(2, K))

    on_ranks(2, rank_main)


def test_a_batch_without_weights_has_none_for_its_rows():
    def rank_main(pair):
        batch = nn.dispatch(pair, torch.ones(1, H), torch.zeros(1, K, dtype=torch.int64))
        with pytest.raises(ValueError, match="without topk_weights"):
            batch.row_weights()

    on_ranks(1, rank_main)


@pytest.mark.parametrize("what", ["layout", "reduce", "ep", "way", "topk_idx"])
def test_bad_calls(what):
    def rank_main(pair):
        idx = torch.zeros(1, K, dtype=torch.int64)
        good = nn.dispatch(pair, torch.ones(1, H), idx)
        with nn.open_pair(
            anyep.local_group(1)[0], hidden=H, num_experts=E, num_topk=K, max_tokens_per_rank=2, wire="fp32"
        ) as other:
            foreign = nn.dispatch(other, torch.ones(1, H), idx).way
        bad = {
            "layout": {"layout": "padded"},
            "reduce": {"layout": "compact", "reduce": "expert"},
            "way": {"way": foreign},
            "topk_idx": {"way": good.way},
        }
        ep = object() if what == "ep" else pair
        with pytest.raises((TypeError, ValueError), match=what):
            nn.dispatch(ep, torch.ones(1, H), idx + (what == "topk_idx"), **bad.get(what, {}))

    on_ranks(1, rank_main)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda pair, x, idx: nn.dispatch(pair, (x, x), idx), "x must be a torch.Tensor, got tuple"),
        (lambda pair, x, idx: nn.dispatch(pair, x, idx.tolist()), "topk_idx must be a torch.Tensor, got list"),
        (lambda pair, x, idx: nn.dispatch(pair, x, idx, 1.0), "topk_weights must be a torch.Tensor or None, got float"),
        (lambda pair, x, idx: nn.dispatch(pair, x.double(), idx), "x must be float32, got float64"),
        (lambda pair, x, idx: nn.combine([x], nn.dispatch(pair, x, idx)), "y must be a torch.Tensor, got list"),
        (lambda pair, x, idx: nn.combine(x, x), "batch must be what anyep.nn.dispatch returned, got Tensor"),
    ],
)
def test_what_is_no_tensor_is_named(call, text):
    def rank_main(pair):
        with pytest.raises(TypeError, match=text):
            call(pair, torch.ones(2, H), torch.zeros(2, K, dtype=torch.int64))

    on_ranks(1, rank_main)


def test_an_index_of_another_dtype_is_not_the_way():
    def rank_main(pair):
        idx = torch.zeros(2, K, dtype=torch.int64)
        way = nn.dispatch(pair, torch.ones(2, H), idx).way
        with pytest.raises(ValueError, match="topk_idx is not what way was dispatched with"):
            nn.dispatch(pair, torch.ones(2, H), idx.int(), way=way)

    on_ranks(1, rank_main)


def test_a_choice_with_any_strides():
    case = make_case((6, 4), seed=13)

    def rank_main(pair):
        idx = case.idx[pair.rank].t().contiguous().t()
        batch = nn.dispatch(pair, case.x[pair.rank], idx)
        return nn.combine(batch.x, batch).detach()

    for rank, out in enumerate(on_ranks(2, rank_main)):
        assert_close(out, case.x[rank] * (case.idx[rank] >= 0).sum(dim=1, keepdim=True))


def test_a_copy_of_a_layer_has_its_own_weights_and_the_same_buffers():
    def rank_main(pair):
        layer = nn.MoE(pair, nn.Router(hidden=H, num_experts=E, num_topk=K), local(pair))
        other = copy.deepcopy(layer)
        assert other.experts.ep.forward is pair.forward
        x = torch.randn(3, H)
        assert torch.equal(other(x), layer(x))
        other(x).sum().backward()
        assert layer.router.weight.grad is None

    on_ranks(2, rank_main)
