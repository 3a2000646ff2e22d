"""A process that counts what each call of a buffer launches on a device, in the interpreter.

Prints one JSON object: for each call the kernels, in order; and which forms of kernels no buffer of that size loads.
"""

from __future__ import annotations

import json
import warnings

import torch

import anyep
from anyep.kernels.gpu.kernels import GpuKernels
from anyep.kernels.gpu.target import SM_90
from anyep.kernels.gpu.variants import SMALL_SIZES, Sizes, call_every_variant
from anyep.testing.interpreter import interpreted_kernels
from anyep.testing.pretend_device import PretendDevice, pretended

SIZES = {"hidden": 256, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 6}


class Counting(PretendDevice):
    """Notes launches, and what is fetched."""

    def __init__(self):
        self.noted, self.forms, kernels = [], set(), interpreted_kernels()
        inner = kernels._launch_one

        def launch(kernel, grid, numbers, constants, threads):
            self.noted.append(kernel.__name__)
            self.forms.add(form(kernel, constants, threads))
            inner(kernel, grid, numbers, constants, threads)

        kernels._launch_one = launch
        super().__init__(kernels)

    def fetch(self, words):
        self.noted.append("fetch")
        return super().fetch(words)

    def of(self, act):
        self.noted.clear()
        result = act()
        return result, list(self.noted)


def form(kernel, constants, threads):
    return f"{kernel.__name__} {threads} {sorted(constants.items())}"


def loaded(sizes):
    """Return the forms that a buffer of these sizes loads when it is made."""
    forms = set()

    def note(kernel, grid, numbers, constants, threads):
        forms.add(form(kernel, constants, threads))

    for each in (SMALL_SIZES, sizes):
        call_every_variant(GpuKernels(torch.device("cpu"), SM_90, note), each)
    return forms


def large(member, device, told):
    """More columns and experts than 8, and more entries than are placed where bins are settled."""
    sizes = {"hidden": 128, "num_experts": 40, "num_topk": 32, "max_tokens_per_rank": 130}
    idx = torch.arange(32)[None, :] + torch.arange(130)[:, None] % 9
    x, weights = torch.ones(130, 128, dtype=torch.bfloat16), torch.ones(130, 32)
    device.forms.clear()
    with anyep.Buffer(member, **sizes, wire="fp8", static_rows=5000, device="cuda") as ep:
        _, told["expert, many entries"] = device.of(lambda: ep.dispatch(x, idx, weights, layout="expert"))
    with anyep.Buffer(member, **sizes | {"max_tokens_per_rank": 4}, wire="bf16", device="cuda") as ep:
        for layout in ("compact", "padded"):
            got = ep.dispatch(x[:4], idx[:4], weights[:4], layout=layout)
            ep.combine(torch.ones_like(got.x), got.handle, wire="logfmt10" if layout == "padded" else None)
    told["loaded later"] = sorted(device.forms - loaded(Sizes(num_topk=32, num_ranks=1, num_local=40)))


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
    large(member, device, told)


def main():
    warnings.simplefilter("ignore", RuntimeWarning)
    told = {}
    with pretended(Counting()) as device:
        anyep.local_group(1).run(lambda member: rank_main(member, device, told))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
