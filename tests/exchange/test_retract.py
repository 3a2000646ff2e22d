"""A rank that is killed while an operation that all ranks refuse is taken back: who is left hears of it, and how."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
import torch

import anyep
from anyep.exchange import across, barrier, dispatch_across, retract
from anyep.testing.processes import RankProcesses

VICTIM, NUM_RANKS = 2, 4
LOST = "PeerLost", (VICTIM,)
MOMENTS = ["before its word", "behind its word", "amid deliveries"]
REFUSALS = ["too many rows", "another call"]
SIZES = {"hidden": 512, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 64, "static_rows": 160}


def die(*_args, **_options):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment):
    """Let this process be killed at a moment of its next refusal."""
    if moment == "before its word":
        dispatch_across.retract = barrier.retract = die
    elif moment == "behind its word":
        retract.carry = die
    else:
        advance = retract._Delivery.advance

        def advance_and_die(delivery):
            moved = advance(delivery)
            if moved:
                die()
            return moved

        retract._Delivery.advance = advance_and_die


def call_good(ep):
    tokens = torch.arange(64)
    x = torch.full((64, 512), ep.rank + 1.0).bfloat16()
    received = ep.dispatch(x, torch.stack([tokens % 8, (tokens + 4) % 8], 1))
    y = ep.empty_output(received.handle).copy_(received.x)
    assert torch.equal(ep.combine(y, received.handle), 2 * x)


def call_refused(ep, refusal):
    """Send several pieces ahead of an announcement that all ranks refuse."""
    tokens = torch.arange(64)
    x = torch.full((64, 512), ep.rank + 1.0).bfloat16()
    idx = torch.stack([tokens % 8, (tokens + 4) % 8], 1)
    if refusal == "too many rows":
        ep.dispatch(x, idx * 0 + torch.tensor([6, 7]))
    elif ep.rank == VICTIM:
        ep.barrier()
    else:
        ep.dispatch(x, idx)


def heard(call, *args):
    """Return (error, whom it names) of a call; nothing where it goes well."""
    try:
        call(*args)
    except anyep.PeerError as error:
        return type(error).__name__, error.ranks
    except (anyep.CapacityError, ValueError) as error:
        return type(error).__name__, ()
    return None


def refuse(group, rank, moment, refusal, straight_bytes):
    """Refuse once, and exchange behind it if that went well; the victim dies meanwhile. Return what came of both, and
    how late."""
    os.environ["ANYEP_RANKS_PER_HOST"] = "2"
    across.CHUNK_BYTES = 8 << 10
    with anyep.Buffer(group, straight_bytes=straight_bytes, timeout_s=30.0, **SIZES) as ep:
        call_good(ep)
        if rank == VICTIM:
            die_at(moment)
        begin = time.monotonic()
        first = heard(call_refused, ep, refusal)
        second = None if first == LOST else heard(call_good, ep)
        return first, second, time.monotonic() - begin


@pytest.mark.parametrize("straight_bytes", [0, 1 << 20], ids=["forwarded", "straight"])
@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_rank_that_dies_between_a_refusal_and_its_end_is_named(moment, refusal, straight_bytes):
    with RankProcesses(NUM_RANKS, refuse, moment, refusal, straight_bytes) as ranks:
        outcomes = ranks.outcomes(timeout_s=60)
    assert outcomes[VICTIM].how == "died", outcomes[VICTIM].tell()
    refused = ("CapacityError" if refusal == "too many rows" else "ValueError", ())
    for rank in set(range(NUM_RANKS)) - {VICTIM}:
        assert outcomes[rank].how == "returned", outcomes[rank].tell()
        first, second, elapsed = outcomes[rank].value
        assert elapsed < 10.0, "long before the 30 s for which a silent rank is waited for"
        if moment == "before its word" and rank < 2:
            assert first == LOST, "ranks of the other host miss the victim's word"
        assert first == LOST or (first, second) == (refused, LOST)


def refuse_for_ever(group, rank, seed, straight_bytes):
    """Exchange and refuse in a random order, the same on all ranks, until the victim dies at a random time."""
    os.environ["ANYEP_RANKS_PER_HOST"] = "2"
    across.CHUNK_BYTES = 8 << 10
    order = random.Random(seed)
    victim, delay_s = order.randrange(NUM_RANKS), order.uniform(0.0, 0.3)
    with anyep.Buffer(group, straight_bytes=straight_bytes, timeout_s=30.0, **SIZES) as ep:
        call_good(ep)
        if rank == victim:
            threading.Timer(delay_s, die).start()
        for _ in range(100_000):
            refusal = order.choice(["", *REFUSALS])
            begin = time.monotonic()
            told = heard(call_refused, ep, refusal) if refusal else heard(call_good, ep)
            if told is not None and told[0].startswith("Peer"):
                return victim, told, time.monotonic() - begin
            assert bool(told) == bool(refusal), (told, refusal)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_rank_that_dies_amid_refusals_at_any_time_is_named(seed):
    with RankProcesses(NUM_RANKS, refuse_for_ever, seed, [0, 1 << 20, 3000][seed % 3]) as ranks:
        outcomes = ranks.outcomes(timeout_s=60)
    assert [outcome.how for outcome in outcomes].count("died") == 1
    for outcome in outcomes:
        if outcome.how != "died":
            assert outcome.how == "returned", outcome.tell()
            victim, told, elapsed = outcome.value
            assert told == ("PeerLost", (victim,))
            assert elapsed < 10.0
