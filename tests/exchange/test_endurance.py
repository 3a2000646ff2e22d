"""Long runs: no byte goes wrong, no memory is lost, and waiting costs nothing."""

from __future__ import annotations

import gc
import itertools
import time
from dataclasses import dataclass

import pytest
import torch

import anyep
from anyep.testing.processes import run_processes

TOKENS, HIDDEN, TOPK, EXPERTS = 4, 16, 2, 8
SIZES = {"hidden": HIDDEN, "num_experts": EXPERTS, "num_topk": TOPK, "max_tokens_per_rank": TOKENS}
WARM_ROUNDS = 5_000
WAYS = tuple(itertools.product(("padded", "compact", "padded", "expert"), (False, True)))
"""Layout, and whether both calls are split."""


def resident_bytes():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmRSS"))


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a way brings for x of ones times the rank: found in its first round, when the sums prove it."""

    rows: torch.Tensor
    defined: torch.Tensor


def defined_rows(received):
    """Return which rows of a batch somebody sent, bool, one dimension."""
    if received.topk_idx is not None:
        return (received.topk_idx >= 0).any(dim=1)
    places = torch.arange(received.x.shape[1])
    return (places < torch.tensor(received.counts)[:, None]).flatten()


def finished(result):
    return result.wait() if isinstance(result, anyep.Pending) else result


def decode(group, rank, num_rounds, eager_bytes):
    """Dispatch and combine, verify each round; return by how much resident memory grew since the warm-up."""
    spread = torch.arange(TOKENS * TOPK).view(TOKENS, TOPK)
    routings = [(spread * step + rank) % EXPERTS for step in (1, 3)]  # the experts of a token are distinct
    ones = torch.full((TOKENS, HIDDEN), float(rank + 1)).bfloat16()
    weights = torch.ones(TOKENS, TOPK)
    known, wrong, before = {}, [], 0
    with anyep.Buffer(group, eager_bytes=eager_bytes, **SIZES) as ep:
        for number in range(num_rounds):
            if number == min(WARM_ROUNDS, num_rounds // 2):
                gc.collect()
                before = resident_bytes()
            way = number % len(WAYS), number // len(WAYS) % len(routings)
            layout, split = WAYS[way[0]]
            idx, scale = routings[way[1]], float(number % 32 + 1)
            x = ones * scale
            received = finished(ep.dispatch(x, idx, weights, layout=layout, wait=not split))
            rows = received.x.view(-1, HIDDEN)
            if way not in known:
                defined = defined_rows(received)
                known[way] = Known(rows=rows[defined] / scale, defined=defined)
            if not torch.equal(rows[known[way].defined], known[way].rows * scale):
                wrong.append(number)
            out = finished(ep.combine(received.x, received.handle, wait=not split))
            copies = 2 if layout != "compact" else 1 + (idx[:, :1] // 2 != idx[:, 1:] // 2).to(x.dtype)
            if not torch.equal(out, x * copies):
                wrong.append(number)
        gc.collect()
        return resident_bytes() - before, wrong[:10]


def check_decode(num_rounds, eager_bytes, timeout_s):
    outcomes = run_processes(4, decode, num_rounds, eager_bytes, timeout_s=timeout_s)
    assert [wrong for _, wrong in outcomes] == [[]] * 4
    assert max(grown for grown, _ in outcomes) < 1 << 20


@pytest.mark.parametrize("eager_bytes", [None, pytest.param(0, marks=pytest.mark.slow)], ids=["measured", "never"])
def test_3000_rounds(eager_bytes):
    check_decode(3_000, eager_bytes, timeout_s=240.0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_100_000_rounds_lose_no_memory():
    check_decode(100_000, None, timeout_s=3500.0)


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_1_000_000_rounds_lose_no_memory():
    check_decode(1_000_000, None, timeout_s=35_000.0)


def wait_a_second(group, rank):
    """Return the processor seconds that rank 1 takes to wait a second, in each way of waiting."""
    x, idx = torch.ones(TOKENS, HIDDEN).bfloat16(), torch.arange(TOKENS * TOPK).view(TOKENS, TOPK) % EXPERTS
    burnt = []
    for eager_bytes, split in ((1 << 16, False), (1 << 16, True), (0, True)):
        with anyep.Buffer(group, eager_bytes=eager_bytes, **SIZES) as ep:
            for turn in range(2):
                if turn and rank == 0:
                    time.sleep(1.0)
                begin = time.process_time()
                finished(ep.dispatch(x, idx, wait=not split))
            burnt.append(time.process_time() - begin)
    return burnt


def test_a_rank_that_waits_a_second_burns_no_processor_time():
    """The least of three tries: other work on the machine makes every page and cache line dearer."""
    tries = [run_processes(2, wait_a_second)[1] for _ in range(3)]
    for way in zip(*tries, strict=True):
        assert min(way) < 0.010
