"""How many SMs and queue pairs DeepEP V2 would take, by a model of its traffic: numbers that callers ask for.

All volumes are those of one token that one rank receives. Legend: R ranks, S scale-up ranks, O scale-out ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from anyep.compat.deep_ep.elastic_sizes import Domain, align

DEVICE_SMS = 132
RDMA_GBS = 50.0
NVLINK_GBS = 450.0
"""Of an H100 with a 400 Gbit/s card: what is assumed where there is none to ask."""
_LEAST_SMS, _LEAST_ALONE = 4, 64
_RESERVE = 1.25
_DIRECT_QPS = 9
_QPS_PER_SM = 16
AUTO_QPS_HYBRID, AUTO_QPS_DIRECT = 129, 17


@dataclass(frozen=True, kw_only=True)
class Rates:
    """GB/s of a rank's links and of one SM; 0 for a link that is to be assumed."""

    rdma: float
    nvlink: float
    sm_read: float
    sm_write: float


@dataclass(frozen=True, kw_only=True)
class _Traffic:
    read: float
    write: float
    rdma: float
    nvlink: float


def theoretical_num_sms(
    logical: Domain, physical: Domain, *, num_experts: int, num_topk: int, rates: Rates, overlap: bool
) -> int:
    """Return the SMs that keep up with the link that is the bottleneck, and a quarter more; even."""
    traffic = _traffic(logical, physical, num_experts, num_topk)
    rdma_s = traffic.rdma / (rates.rdma or RDMA_GBS)
    nvlink_s = traffic.nvlink / (rates.nvlink or NVLINK_GBS)
    bound_s = rdma_s if logical.num_scaleout > 1 and rdma_s > nvlink_s else nvlink_s
    device = _device_sms()
    sms = max(traffic.read / rates.sm_read, traffic.write / rates.sm_write) / bound_s if bound_s > 0 else device
    count = align(max(_LEAST_SMS, math.ceil(_RESERVE * sms)), 2)
    return min(count if overlap else max(count, _LEAST_ALONE), device)


def theoretical_num_qps(num_sms: int, *, hybrid: bool, allocated: int) -> int:
    """Return how many queue pairs so many SMs would use."""
    return min(_QPS_PER_SM * num_sms + 1 if hybrid else min(num_sms, _DIRECT_QPS), allocated)


def _device_sms() -> int:
    if not torch.cuda.is_available():
        return DEVICE_SMS
    return int(torch.cuda.get_device_properties("cuda").multi_processor_count)


def expected_groups(num_experts: int, num_topk: int, num_groups: int) -> float:
    """Return how many of ``num_groups`` equal groups of experts own one of a token's top-k, if all are as likely."""
    assert num_experts % num_groups == 0, f"num_experts={num_experts} must be a multiple of {num_groups} ranks"
    topk = min(num_topk, num_experts)
    missed = math.comb(num_experts - num_experts // num_groups, topk) / math.comb(num_experts, topk)
    return num_groups * (1 - missed)


def _traffic(logical: Domain, physical: Domain, num_experts: int, num_topk: int) -> _Traffic:
    ranks = logical.num_scaleout * logical.num_scaleup
    copies = expected_groups(num_experts, num_topk, ranks)
    if logical.num_scaleout == 1:
        linked = physical.num_scaleup / ranks
        staged = 1 / copies if physical.num_scaleout > 1 else 0.0
        return _Traffic(
            read=1 / copies, write=staged + linked, rdma=1 - linked, nvlink=linked * (1 - 1 / physical.num_scaleup)
        )
    hosts = expected_groups(num_experts, num_topk, logical.num_scaleout)
    own = 1 / logical.num_scaleout
    return _Traffic(
        read=(1 + hosts) / copies,
        write=(1 + hosts * own) / copies + 1,
        rdma=hosts * (1 - own) / copies,
        nvlink=1 - 1 / logical.num_scaleup,
    )
