"""What the DeepEP interface costs over AnyEP's own: the decode batch, both by turns in one process group.

128 tokens a rank of 7168 channels, top-8 of 256 experts. Each pair of calls is timed one after the other, in changing
order, so that what else the machine does meets both, and other work (a product of matrices, as experts have) comes
before each call, so that caches are as a program leaves them. Reported are medians of both, of their difference, and
*translation*: how much more of a compat call than of a native one passes outside native calls, with its quartiles (what
passes there of a native call is this program's own measuring). On a machine with fewer
cores than ranks only that one says much, for whole calls vary by more than it. Where there are cores enough every rank
keeps to one. Results are compared bit for bit first. ``python benchmarks/compat.py --ranks 1 2 8 --out FILE``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import anyep
from anyep.compat import deep_ep
from anyep.exchange.calls import Calls
from anyep.exchange.event import Pending
from anyep.exchange.wire import make_wire
from anyep.testing.processes import run_processes

TOKENS, HIDDEN, EXPERTS, TOPK = 128, 7168, 256, 8
Call = Callable[[], Any]


class Inside:
    """Adds up how long this process is inside native calls."""

    def __init__(self) -> None:
        self.total_ns = 0
        for owner, name in ((Calls, "dispatch"), (Calls, "combine"), (Pending, "wait")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Call) -> Call:
        def call(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter_ns()
            try:
                return method(*args, **options)
            finally:
                self.total_ns += time.perf_counter_ns() - begin

        return call


def timed_us(call: Call) -> float:
    begin = time.perf_counter_ns()
    result = call()
    end = time.perf_counter_ns()
    del result  # its memory goes back to the arena, whoever made it
    return (end - begin) / 1e3


def calls(group: Any, rank: int) -> tuple[dict[str, tuple[Call, Call]], Callable[[], None]]:
    """Return (native, compat) for each kind of call, verified, and what closes their buffers."""
    torch.manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    weights, idx = torch.rand(TOKENS, EXPERTS).topk(TOPK, dim=1)
    sizes = {"num_experts": EXPERTS, "num_topk": TOPK, "max_tokens_per_rank": TOKENS}
    native = anyep.Buffer(group, hidden=HIDDEN, wire="bf16", **sizes)
    fp8 = native.variant(wire=make_wire("fp8", "fp32", HIDDEN), num_topk=TOPK, max_tokens_per_rank=TOKENS)
    compat = deep_ep.Buffer(group, low_latency_mode=True, explicitly_destroy=True)
    per_rank, _, per_expert, inside, _ = compat.get_dispatch_layout(idx, EXPERTS)

    def compat_dispatch() -> Any:
        return compat.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=inside,
            num_tokens_per_expert=per_expert,
            topk_idx=idx,
            topk_weights=weights,
        )

    elastic = deep_ep.ElasticBuffer(
        group, num_max_tokens_per_rank=TOKENS, hidden=HIDDEN, num_topk=TOPK, explicitly_destroy=True
    )
    sent, received = native.dispatch(x, idx, weights), compat_dispatch()
    second = elastic.dispatch(x, idx, weights, num_experts=EXPERTS)
    blocks = fp8.dispatch(x, idx, weights, layout="padded")
    low = compat.low_latency_dispatch(x, idx, TOKENS, EXPERTS)
    y = torch.zeros(blocks.x.shape, dtype=torch.bfloat16)
    assert torch.equal(sent.x.view(torch.int16), received[0].view(torch.int16))
    assert torch.equal(native.combine(sent.x, sent.handle), compat.combine(received[0], received[4])[0])
    assert torch.equal(sent.x.view(torch.int16), second[0].view(torch.int16))
    for expert, count in enumerate(blocks.counts):
        assert torch.equal(blocks.x[expert, :count].view(torch.uint8), low[0][0][expert, :count].view(torch.uint8))

    def close() -> None:
        native.close()
        compat.destroy()
        elastic.destroy()

    return {
        "dispatch": (lambda: native.dispatch(x, idx, weights), compat_dispatch),
        "cached dispatch": (
            lambda: native.dispatch(x, handle=sent.handle),
            lambda: compat.dispatch(x, handle=received[4]),
        ),
        "combine": (
            lambda: native.combine(sent.x, sent.handle),
            lambda: compat.combine(received[0], received[4]),
        ),
        "low_latency_dispatch": (
            lambda: fp8.dispatch(x, idx, weights, layout="padded"),
            lambda: compat.low_latency_dispatch(x, idx, TOKENS, EXPERTS),
        ),
        "low_latency_combine": (
            lambda: fp8.combine(y, blocks.handle, topk_weights=weights),
            lambda: compat.low_latency_combine(y, idx, weights, low[2]),
        ),
        "V2 dispatch": (
            lambda: native.dispatch(x, idx, weights),
            lambda: elastic.dispatch(x, idx, weights, num_experts=EXPERTS),
        ),
        "V2 cached dispatch": (
            lambda: native.dispatch(x, handle=sent.handle),
            lambda: elastic.dispatch(x, handle=second[3]),
        ),
        "V2 combine": (
            lambda: native.combine(sent.x, sent.handle),
            lambda: elastic.combine(second[0], second[3]),
        ),
    }, close


def other_work() -> Call:
    """Return what a program does between two calls: 3 MB of weights and rows go through the caches."""
    rows, weights = torch.randn(64, 768), torch.randn(768, 768)
    return lambda: rows @ weights


class Pair(NamedTuple):
    """One round of both, in microseconds."""

    native: float
    compat: float
    translation: float


Times = dict[str, list[Pair]]


def rank_main(group: Any, rank: int, num_ranks: int, rounds: int) -> Times:
    """Time every pair, once a round."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if num_ranks <= len(cores):
        os.sched_setaffinity(0, {cores[rank]})
    pairs, close = calls(group, rank)
    work = other_work()
    inside = Inside()

    def timed(call: Call) -> tuple[float, float]:
        """Return how long a call takes, and how much of that outside native calls."""
        work()
        before = inside.total_ns
        took = timed_us(call)
        return took, took - (inside.total_ns - before) / 1e3

    times: Times = {name: [] for name in pairs}
    for number in range(rounds + 2):
        for name, (native, compat) in pairs.items():
            first, second = (native, compat) if number % 2 else (compat, native)
            found = {first: timed(first), second: timed(second)}
            (ours, own), (theirs, outside) = found[native], found[compat]
            if number >= 2:
                times[name].append(Pair(ours, theirs, outside - own))
    close()
    return times


def summarise(ranks: list[Times]) -> dict[str, dict[str, Any]]:
    """Return medians over ranks and rounds, and quartiles of the translation."""
    found: dict[str, dict[str, Any]] = {}
    for name in ranks[0]:
        rounds = [each for rank in ranks for each in rank[name]]
        values = {
            "native_us": [each.native for each in rounds],
            "compat_us": [each.compat for each in rounds],
            "difference_us": [each.compat - each.native for each in rounds],
            "translation_us": [each.translation for each in rounds],
        }
        quarters = [round(each, 1) for each in statistics.quantiles(values["translation_us"], n=4)]
        found[name] = {unit: round(statistics.median(each), 1) for unit, each in values.items()}
        found[name]["translation_quartiles_us"] = [quarters[0], quarters[-1]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = {
        "workload": {"tokens": TOKENS, "hidden": HIDDEN, "experts": EXPERTS, "topk": TOPK},
        "rounds": options.rounds,
        "cores": len(os.sched_getaffinity(0)),
        "note": options.note,
        "ranks": {
            str(ranks): summarise(run_processes(ranks, rank_main, ranks, options.rounds, timeout_s=300))
            for ranks in options.ranks
        },
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
