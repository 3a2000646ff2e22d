"""Random exchanges, bit for bit against the oracle: ranks as threads, poisoned arenas (conftest.py)."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anyep
from tests.exchange.cases import LAYOUTS, WIRES, Case, cases
from tests.exchange.rounds import check, open_buffer, play

PATIENT = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def run(case: Case, kernels: str = "cpu") -> None:
    def rank_main(member):
        with open_buffer(case, member, kernels=kernels) as ep:
            return play(case, ep)

    check(case, anyep.local_group(case.num_ranks).run(rank_main))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("wires", [WIRES[:3], WIRES[3:]], ids=["plain", "fp8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exchange_is_exact(layout, wires):
    """6 x 310 cases; with those between hosts and of other kernels more than 2,000."""

    @settings(max_examples=310, **PATIENT)
    @given(cases(layouts=[layout], wires=wires))
    def property_holds(case):
        run(case)

    property_holds()


@settings(max_examples=50, **PATIENT)
@given(cases())
def test_the_reference_kernels_run_the_same_protocol(case):
    run(case, kernels="reference")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=10_000, **{**PATIENT, "derandomize": False})
@given(cases(numbers=None))
def test_exchange_is_exact_at_length(case):
    run(case)


@settings(max_examples=20, **PATIENT)
@given(cases(), st.integers(2, 4))
def test_the_same_inputs_give_the_same_bits_again(case, repeats):
    def rank_main(member):
        with open_buffer(case, member) as ep:
            return [play(case, ep) for _ in range(repeats)]

    for outcomes in zip(*anyep.local_group(case.num_ranks).run(rank_main), strict=True):
        check(case, list(outcomes))
