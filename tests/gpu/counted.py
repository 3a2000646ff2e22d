"""A process that counts what each call of a buffer launches on a device, in the interpreter.

Prints one JSON object: for each call the kernels, in order.
"""

from __future__ import annotations

import json
import warnings

import torch

import anyep
from anyep.testing.interpreter import interpreted_kernels
from anyep.testing.pretend_device import PretendDevice, pretended

SIZES = {"hidden": 256, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 6}


class Counting(PretendDevice):
    """Notes launches, and what is fetched."""

    def __init__(self):
        self.noted, kernels = [], interpreted_kernels()
        inner = kernels._launch_one

        def launch(kernel, *arguments):
            self.noted.append(kernel.__name__)
            inner(kernel, *arguments)

        kernels._launch_one = launch
        super().__init__(kernels)

    def fetch(self, words):
        self.noted.append("fetch")
        return super().fetch(words)

    def of(self, act):
        self.noted.clear()
        result = act()
        return result, list(self.noted)


def rank_main(member, device, told):
    x, idx, weights = torch.ones(6, 256, dtype=torch.bfloat16), torch.tensor([[0, 5]] * 6), torch.ones(6, 2)
    with anyep.Buffer(member, **SIZES, wire="fp8", static_rows=16, expert_alignment=4, device="cuda") as ep:
        for layout in ("compact", "expert", "padded"):
            got, told[layout] = device.of(lambda layout=layout: ep.dispatch(x, idx, weights, layout=layout))
            _, told[f"{layout}, cached"] = device.of(lambda got=got: ep.dispatch(x, None, weights, handle=got.handle))
            y = torch.ones(got.x.shape, dtype=torch.bfloat16)
            _, told[f"{layout}, combine"] = device.of(lambda got=got, y=y: ep.combine(y, got.handle))
    with anyep.Buffer(member, **SIZES, wire="fp8", eager_bytes=0, device="cuda") as ep:
        got, told["padded, no slots"] = device.of(lambda: ep.dispatch(x, idx, weights, layout="padded"))
        again = device.of(lambda: ep.dispatch(x, None, weights, handle=got.handle))
        told["padded, no slots, cached"] = again[1]
    with anyep.Buffer(member, **SIZES, wire="bf16", device="cuda", concurrent=True) as ep:
        got, told["concurrent"] = device.of(lambda: ep.dispatch(x, idx, weights, layout="padded"))
        _, told["concurrent, combine"] = device.of(lambda: ep.combine(got.x, got.handle))


def main():
    warnings.simplefilter("ignore", RuntimeWarning)
    told = {}
    with pretended(Counting()) as device:
        anyep.local_group(1).run(lambda member: rank_main(member, device, told))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
