"""A child that a rank process forks: each of its calls is refused, and nothing that it does reaches other ranks."""

from __future__ import annotations

import os
import pickle
import select

import pytest
import torch

import anyep
from anyep.testing.processes import run_processes
from tests.engines import skip_without

_CHILD_S = 20.0


@pytest.fixture(params=["shm", "gloo", "nixl"])
def transport(request):
    return skip_without(request.param)


def refusals(calls):
    """Return what each call was told, by its name; "nothing" where it went on."""
    told = {}
    for name, call in calls.items():
        try:
            call()
            told[name] = "nothing"
        except anyep.ClosedError as error:
            told[name] = str(error)
    return told


def in_a_child(calls):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, pickle.dumps(refusals(calls)))
        finally:
            os._exit(0)
    os.close(writing)
    try:
        assert select.select([reading], [], [], _CHILD_S)[0], "the child waits for ever"
        text = os.read(reading, 1 << 16)
    finally:
        os.close(reading)
        os.kill(child, 9)
        os.waitpid(child, 0)
    return pickle.loads(text) if text else "the child crashed"


def fork_in_the_middle(group, rank, transport):
    if transport != "shm":
        os.environ["ANYEP_HOST_ID"] = f"host {rank}"
    sizes = {"hidden": 64, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": 8}
    x, idx = torch.ones(8, 64).bfloat16(), torch.tensor([[0, 3]] * 8)
    with anyep.Buffer(group, transport=transport, timeout_s=20.0, **sizes) as ep:
        received = ep.dispatch(x, idx)
        pending = [ep.dispatch(x, idx, layout=layout, wait=False) for layout in ("expert", "padded")]
        told = in_a_child(
            {
                "dispatch": lambda: ep.dispatch(x, idx),
                "combine": lambda: ep.combine(received.x, received.handle),
                "expert": pending[0].wait,
                "padded": pending[1].wait,
                "barrier": ep.barrier,
                "leave_out": lambda: ep.leave_out([1 - rank]),
                "empty_output": lambda: ep.empty_output(received.handle),
                "close": ep.close,
            }
        )
        out = [one.wait() for one in pending]
        sums = ep.combine(received.x, received.handle)
        return told, len(out), sums.unique().tolist()


def test_a_forked_child_is_refused_and_disturbs_nobody(transport):
    for told, num_waited, sums in run_processes(2, fork_in_the_middle, transport, timeout_s=60.0):
        assert told != "the child crashed"
        assert told.pop("close") == "nothing"
        for name, text in told.items():
            assert "this is a fork of it" in text, name
        assert num_waited == 2
        assert sums == [2.0]
