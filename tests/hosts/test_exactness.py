"""Ranks of several hosts, played by threads: every received bit is that of one host, every sum that of the oracle."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anyep
from anyep.layout.hosts import group_ranks, map_hosts
from anyep.transport import registry
from tests.exchange.cases import LAYOUTS, Case, cases
from tests.exchange.programs import Player, check_program, programs
from tests.exchange.rounds import check, open_buffer, play
from tests.hosts.shapes import STRAIGHT_BYTES, cut_small

PATIENT = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
}
WAYS = st.sampled_from(STRAIGHT_BYTES)
"""Everything forwarded, rows of some pairs of ranks and hosts straight, of more, of all; measured."""


def run(case: Case, straight_bytes: int | None = 0, kernels: str = "cpu") -> list:
    def rank_main(member):
        with open_buffer(case, member, kernels=kernels, straight_bytes=straight_bytes) as ep:
            return play(case, ep)

    return anyep.local_group(case.num_ranks).run(rank_main)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exchange_between_hosts_is_exact(played, layout):
    """3 x 40 cases."""

    @settings(max_examples=40, **PATIENT)
    @given(cases(layouts=[layout]), st.integers(1, 4), WAYS)
    def property_holds(case, ranks_per_host, straight_bytes):
        played(ranks_per_host)
        check(case, run(case, straight_bytes), group_ranks(case.num_ranks, ranks_per_host))

    property_holds()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=3_000, **{**PATIENT, "derandomize": False})
@given(cases(), st.integers(1, 4), WAYS, st.sampled_from([64, 5000, 256 << 10]))
def test_an_exchange_between_hosts_is_exact_at_length(played, case, ranks_per_host, straight_bytes, chunk_bytes):
    played(ranks_per_host)
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch, chunk_bytes)
        outcomes = run(case, straight_bytes)
    check(case, outcomes, group_ranks(case.num_ranks, ranks_per_host))


@settings(max_examples=10, **PATIENT)
@given(cases(), st.integers(1, 3), WAYS)
def test_the_reference_kernels_cross_hosts_alike(played, case, ranks_per_host, straight_bytes):
    played(ranks_per_host)
    check(case, run(case, straight_bytes, kernels="reference"), group_ranks(case.num_ranks, ranks_per_host))


@settings(max_examples=40, **PATIENT)
@given(programs(), st.integers(1, 3), WAYS)
def test_operations_in_flight_between_hosts_are_exact(played, program, ranks_per_host, straight_bytes):
    played(ranks_per_host)

    def rank_main(member):
        options = {"max_in_flight": program.max_in_flight, "straight_bytes": straight_bytes}
        with open_buffer(program.base, member, **options) as ep:
            return Player(program, ep).play()

    diaries = anyep.local_group(program.base.num_ranks).run(rank_main)
    check_program(program, diaries, group_ranks(program.base.num_ranks, ranks_per_host))


@settings(max_examples=25, **PATIENT)
@given(programs(), st.integers(1, 3), st.sampled_from([64, 700, 5000]), st.sampled_from([0, 0, 3000]))
def test_rows_that_cross_in_many_pieces_are_exact(played, program, ranks_per_host, chunk_bytes, straight_bytes):
    played(ranks_per_host)

    def rank_main(member):
        options = {"max_in_flight": program.max_in_flight, "straight_bytes": straight_bytes}
        with open_buffer(program.base, member, **options) as ep:
            return Player(program, ep).play()

    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch, chunk_bytes)
        diaries = anyep.local_group(program.base.num_ranks).run(rank_main)
    check_program(program, diaries, group_ranks(program.base.num_ranks, ranks_per_host))


@settings(max_examples=30, **PATIENT)
@given(cases(), st.lists(st.sampled_from("abc"), min_size=9, max_size=9), WAYS)
def test_hosts_whose_ranks_take_turns_are_exact(played, case, names, straight_bytes):
    """A host's sum stands where its first rank would: the order of addition is one that can be written down."""
    played(1)
    hosts = map_hosts(names[: case.num_ranks])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "group_ranks", lambda *_: hosts)
        outcomes = run(case, straight_bytes)
    check(case, outcomes, hosts)
