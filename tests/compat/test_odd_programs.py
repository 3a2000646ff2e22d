"""Programs that use DeepEP in odd ways, over and over: every turn brings what plain torch says, on a device too.

Each turn draws how many tokens ranks have (often none), what becomes of handles, and what is under way meanwhile.
"""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch

from tests.compat.v1_oracle import arrival, make_inputs, on_ranks, rows_of, same_bits, send, summed
from tests.compat.v2_world import World

E1 = 12


def moved(handle):
    """Return a handle as a program that keeps it elsewhere gets it back: other tensors, in a list."""
    return [one.clone() if isinstance(one, torch.Tensor) else one for one in handle]


FATES = [lambda handle: handle, tuple, moved, copy.deepcopy, lambda handle: pickle.loads(pickle.dumps(handle))]


def draw(seed, num_ranks):
    chance = random.Random(seed)
    tokens = [chance.choice([0, 0, 1, 5, 17]) for _ in range(num_ranks)]
    return chance, make_inputs(tokens, hidden=128, seed=seed)


@pytest.mark.parametrize(("num_ranks", "per_host"), [(3, 8), (1, 8), (4, 2), (3, 1), (6, 4)])
def test_handles_that_were_moved_with_fixed_sizes_and_hooks_under_way(where, num_ranks, per_host, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    turns = 50 if num_ranks < 4 else 12

    def normal(buffer, chance, given):
        mine, worst = given[buffer.rank], chance.choice([0, 0, 200])
        x, _, weights, _, handle, event = send(buffer, mine, num_worst_tokens=worst, async_finish=chance.random() < 0.5)
        if event.event is not None:
            event.current_stream_wait()
        rows = len(arrival(given, buffer.rank).token)
        expected = rows_of(given, buffer.rank, lambda one: one.x)
        assert same_bits(x[:rows], expected)
        assert not x[rows:].any()
        kept = chance.choice(FATES)(handle)
        again, *_, event = buffer.dispatch(mine.x, handle=kept, async_finish=chance.random() < 0.5)
        if event.event is not None:
            event.current_stream_wait()
        assert same_bits(again[:rows], expected)
        bias = chance.choice([None, mine.x, (mine.x, -mine.x)])
        out, back, event = buffer.combine(again, kept, weights, bias, async_finish=chance.random() < 0.5)
        if event.event is not None:
            event.current_stream_wait()
        assert same_bits(back, torch.where(mine.topk_idx >= 0, mine.topk_weights, 0))
        biases = [] if bias is None else [bias] if isinstance(bias, torch.Tensor) else list(bias)
        outputs = [rows_of(given, rank, lambda one: one.x) for rank in range(num_ranks)]
        assert same_bits(out, summed(given, outputs, buffer.rank, biases, per_host) + 0)

    def low_latency(buffer, chance, given):
        """Return what ends a step that is under way."""
        mine = given[buffer.rank]
        x, _, handle, _, hook = buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, 17, E1, use_fp8=False, return_recv_hook=True
        )

        fate = chance.choice(FATES)

        def end():
            hook()
            out, _, hook_out = buffer.low_latency_combine(
                x, mine.topk_idx, mine.topk_weights, fate(handle), return_recv_hook=True
            )
            hook_out()
            total = torch.zeros(mine.x.shape)
            for column, weights in enumerate(torch.where(mine.topk_idx >= 0, mine.topk_weights, 0).unbind(1)):
                named = (mine.topk_idx[:, column] >= 0).unsqueeze(1)
                total = torch.where(named, total + mine.x.float() * weights.unsqueeze(1), total)
            assert same_bits(out, total.bfloat16())

        return end

    def rank_main(buffer):
        for turn in range(turns):
            chance, given = draw(turn, num_ranks)
            ends = [low_latency(buffer, chance, given) for _ in range(chance.choice([0, 1, 3]))]
            normal(buffer, chance, given)
            chance.shuffle(ends)
            for end in ends:
                end()
        return True

    assert on_ranks(num_ranks, rank_main, low_latency_mode=True) == [True] * num_ranks


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("tokens", [(3, 0, 5), (4,), (0, 0, 0, 0, 7)])
def test_handles_whose_fields_were_replaced_over_and_over(where, tokens, expand):
    world = World(num_tokens=tokens, num_experts=2 * 5 * 3)

    def rank_main(buffer, given):
        for turn in range(50):
            chance = random.Random(turn)
            asked = {"do_expand": expand, "expert_alignment": chance.choice([1, 3])}
            x, _, weights, handle, _ = buffer.dispatch(
                given.x, given.idx, given.weights, num_experts=30, do_cpu_sync=chance.choice([True, False]), **asked
            )
            expected = [one.clone() for one in buffer.combine(x, handle, weights, bias=given.bias)[:2]]
            for name in chance.sample(["topk_idx", "recv_src_metadata", "announced_counts"], chance.randint(0, 3)):
                setattr(handle, name, getattr(handle, name).clone())
            handle = chance.choice([lambda one: one, copy.copy, copy.deepcopy])(handle)
            if chance.random() < 0.3:
                handle.announced_counts = None  # as upstream's handles: ranks ask each other
            again, *_ = buffer.dispatch(given.x, topk_weights=given.weights, handle=handle, do_expand=expand)
            assert same_bits(again, x)
            found = buffer.combine(again, handle, weights, bias=given.bias)[:2]
            assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))
        return True

    assert world.run(rank_main) == [True] * len(tokens)
