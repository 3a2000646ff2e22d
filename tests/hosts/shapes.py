"""Hosts that rank processes play, and random rounds on them: one set of processes plays many, and judges every bit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyep.exchange import across
from anyep.layout.hosts import map_hosts
from anyep.testing.processes import run_processes
from tests.exchange.cases import Case, cases
from tests.exchange.programs import Player, Program, check_program, programs
from tests.exchange.rounds import check, open_buffer, play, poison_arenas

SHAPES = {
    "2x2": ("aabb", "abab", "aaab"),
    "2x4": ("aaaabbbb", "aabbccdd"),
    "3x1": ("abc", "aab"),
    "3x2+1": ("aabbccd", "aaabbbc"),
}
"""Name -> which host each rank is on, by letter; the first is what the name says, the others have as many ranks."""
CHUNK_BYTES = (64, 700, 5000, 1 << 20)
STRAIGHT_BYTES = (0, 0, 3000, 50_000, 1 << 20, None)


def cut_small(patch, num_bytes: int) -> None:
    """Let rows cross in pieces of this size."""
    patch.setattr(across, "CHUNK_BYTES", num_bytes)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One buffer's life: an exchange or a program of them, on hosts of one shape."""

    what: Case | Program
    homes: str
    straight_bytes: int | None
    chunk_bytes: int
    """of a piece that crosses"""


def draw_rounds(homes: Sequence[str], num_rounds: int, *, seed: int | None = None) -> list[Round]:
    """Draw rounds of as many ranks as ``homes`` have. None: the same ones every time."""
    size = st.just(len(homes[0]))
    drawn: list[Round] = []
    options = {"max_examples": num_rounds, "deadline": None, "suppress_health_check": list(HealthCheck)}

    @settings(**options, database=None, derandomize=seed is None)
    @given(
        st.one_of(cases(ranks=size), programs(ranks=size)),
        st.sampled_from(homes),
        st.sampled_from(STRAIGHT_BYTES),
        st.sampled_from(CHUNK_BYTES),
    )
    def collect(what, homes, straight_bytes, chunk_bytes):
        drawn.append(Round(what=what, homes=homes, straight_bytes=straight_bytes, chunk_bytes=chunk_bytes))

    if seed is not None:
        from hypothesis import seed as seeded

        collect = seeded(seed)(collect)
    collect()
    return drawn


def play_rounds(num_ranks: int, engine: str, folder: Path, rounds: Sequence[Round], timeout_s: float) -> None:
    """Let one set of processes play all rounds. Raises RankFailed with the round that went wrong."""
    assert rounds, "nothing was drawn"
    done = run_processes(num_ranks, _play_all, engine, str(folder), list(rounds), timeout_s=timeout_s)
    assert done == [len(rounds)] * num_ranks


def _play_all(group, rank: int, engine: str, folder: str, rounds: list[Round]) -> int:
    """Play each round, bring all ranks' outcomes to rank 0 (by files: padded ones are large), and judge them there."""
    poison_arenas()
    for number, one in enumerate(rounds):
        os.environ["ANYEP_HOST_ID"] = f"played-{one.homes[rank]}"
        across.CHUNK_BYTES = one.chunk_bytes
        try:
            torch.save(_play(one, group, engine), Path(folder, f"{rank}.pt"))
            group.allgather(b"written")
            if rank == 0:
                paths = [Path(folder, f"{other}.pt") for other in range(len(one.homes))]
                _judge(one, [torch.load(path, weights_only=False) for path in paths])
        except BaseException as error:
            raise AssertionError(f"round {number} of {len(rounds)}, {one}") from error
        group.allgather(b"read")
    return len(rounds)


def _play(one: Round, group, engine: str):
    options = {"transport": engine, "straight_bytes": one.straight_bytes}
    if isinstance(one.what, Case):
        with open_buffer(one.what, group, **options) as ep:
            return play(one.what, ep)
    with open_buffer(one.what.base, group, max_in_flight=one.what.max_in_flight, **options) as ep:
        return Player(one.what, ep).play()


def _judge(one: Round, outcomes: list) -> None:
    hosts = map_hosts(one.homes)
    if isinstance(one.what, Case):
        check(one.what, outcomes, hosts)
    else:
        check_program(one.what, outcomes, hosts)
