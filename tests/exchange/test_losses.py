"""A rank is killed or stopped before or within each kind of call: others name it and the step, nothing is left."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

import anyep
from anyep.testing.processes import RankProcesses
from tests.exchange.test_processes import named_memory

NUM_RANKS, VICTIM = 5, 3
SIZES = {"hidden": 256, "num_experts": 10, "num_topk": 4, "max_tokens_per_rank": 16}
WAYS = {"eager": 1 << 20, "never eager": 0}
CALLS = {
    "dispatch": ("dispatch", "compact"),
    "combine": ("combine", "compact"),
    "padded dispatch": ("dispatch", "padded"),
    "padded combine": ("combine", "padded"),
}
"""What the victim does not end, and the layout."""


def lose_a_rank(group, rank, folder, call, announced, timeout_s, eager_bytes, deadly):
    """Exchange, then lose rank 3; survivors return what they were told."""
    operation, layout = CALLS[call]
    x = torch.full((16, 256), float(rank + 1)).bfloat16()
    idx = (torch.arange(64).view(16, 4) * 3 + rank) % 10  # every rank sends to every rank
    with anyep.Buffer(group, timeout_s=timeout_s, eager_bytes=eager_bytes, **SIZES) as ep:
        received = ep.dispatch(x, idx, layout=layout)
        ep.combine(received.x, received.handle)
        received = ep.dispatch(x, idx, layout=layout)

        def begin():
            if operation == "dispatch":
                return ep.dispatch(x, idx, layout=layout, wait=False)
            return ep.combine(received.x, received.handle, wait=False)

        if rank == VICTIM:
            pending = begin() if announced else None
            os.kill(os.getpid(), deadly)
            return None if pending is None else pending.done()
        wait_for(Path(folder, "gone").exists)
        try:
            begin().wait()
            ep.barrier()
        except anyep.PeerError as error:
            Path(folder, f"told{rank}").touch()
            return type(error).__name__, error.ranks, error.step, str(error)
    return None


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "ranks did not come this far"
        time.sleep(0.01)


def state_of(pid):
    """Return the letter by which the kernel says what a process does; X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # between its end and its burial, reading finds nobody
        return "X"


def outcomes_of_a_loss(folder, call, announced, way, deadly):
    before = named_memory()
    timeout_s = 1.0 if deadly == signal.SIGSTOP else 30.0
    with RankProcesses(NUM_RANKS, lose_a_rank, str(folder), call, announced, timeout_s, WAYS[way], deadly) as ranks:
        pids = list(ranks.pids)
        wait_for(lambda: state_of(pids[VICTIM]) in "TXZ")
        (folder / "gone").touch()
        if deadly == signal.SIGSTOP:
            wait_for(lambda: len(list(folder.glob("told*"))) == NUM_RANKS - 1)
            os.kill(pids[VICTIM], signal.SIGCONT)
        outcomes = ranks.outcomes(timeout_s=60)
    assert named_memory() <= before
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    return outcomes


@pytest.mark.parametrize(
    ("deadly", "name"),
    [(signal.SIGKILL, "PeerLost"), (signal.SIGSTOP, "PeerTimeout")],
    ids=["killed", "stopped"],
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("announced", [False, True], ids=["before", "within"])
@pytest.mark.parametrize("call", CALLS)
def test_survivors_name_the_lost_rank_and_the_step(tmp_path, call, announced, way, deadly, name):
    """Within a call: its victim has announced it, and the others have not yet; eager rows came along."""
    outcomes = outcomes_of_a_loss(tmp_path, call, announced, way, deadly)
    step = "barrier 5" if announced and way == "eager" else f"{CALLS[call][0]} 4"
    for rank in set(range(NUM_RANKS)) - {VICTIM}:
        assert outcomes[rank].how == "returned", outcomes[rank].tell()
        found, culprits, found_step, text = outcomes[rank].value
        assert (found, culprits) == (name, (VICTIM,)), text
        assert found_step.startswith(step), text
