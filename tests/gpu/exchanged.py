"""A process in which whole buffers run interpreted kernels on host memory: ``seed...``.

Prints one JSON object: for each seed what went wrong, "" for nothing.
"""

from __future__ import annotations

import json
import random
import sys
import traceback
import warnings

import torch

import anyep
from anyep.testing.interpreter import interpreted_kernels
from anyep.testing.pretend_device import PretendDevice, pretended
from tests.exchange.cases import LAYOUTS, WIRES, Case
from tests.exchange.rounds import check, open_buffer, play

WAYS = [(layout, wire) for layout in LAYOUTS for wire in WIRES]
SCALES = ("fp32", "pow2", "ue8m0")


def draw(seed):
    """A case of 1 to 4 ranks; seeds from 0 on go through all layouts and wires."""
    chance = random.Random(seed)
    layout, wire = WAYS[seed % len(WAYS)]
    return Case(
        num_tokens=tuple(chance.choice([0, 1, 3, 6]) for _ in range(chance.randint(1, 4))),
        hidden=chance.choice([1, 7, 128, 130]),
        num_topk=chance.choice([1, 2, 3, 9]),
        num_experts=chance.choice([1, 4, 5, 8]),
        wire=wire,
        scales=SCALES[seed // len(WAYS) % 3] if wire == "fp8" else "fp32",
        layout=layout,
        alignment=chance.choice([1, 4, 7]),
        idx_dtype=chance.choice([torch.int64, torch.int32]),
        with_weights=chance.random() < 0.7,
        num_bias=chance.randint(0, 2),
        reduce="rank" if layout == "compact" else chance.choice(["rank", "expert"]),
        skew=chance.choice([1.0, 3.0]),
        placement=None,
        spare_rows=chance.choice([None, 0, 5]),
        num_threads=1,
        seed=seed,
    )


def run(case):
    def rank_main(member):
        with open_buffer(case, member, device="cuda") as ep:
            return play(case, ep)

    check(case, anyep.local_group(case.num_ranks).run(rank_main))


def main(*seeds):
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's about Inf and NaN, which the kernels mean
    found = {}
    with pretended(PretendDevice(interpreted_kernels())):
        for seed in map(int, seeds):
            try:
                run(draw(seed))
                found[seed] = ""
            except Exception:
                found[seed] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
