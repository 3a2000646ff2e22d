"""Random operations in flight: ranks call in one order and wait each in its own; every bit is as the oracle says."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anyep
from anyep.testing.processes import run_processes
from tests.exchange.programs import Player, Program, check_program, programs
from tests.exchange.rounds import open_buffer, poison_arenas

PATIENT = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def open_for(program: Program, group: object) -> anyep.Buffer:
    return open_buffer(program.base, group, max_in_flight=program.max_in_flight)


def run(program: Program) -> None:
    def rank_main(member):
        with open_for(program, member) as ep:
            return Player(program, ep).play()

    check_program(program, anyep.local_group(program.base.num_ranks).run(rank_main))


@pytest.mark.timeout(600)
@settings(max_examples=200, **PATIENT)
@given(programs())
def test_operations_in_flight_are_exact_in_every_order(program):
    run(program)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=10_000, **{**PATIENT, "derandomize": False})
@given(programs())
def test_operations_in_flight_are_exact_at_length(program):
    run(program)


def check_programs(group, rank, chosen):
    """Play each program, bring all diaries to rank 0, and hold them against the oracle there."""
    poison_arenas()
    for program in chosen:
        with open_for(program, group) as ep:
            diary = Player(program, ep).play()
        data = io.BytesIO()
        torch.save(diary, data)  # after the buffer's end: a peer may wait for what this rank has still in flight
        items = group.allgather(data.getvalue())
        if rank == 0:
            check_program(program, [torch.load(io.BytesIO(item), weights_only=False) for item in items])
    return len(chosen)


@pytest.mark.timeout(600)
def test_operations_in_flight_between_processes_are_exact():
    drawn: dict[int, list[Program]] = {}

    @settings(max_examples=60, database=None, **PATIENT)
    @given(programs(ranks=st.integers(2, 4)))
    def collect(program):
        drawn.setdefault(program.base.num_ranks, []).append(program)

    collect()
    for num_ranks, chosen in drawn.items():
        assert run_processes(num_ranks, check_programs, chosen, timeout_s=300) == [len(chosen)] * num_ranks
