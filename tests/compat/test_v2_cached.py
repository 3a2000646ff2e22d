"""Cached V2 dispatches: other rows the same way, as a backward pass sends gradients."""

from __future__ import annotations

import pytest
import torch

from tests.compat.v2_world import World, poisoned, same_bits  # noqa: F401

WORLD = World()
HOSTS = pytest.mark.parametrize("per_host", [4, 2])


@pytest.fixture(autouse=True)
def hosts(request, monkeypatch):
    per_host = getattr(request.node, "callspec", None) and request.node.callspec.params.get("per_host")
    if per_host:
        monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))


def first(buffer, inputs, **options):
    return buffer.dispatch(inputs.x, inputs.idx, inputs.weights, num_experts=8, **options)


@HOSTS
@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("expand", [False, True])
def test_rows_land_where_the_first_dispatch_put_them(expand, sync, per_host):
    def rank_main(buffer, i):
        options = {"do_expand": expand, "expert_alignment": 4}
        x, idx, weights, handle, _ = first(buffer, i, do_cpu_sync=sync, **options)
        again = buffer.dispatch(i.x, topk_weights=i.weights, handle=handle, do_expand=expand)
        assert same_bits(again[0], x)
        assert same_bits(again[2], weights)
        assert again[1] is None if expand else same_bits(again[1], idx)
        return True

    assert all(WORLD.run(rank_main))


def test_the_handle_is_the_same_object_and_weights_come_only_if_given():
    def rank_main(buffer, i):
        handle = first(buffer, i)[3]
        _, idx, weights, again, event = buffer.dispatch(i.x, handle=handle)
        return again is handle, idx is not None, weights, event.event

    assert WORLD.run(rank_main) == [(True, True, None, None)] * 4


@HOSTS
@pytest.mark.parametrize("expand", [False, True])
def test_gradients_of_another_kind_than_the_tokens_take_the_same_way(expand, per_host):
    def rank_main(buffer, i):
        fp8 = (i.x.to(torch.float8_e4m3fn), i.x[:, :2].float().contiguous())
        handle = buffer.dispatch(fp8, i.idx, num_experts=8, do_expand=expand)[3]
        return buffer.dispatch(i.x, handle=handle, do_expand=expand)[0], first(buffer, i, do_expand=expand)[0]

    assert all(same_bits(again, fresh) for again, fresh in WORLD.run(rank_main))


def test_a_second_batch_of_scales_takes_the_same_way():
    def rank_main(buffer, i):
        scales = i.x[:, :5].float().contiguous()
        x, _, _, handle, _ = buffer.dispatch((i.x.to(torch.float8_e4m3fn), scales), i.idx, num_experts=8)
        again = buffer.dispatch((i.x.to(torch.float8_e4m3fn), scales * 2), handle=handle)[0]
        return same_bits(again[0], x[0]) and same_bits(again[1], x[1] * 2)

    assert all(WORLD.run(rank_main))


def test_the_first_results_stay_as_they_were():
    def rank_main(buffer, i):
        x, _, _, handle, _ = first(buffer, i)
        kept = x.clone()
        buffer.dispatch(-i.x, handle=handle)
        return same_bits(x, kept)

    assert all(WORLD.run(rank_main))


def test_neither_sms_nor_experts_need_be_named_again():
    def rank_main(buffer, i):
        handle = first(buffer, i, num_sms=24)[3]
        buffer.dispatch(i.x, handle=handle, num_sms=0, num_experts=None)
        return handle.num_sms

    assert WORLD.run(rank_main) == [24] * 4


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 16},
        {"expert_alignment": 2},
        {"num_max_tokens_per_rank": 10},
        {"do_cpu_sync": True},
        {"topk_idx": torch.zeros(1, 4, dtype=torch.int64)},
    ],
)
def test_what_differs_from_the_handle_is_an_assertion(options):
    def rank_main(buffer, i):
        handle = first(buffer, i)[3]
        with pytest.raises(AssertionError, match=next(iter(options)).removeprefix("do_").replace("_", ".")):
            buffer.dispatch(i.x, handle=handle, **options)
        return True

    assert all(WORLD.run(rank_main))


@pytest.mark.parametrize("options", [{"do_expand": True}, {"cumulative_local_expert_recv_stats": torch.zeros(2).int()}])
def test_expanding_otherwise_and_counting_again_are_refused(options):
    def rank_main(buffer, i):
        handle = first(buffer, i)[3]
        with pytest.raises(RuntimeError, match="Assertion exception"):
            buffer.dispatch(i.x, handle=handle, **options)
        return same_bits(buffer.dispatch(i.x, handle=handle)[0], first(buffer, i)[0])

    assert all(WORLD.run(rank_main))


@HOSTS
@pytest.mark.parametrize("expand", [False, True])
def test_a_backward_pass_is_a_cached_dispatch_and_a_combine(expand, per_host):
    """d(combine) sends gradients out again, d(dispatch) sums them: both are adjoint, so inner products agree."""

    def rank_main(buffer, i):
        options = {"num_experts": 8, "do_expand": expand}
        x = torch.randint(-4, 5, i.x.shape).bfloat16()
        g = torch.randint(-4, 5, i.x.shape).bfloat16()
        rows, _, _, handle, _ = buffer.dispatch(x, i.idx, **options)
        out = buffer.combine(rows, handle)[0]
        grad_rows = buffer.dispatch(g, handle=handle, do_expand=expand)[0]
        grad_x = buffer.combine(grad_rows, handle)[0]
        return float((out.double() * g.double()).sum()), float((grad_x.double() * x.double()).sum())

    assert all(forward == backward for forward, backward in WORLD.run(rank_main))
