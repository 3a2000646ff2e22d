"""Odd numbers of ranks, also more than cores, round after round on one buffer: every byte is as the oracle says."""

from __future__ import annotations

import random

import pytest
import torch

import anyep
from anyep.testing.oracle_sums import expected_sum
from anyep.testing.processes import run_processes
from tests.exchange.cases import LAYOUTS, Case
from tests.exchange.rounds import ReceivedCopy, assert_same, check_received, open_buffer, poison_arenas

NUM_ROUNDS = 50
MAX_TOKENS = 20
EAGER_BYTES = (0, 700, 1 << 20)
"""Never, rows of some pairs, all rows."""


def draw_rounds(num_ranks):
    """Return the rounds of one buffer: each rank has other tokens in each, or none at all."""
    rng = random.Random(num_ranks)
    num_experts = 2 * num_ranks - 1
    placement = tuple((5 * expert) % num_ranks for expert in range(num_experts))
    return [
        Case(
            num_tokens=tuple(rng.choice((0, rng.randint(0, MAX_TOKENS))) for _ in range(num_ranks)),
            max_tokens=MAX_TOKENS,
            hidden=130,
            num_topk=3,
            num_experts=num_experts,
            wire="fp8",
            scales="fp32",
            layout=LAYOUTS[number % 3],
            alignment=4,
            idx_dtype=torch.int64,
            with_weights=True,
            num_bias=0,
            reduce="rank",
            skew=rng.choice((1.0, 3.0)),
            placement=placement,
            spare_rows=None,
            num_threads=1,
            seed=number,
        )
        for number in range(NUM_ROUNDS)
    ]


def expert_output(case, rank):
    """Return what ``rank`` computes of its batch: another number in every place, the same whoever asks."""
    there = case.exchange.arrivals[rank]
    generator = torch.Generator().manual_seed(100 * case.seed + rank)
    return torch.randn(there.num_rows, case.hidden, generator=generator).bfloat16()


def finished(result):
    return result.wait() if isinstance(result, anyep.Pending) else result


def play_rounds(group, rank, rounds):
    """Exchange; each rank holds its own rows and sums against the oracle. Return how many rounds were right."""
    poison_arenas()
    verified = 0
    for eager_bytes in EAGER_BYTES:
        with open_buffer(rounds[0], group, eager_bytes=eager_bytes) as ep:
            for number, case in enumerate(rounds):
                play_round(ep, case, split_dispatch=number % 2 == 1, split_combine=number % 5 == 1)
                verified += 1
    return verified


def play_round(ep, case, *, split_dispatch, split_combine):
    batch = case.batches[ep.rank]
    sent = (batch.x, batch.topk_idx, batch.topk_weights)
    received = finished(ep.dispatch(*sent, layout=case.layout, wait=not split_dispatch))
    check_received(case, ep.rank, ReceivedCopy.of(received))
    y = expert_output(case, ep.rank).view(received.x.shape)
    out = finished(ep.combine(y, received.handle, wait=not split_combine))
    expected = expected_sum(
        case.exchange,
        ep.rank,
        lambda owner, rows: expert_output(case, owner)[rows],
        dtype=y.dtype,
        factors=batch.topk_weights if case.layout == "padded" else None,
    )
    assert_same("combined", out, expected)


@pytest.mark.parametrize("num_ranks", [3, 5, pytest.param(7, marks=pytest.mark.slow), 9])
def test_threads(num_ranks):
    rounds = draw_rounds(num_ranks)
    verified = anyep.local_group(num_ranks).run(lambda member: play_rounds(member, member.rank, rounds))
    assert verified == [len(EAGER_BYTES) * NUM_ROUNDS] * num_ranks


@pytest.mark.parametrize("num_ranks", [3, 5, pytest.param(7, marks=pytest.mark.slow), 9])
def test_processes(num_ranks):
    verified = run_processes(num_ranks, play_rounds, draw_rounds(num_ranks), timeout_s=240.0)
    assert verified == [len(EAGER_BYTES) * NUM_ROUNDS] * num_ranks
