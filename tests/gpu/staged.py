"""A process in which a device's buffers between hosts of one rank run interpreted kernels on host memory: ``seed...``.

Prints one JSON object: for each seed what went wrong, "" for nothing. ANYEP_RANKS_PER_HOST must be 1.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from dataclasses import replace

import anyep
from anyep.layout.hosts import group_ranks
from anyep.testing.interpreter import interpreted_kernels
from anyep.testing.pretend_device import PretendDevice, pretended
from tests.exchange.rounds import check, open_buffer, play
from tests.gpu.exchanged import draw


def run(case):
    def rank_main(member):
        with open_buffer(case, member, device="cuda") as ep:
            assert ep.num_hosts == case.num_ranks
            return play(case, ep)

    check(case, anyep.local_group(case.num_ranks).run(rank_main), group_ranks(case.num_ranks, 1))


def main(*seeds):
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's about Inf and NaN, which the kernels mean
    found = {}
    with pretended(PretendDevice(interpreted_kernels())):
        for seed in map(int, seeds):
            try:
                run(replace(draw(seed), num_tokens=(6, 0, 5), hidden=(130, 7, 128)[seed % 3]))
                found[seed] = ""
            except Exception:
                found[seed] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
