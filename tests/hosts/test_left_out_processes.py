"""Rank processes on played hosts that go on without one that was killed or stopped: exact, over real engines."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from anyep.layout.hosts import map_hosts
from anyep.testing.processes import RankProcesses
from tests.exchange.rounds import check, open_buffer, play, poison_arenas
from tests.exchange.test_behaviour import CASE
from tests.hosts.test_left_out import without
from tests.hosts.test_processes import wait_until

CASES = [
    replace(CASE, wire="fp8", num_bias=1, eager_bytes=0),
    replace(CASE, layout="expert", reduce="expert", alignment=4),
    replace(CASE, layout="padded", wire="fp8"),
]


def go_on(group, rank, engine, folder, homes, victim, action, straight_bytes, cases):
    """Exchange once all together, then without the victim, which ends by itself between two operations."""
    os.environ["ANYEP_HOST_ID"] = f"played-{homes[rank]}"
    poison_arenas()
    options = {"max_in_flight": 2, "transport": engine, "straight_bytes": straight_bytes, "timeout_s": 20.0}
    outcomes = []
    for number, case in enumerate(cases):
        with open_buffer(case, group, **options) as ep:
            play(case, ep)
            ep.barrier()
            if number == len(cases) - 1:
                Path(folder, f"came{rank}").touch()
                if rank == victim:
                    os.kill(os.getpid(), action)
                    return outcomes
                while not Path(folder, "gone").exists():
                    time.sleep(0.01)
            elif rank == victim:
                group.allgather(b"rested")
                continue
            ep.leave_out([victim])
            outcomes.append(play(without(case, {victim}, case.seed + 1), ep))
            ep.barrier()
            if number < len(cases) - 1:
                group.allgather(b"rested")
    Path(folder, f"done{rank}").touch()
    return outcomes


@pytest.mark.parametrize("action", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize(
    ("homes", "victim", "straight_bytes"),
    [("aabb", 0, 0), ("aabbb", 2, 1 << 20), ("aabbc", 4, 0)],
    ids=["a forwarder", "a rank with straight rows", "a whole host"],
)
def test_the_ranks_that_are_left_go_on_exactly(engine, tmp_path, homes, victim, straight_bytes, action):
    sizes = (17, 5, 40, 9, 3)[: len(homes)]
    chosen = [replace(case, num_tokens=sizes, max_tokens=40, spare_rows=None) for case in CASES]
    others = [rank for rank in range(len(homes)) if rank != victim]
    arguments = (engine, str(tmp_path), homes, victim, action, straight_bytes, chosen)
    with RankProcesses(len(homes), go_on, *arguments) as ranks:
        wait_until(lambda: all((tmp_path / f"came{rank}").exists() for rank in range(len(homes))))
        time.sleep(0.3)
        (tmp_path / "gone").touch()
        wait_until(lambda: all((tmp_path / f"done{rank}").exists() for rank in others))
        if action == signal.SIGSTOP:
            os.kill(ranks.pids[victim], signal.SIGKILL)
        outcomes = ranks.outcomes(timeout_s=60)
    assert all(outcomes[rank].how == "returned" for rank in others), [outcomes[rank].tell() for rank in others]
    for number, case in enumerate(chosen):
        results = [None if rank == victim else outcomes[rank].value[number] for rank in range(len(homes))]
        check(without(case, {victim}, case.seed + 1), results, map_hosts(homes))
