"""A process in which DeepEP's interface runs interpreted kernels on host memory; prints tracebacks, "" for none."""

from __future__ import annotations

import json
import traceback
import warnings

import torch

import anyep
from anyep.compat import deep_ep
from anyep.compat.deep_ep import native
from anyep.testing.interpreter import interpreted_kernels
from anyep.testing.pretend_device import PretendDevice, pretended

RANKS, E, K, T, H = 2, 4, 2, 5, 128
WHERE = "cpu"
"""Where tensors are; ``test_on_gpu.py`` has them on a GPU."""


def inputs(rank):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(T, H, generator=generator).bfloat16()
    weights, idx = torch.rand(T, E, generator=generator).topk(K, dim=1)
    return x.to(WHERE), idx.to(WHERE), weights.to(WHERE)


def first_version(member):
    buffer = deep_ep.Buffer(member, low_latency_mode=True, explicitly_destroy=True)
    x, idx, weights = inputs(buffer.rank)
    per_rank, _, per_expert, inside, _ = buffer.get_dispatch_layout(idx, E)
    rows, got_idx, got_weights, counts, handle, _ = buffer.dispatch(
        (x.to(torch.float8_e4m3fn), torch.ones(T, 1, device=WHERE)),
        num_tokens_per_rank=per_rank,
        is_token_in_rank=inside,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=weights,
    )
    out, sent, _ = buffer.combine(rows[0].bfloat16(), handle, topk_weights=got_weights)
    blocks, count, low, _, hook = buffer.low_latency_dispatch(x, idx, T, E, use_fp8=False, return_recv_hook=True)
    hook()
    weighted, _, _ = buffer.low_latency_combine(torch.ones_like(blocks), idx, weights, low)
    buffer.destroy()
    return [one.cpu() for one in (*rows, got_idx, got_weights, torch.tensor(counts), out, sent, count, weighted)]


def second_version(member):
    buffer = deep_ep.ElasticBuffer(member, num_max_tokens_per_rank=T, hidden=H, num_topk=K, explicitly_destroy=True)
    x, idx, weights = inputs(buffer.rank_idx)
    rows, got_idx, got_weights, handle, _ = buffer.dispatch(x, idx, weights, num_experts=E)
    out, sent, _ = buffer.combine(rows, handle, topk_weights=got_weights, bias=x)
    scaled, *_ = buffer.dispatch(
        (x.to(torch.float8_e4m3fn), torch.ones(T, 3, device=WHERE)), handle=handle, topk_weights=weights
    )
    kept = [part.clone().cpu() for part in (rows, got_idx, got_weights, out, sent, *scaled)]
    buffer.destroy()
    return kept


def compare(act):
    """Raise unless results on the device have the bits of those on the host."""
    native.device_of = lambda rows: "cuda"
    on_device = anyep.local_group(RANKS).run(act)
    native.device_of = lambda rows: None
    assert_same(on_device, anyep.local_group(RANKS).run(act))


def assert_same(on_device, on_host):
    for ours, theirs in zip(on_device, on_host, strict=True):
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            same = one.shape == other.shape and torch.equal(
                one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
            )
            assert same, f"result {place} differs"


def main():
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's about Inf and NaN, which the kernels mean
    found = {}
    with pretended(PretendDevice(interpreted_kernels())):
        for name, act in (("V1", first_version), ("V2", second_version)):
            try:
                compare(act)
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
