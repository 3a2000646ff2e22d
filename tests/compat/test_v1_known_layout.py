"""A dispatch knows again what get_dispatch_layout counted last, and still sees what was changed since."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.compat.v1_oracle import E, arrival, make_inputs, on_ranks, rows_of, same_bits

MODES = {"grad": contextlib.nullcontext, "inference": torch.inference_mode}


def layout_of(buffer, idx, experts=E):
    per_rank, _, per_expert, inside, _ = buffer.get_dispatch_layout(idx, experts)
    return {"num_tokens_per_rank": per_rank, "is_token_in_rank": inside, "num_tokens_per_expert": per_expert}


@pytest.mark.parametrize("mode", list(MODES))
def test_layouts_of_many_batches_serve_in_any_order(mode):
    batches = [make_inputs([7 + seed, 5]) for seed in range(6)]

    def rank_main(buffer):
        with MODES[mode]():
            mine = [given[buffer.rank] for given in batches]
            layouts = [layout_of(buffer, one.topk_idx) for one in mine]
            for number in (5, 0, 3, 1, 4, 2, 0, 5):
                one, given = mine[number], batches[number]
                x, idx, weights, counts, _, _ = buffer.dispatch(
                    one.x, **layouts[number], topk_idx=one.topk_idx, topk_weights=one.topk_weights
                )
                there = arrival(given, buffer.rank)
                assert same_bits(x, rows_of(given, buffer.rank, lambda some: some.x))
                assert same_bits(idx, there.topk_idx)
                assert same_bits(weights, there.topk_weights)
                assert counts == there.counts

    on_ranks(2, rank_main)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("changed", ["topk_idx", "num_tokens_per_rank"])
def test_what_was_written_to_since_is_refused_by_name_and_the_buffer_goes_on(changed, mode):
    given = make_inputs([9, 4])

    def rank_main(buffer):
        with MODES[mode]():
            mine = given[buffer.rank]
            idx = torch.arange(len(mine.x)).remainder(E // 2).unsqueeze(1) + torch.tensor([0, E // 2])
            weights = torch.ones(idx.shape)
            layout = layout_of(buffer, idx)
            if changed == "topk_idx":
                idx[0, 1] = -1
            else:
                layout[changed][1] += 1
            with pytest.raises(RuntimeError, match=r"num_tokens_per_rank is .* but the tokens sent are"):
                buffer.dispatch(mine.x, **layout, topk_idx=idx, topk_weights=weights)
            rows = buffer.dispatch(mine.x, **layout_of(buffer, idx), topk_idx=idx, topk_weights=weights)[0]
            assert rows.shape[1] == mine.x.shape[1]

    on_ranks(2, rank_main)


def test_a_known_layout_says_nothing_of_other_rows_indices_or_weights():
    given = make_inputs([9, 9])

    def rank_main(buffer):
        mine = given[buffer.rank]
        layout = layout_of(buffer, mine.topk_idx)
        routing = {"topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights}
        expected = buffer.dispatch(mine.x, **layout, **routing)[0].clone()
        for spoilt in (
            {"x": mine.x[:5]},
            {"x": mine.x.t().contiguous().t()},
            {"topk_weights": mine.topk_weights.double()},
            {"topk_weights": mine.topk_weights[:5]},
            {"topk_weights": None},
            {"topk_idx": mine.topk_idx[:, :1].contiguous()},
            {"topk_idx": mine.topk_idx.int()},
        ):
            with pytest.raises(RuntimeError):
                buffer.dispatch(**{"x": mine.x} | layout | routing | spoilt)
        again = buffer.dispatch(mine.x, **layout, **routing | {"topk_idx": mine.topk_idx.clone()})[0]
        assert same_bits(again, expected)

    on_ranks(2, rank_main)


def test_the_same_indices_may_be_counted_for_other_numbers_of_experts():
    given = make_inputs([9, 9])

    def rank_main(buffer):
        mine = given[buffer.rank]
        routing = {"topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights}
        layouts = {experts: layout_of(buffer, mine.topk_idx, experts) for experts in (E, 2 * E)}
        for experts in (E, 2 * E, E):
            counts = buffer.dispatch(mine.x, **layouts[experts], **routing)[3]
            assert counts == arrival(given, buffer.rank, experts).counts

    on_ranks(2, rank_main)
