"""What only a GPU can show of exchanges between hosts: real copies, streams and pinned memory. Skipped without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import anyep
from anyep.errors import Unavailable
from anyep.exchange.device import staged_setup
from anyep.exchange.device.devices import find_device
from anyep.layout.hosts import group_ranks
from tests.exchange.rounds import check, open_buffer
from tests.gpu.exchanged import WAYS, draw
from tests.gpu.test_on_gpu import play


@pytest.fixture(scope="module", autouse=True)
def gpu():
    try:
        find_device("cuda")
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("slot_bytes", [staged_setup.SLOT_BYTES, 1000], ids=["slots", "small slots"])
@pytest.mark.parametrize("seed", range(len(WAYS)))
def test_bits_are_the_oracles(monkeypatch, seed, slot_bytes):
    """Ranks are threads that share the GPU, two a host."""
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    monkeypatch.setattr(staged_setup, "SLOT_BYTES", slot_bytes)
    case = replace(draw(seed), hidden=[128, 1030, 7168][seed % 3], num_tokens=(40, 0, 33, 5, 17))

    def rank_main(member):
        with open_buffer(case, member, device="cuda") as ep:
            return play(case, ep, torch.cuda.Stream())

    check(case, anyep.local_group(5, timeout_s=600).run(rank_main), group_ranks(5, 2))


@pytest.mark.parametrize("per_host", ["1", "2"])
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_a_default_device_of_torch_changes_nothing(monkeypatch, wire, per_host):
    """Models are often made under ``torch.device("cuda")``: memory to be pinned is the host's then too."""
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", per_host)
    sizes = {"hidden": 256, "num_experts": 2, "num_topk": 2, "max_tokens_per_rank": 8}

    def rank_main(member):
        with torch.device("cuda"), anyep.Buffer(member, **sizes, wire=wire, device="cuda") as ep:
            received = ep.dispatch(torch.ones(8, 256).bfloat16(), torch.arange(16).view(8, 2) % 2)
            out = ep.combine(ep.empty_output(received.handle).fill_(1), received.handle)
            return sum(received.counts), out.cpu()

    for rows, out in anyep.local_group(2).run(rank_main):
        assert rows == 16
        assert (out == 2).all()


def test_copies_come_behind_the_callers_work_and_its_work_behind_them(monkeypatch):
    """x is written by work that takes a while, on a stream of the caller's; what came is used at once, on another."""
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "1")
    sizes = {"hidden": 1024, "num_experts": 2, "num_topk": 1, "max_tokens_per_rank": 512}

    def rank_main(member):
        with anyep.Buffer(member, **sizes, device="cuda", eager_bytes=0, straight_bytes=0) as ep:
            a, idx = torch.full((512, 512), 2.0**-9, device="cuda"), torch.full((512, 1), 1 - ep.rank, device="cuda")
            torch.cuda.synchronize()
            for _ in range(5):
                with torch.cuda.stream(torch.cuda.Stream()):
                    ones = torch.ones(512, 512, device="cuda")
                    for _ in range(50):
                        ones = ones @ a  # 512 times 2 ** -9
                    x = ones[:, :1].bfloat16().expand(512, 1024).contiguous()
                    pending = ep.dispatch(x, idx, wait=False)
                with torch.cuda.stream(torch.cuda.Stream()):
                    received = pending.wait()
                    out = ep.combine(received.x + 1, received.handle)
                    assert bool((out == 2).all())

    anyep.local_group(2, timeout_s=600).run(rank_main)
