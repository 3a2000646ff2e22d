"""What a program has set in torch changes no result."""

from __future__ import annotations

import pytest
import torch

import anyep
from anyep.collectives import Gatherer, Ring, RowStore


def on_cpu(x):
    return torch.ones(x, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    "state", [lambda: torch.device("meta"), torch.inference_mode, torch.no_grad, torch.enable_grad]
)
def test_collectives_work_under(state):
    def rank_main(member):
        with (
            RowStore(member) as store,
            Ring(member, max_bytes=64) as ring,
            Gatherer(member, session_bytes=640) as gatherer,
            state(),
        ):
            store.write(on_cpu((2, 3)))
            fetched = store.fetch(torch.tensor([3, 0], device="cpu"))
            ring.send(on_cpu(3).requires_grad_(), to=ring.next)
            received = ring.recv(ring.previous)
            with gatherer.session() as session:
                slot = session.slot((3,), torch.float32)
                slot.fill_(1)
                gathered = session.all_gather(slot).clone()
        for x in (fetched, received, gathered):
            assert x.device.type == "cpu"
            assert not x.requires_grad
        return fetched.tolist(), received.tolist(), gathered.tolist()

    ones = [1.0] * 3
    assert anyep.local_group(2).run(rank_main) == [([ones, ones], ones, [ones, ones])] * 2
