"""top-k larger than the number of experts: columns may be spare, or name an expert again; bits are plain torch's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import anyep
from tests.compat import test_v1_combine, test_v1_low_latency, test_v2_combine, test_v2_dispatch
from tests.compat.v1_oracle import make_inputs, on_ranks, same_bits
from tests.compat.v2_world import Inputs, World

TOPK = 7
SHAPES = pytest.mark.parametrize(
    ("tokens", "experts", "per_host"),
    [([6], 1, 8), ([5, 3], 2, 8), ([4, 0, 6], 6, 8), ([5, 3], 4, 1), ([4, 6, 0, 2], 4, 2)],
)


pytestmark = pytest.mark.usefixtures("where")


def crowded(tokens, experts, **options):
    """Inputs whose tokens name experts several times, and none in some columns."""
    generator = torch.Generator().manual_seed(len(tokens) + experts)
    given = make_inputs(tokens, topk=1, experts=experts, **options)
    return [
        replace(
            one,
            topk_idx=torch.randint(-1, experts, (len(one.x), TOPK), generator=generator),
            topk_weights=torch.rand(len(one.x), TOPK, generator=generator),
        )
        for one in given
    ]


@dataclass(frozen=True, kw_only=True)
class Crowded(World):
    def _inputs(self, rank: int) -> Inputs:
        given = super()._inputs(rank)
        generator = torch.Generator().manual_seed(rank)
        return replace(given, idx=torch.randint(-1, self.num_experts, given.idx.shape, generator=generator))


@SHAPES
def test_normal_calls(tokens, experts, per_host, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    test_v1_combine.check_sums(crowded(tokens, experts), per_host, 1, experts=experts)


@SHAPES
def test_low_latency_calls(tokens, experts, per_host, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    suite = test_v1_low_latency
    given = crowded(tokens, experts, hidden=suite.H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, count, handle, *_ = suite.low(buffer, given, experts, use_fp8=False)
        suite.check_rows(given, buffer.rank, x, count, handle, lambda row: row, experts)
        y = suite.apply_experts(buffer, x)
        out = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, handle)[0]
        assert same_bits(out, suite.weighted(given, buffer.rank, mine.topk_weights))

    on_ranks(len(tokens), rank_main, **suite.LL)


@pytest.mark.parametrize("world", [World, Crowded])
@pytest.mark.parametrize(("expand", "multi"), [(False, True), (True, True), (True, False)])
@SHAPES
def test_elastic_calls(tokens, experts, per_host, expand, multi, world, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    played = world(num_tokens=tuple(tokens), num_experts=experts, num_topk=TOPK)
    per_host = min(per_host, len(tokens))
    test_v2_dispatch.check_order(played, per_host)
    test_v2_combine.check_sums(played, expand=expand, multi=multi, num_bias=1, per_host=per_host)


@pytest.mark.parametrize("layout", ["compact", "expert", "padded"])
def test_buffers_of_its_own(layout):
    """K = 7 columns of E = 3 experts: rows of each, and sums of as many as were named."""
    idx = torch.tensor([[2, 2, -1, 0, -1, 2, 1], [-1] * 7, [1, -1, -1, -1, -1, -1, -1], [0, 1, 2, 0, 1, 2, 0]])
    x = torch.arange(4 * 8).view(4, 8).bfloat16()

    def rank_main(member):
        sizes = {"hidden": 8, "num_experts": 3, "num_topk": 7, "max_tokens_per_rank": 8}
        with anyep.Buffer(member, **sizes) as ep:
            received = ep.dispatch(x, idx, layout=layout)
            times = (idx >= 0).sum(1, keepdim=True)
            if layout == "compact":
                mine = torch.tensor(ep.local_experts)
                times = torch.stack([torch.isin(idx, own).any(1) for own in (torch.tensor([0, 1]), torch.tensor([2]))])
                times = times.sum(0).unsqueeze(1)
                assert len(received.x) == 2 * torch.isin(idx, mine).any(1).sum()
            assert list(received.counts) == [2 * int((idx == expert).sum()) for expert in ep.local_experts]
            assert torch.equal(ep.combine(received.x, received.handle), x * times)

    anyep.local_group(2).run(rank_main)
