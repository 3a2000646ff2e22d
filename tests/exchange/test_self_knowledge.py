"""What a buffer and a handle tell of themselves, for layers that are built on them."""

from __future__ import annotations

import pytest
import torch

import anyep

SIZES = {"hidden": 8, "num_experts": 5, "num_topk": 2, "max_tokens_per_rank": 4}


def on_ranks(function, **options):
    def rank_main(member):
        with anyep.Buffer(member, **SIZES, **options) as ep:
            return function(ep)

    return anyep.local_group(2).run(rank_main)


def test_a_buffer_tells_what_it_was_made_from():
    for options in on_ranks(lambda ep: ep.options, wire="fp8", scales="pow2"):
        assert (options.hidden, options.num_experts, options.num_topk) == (8, 5, 2)
        assert (options.wire, options.scales, options.expert_alignment) == ("fp8", "pow2", 1)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [(None, [[0, 1, 2], [3, 4]]), ([1, 0, 1, 1, 0], [[1, 4], [0, 2, 3]]), ([1] * 5, [[], [0, 1, 2, 3, 4]])],
)
def test_a_rank_knows_its_experts(placement, expected):
    assert on_ranks(lambda ep: ep.local_experts, placement=placement) == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_handle_remembers_the_choice_of_experts(dtype):
    idx = torch.tensor([[0, 4], [-1, 2], [3, 3]], dtype=dtype)

    def rank_main(ep):
        sent = idx.clone()
        handle = ep.dispatch(torch.ones(3, 8).bfloat16(), sent).handle
        sent.fill_(1)
        return handle.topk_idx()

    for kept in on_ranks(rank_main):
        assert kept.dtype == dtype
        assert torch.equal(kept, idx)
