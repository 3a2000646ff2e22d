"""Ranks that are left out, on one host and on several: the others forward for each other, and bits are the oracle's."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anyep
from anyep.layout.hosts import map_hosts
from anyep.transport import registry
from tests.exchange.cases import Case, cases
from tests.exchange.rounds import check, open_buffer, play

PATIENT = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
SHAPES = ("aaaa", "aabb", "abab", "abbb", "aabbc", "abcd", "aabbcc")


def without(case: Case, absent: set[int], seed: int) -> Case:
    """Return a case in which these ranks take no part."""
    tokens = tuple(0 if rank in absent else count for rank, count in enumerate(case.num_tokens))
    return replace(case, num_tokens=tokens, absent=tuple(sorted(absent)), seed=seed, max_tokens=case.most_tokens)


@st.composite
def splits(draw) -> tuple[Case, str, set[int]]:
    """Draw an exchange, where its ranks live, and who is left out; somebody is left."""
    homes = draw(st.sampled_from(SHAPES))
    case = draw(cases(ranks=st.just(len(homes)), numbers=1 << 18))
    absent = draw(st.sets(st.integers(0, len(homes) - 1), min_size=1, max_size=len(homes) - 1))
    return replace(case, spare_rows=None), homes, absent


@pytest.fixture
def homed(monkeypatch):
    """Return a function that puts ranks on hosts, a letter a rank."""
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "1")
    return lambda homes: monkeypatch.setattr(registry, "group_ranks", lambda *_: map_hosts(homes))


@settings(max_examples=25, **PATIENT)
@given(splits(), st.sampled_from([0, 1 << 20, None]), st.sampled_from(["closes", "is silent"]))
def test_the_ranks_that_are_left_exchange_what_the_oracle_says(homed, split, straight_bytes, end):
    case, homes, absent = split
    homed(homes)
    later = without(case, absent, case.seed + 1)
    done = threading.Barrier(case.num_ranks)

    def rank_main(member):
        with open_buffer(case, member, straight_bytes=straight_bytes) as ep:
            first = play(case, ep)
            if member.rank in absent:
                if end == "closes":
                    ep.close()
                done.wait(60)
                return first, None
            ep.leave_out(absent)
            second = play(later, ep)
            assert ep.left_out == sorted(absent)
            ep.barrier()
            done.wait(60)
            return first, second

    outcomes = anyep.local_group(case.num_ranks).run(rank_main)
    check(case, [first for first, _ in outcomes], map_hosts(homes))
    check(later, [second for _, second in outcomes], map_hosts(homes))


@settings(max_examples=12, **PATIENT)
@given(splits(), st.sampled_from([0, 1 << 20]))
def test_two_parts_that_leave_each_other_out_come_together_again(homed, split, straight_bytes):
    case, homes, one = split
    homed(homes)
    parts = one, set(range(case.num_ranks)) - one
    apart = [without(case, others, case.seed + 1) for others in parts]
    together = replace(case, seed=case.seed + 2)

    def rank_main(member):
        with open_buffer(case, member, straight_bytes=straight_bytes) as ep:
            ours = int(member.rank in one)
            ep.barrier()
            ep.leave_out(parts[ours])
            alone = play(apart[ours], ep)
            ep.leave_out(())
            return ours, alone, play(together, ep)

    outcomes = anyep.local_group(case.num_ranks).run(rank_main)
    for number in range(2):
        check(apart[number], [alone if ours == number else None for ours, alone, _ in outcomes], map_hosts(homes))
    check(together, [last for _, _, last in outcomes], map_hosts(homes))


SIZES = {"hidden": 64, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": 8}


@pytest.mark.parametrize("homes", ["aaaa", "aabb"])
def test_a_left_out_rank_that_ends_with_an_error_does_not_end_the_others(homed, homes):
    """It calls, waits in vain for those that have left it out, and says so."""
    homed(homes)
    gone = threading.Event()

    def rank_main(member):
        patience = {"timeout_s": 0.3 if member.rank == 1 else 20.0}
        with anyep.Buffer(member, **SIZES, **patience, eager_bytes=0, straight_bytes=0) as ep:
            ep.barrier()
            x = torch.ones(8, 64).bfloat16()
            idx = torch.tensor([[0, 3]]).repeat(8, 1)
            if member.rank == 1:
                with pytest.raises(anyep.PeerError):
                    ep.dispatch(x, idx)
                gone.set()
                return
            ep.leave_out([1])
            assert gone.wait(20)
            received = ep.dispatch(x, idx)
            y = ep.empty_output(received.handle).copy_(received.x)
            pending = ep.combine(y, received.handle, wait=False)
            while not pending.done():
                pass
            assert torch.equal(pending.wait(), 2 * x)

    anyep.local_group(4).run(rank_main)


@pytest.mark.parametrize("homes", ["aaaa", "aabb"])
def test_a_token_for_a_rank_that_is_left_out_is_refused_before_a_word_is_sent(homed, homes):
    homed(homes)

    def rank_main(member):
        with anyep.Buffer(member, **SIZES) as ep:
            ep.barrier()
            if member.rank == 3:
                return
            ep.leave_out([3])
            x = torch.ones(1, 64).bfloat16()
            with pytest.raises(ValueError, match=r"topk_idx names experts of rank 3, which is left out: put -1 there"):
                ep.dispatch(x, torch.tensor([[0, 3]]))
            assert len(ep.dispatch(x, torch.tensor([[0, -1]])).x) == 3 * (member.rank == 0)

    anyep.local_group(4).run(rank_main)


def test_between_hosts_a_handle_from_before_is_refused_and_so_is_leaving_out_in_the_middle(homed):
    homed("aabb")
    checked = threading.Barrier(4)

    def rank_main(member):
        with anyep.Buffer(member, **SIZES, straight_bytes=0) as ep:
            x, idx = torch.ones(8, 64).bfloat16(), torch.tensor([[0, 3]]).repeat(8, 1)
            if member.rank == 0:
                checked.wait(20)  # without it nobody's dispatch can end, in the background either
            pending = ep.dispatch(x, idx, wait=False)
            if member.rank != 0:
                with pytest.raises(ValueError, match="operations are in flight"):
                    ep.leave_out([3 - member.rank])
                checked.wait(20)
            received = pending.wait()
            if member.rank == 1:
                return
            ep.leave_out([1])
            with pytest.raises(ValueError, match="others were left out when this handle was made"):
                ep.combine(received.x, received.handle)
            with pytest.raises(ValueError, match="others were left out when this handle was made"):
                ep.dispatch(x, handle=received.handle)
            again = ep.dispatch(x, idx)
            assert torch.equal(ep.combine(again.x, again.handle), 2 * x)

    anyep.local_group(4).run(rank_main)
