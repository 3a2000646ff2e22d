"""``import deep_ep_cpp``: the name of DeepEP's compiled module in older versions."""

from anyep.compat.deep_ep._C import (
    Config,
    EventHandle,
    get_low_latency_rdma_size_hint,
    is_sm90_compiled,
    topk_idx_t,
)

__all__ = ["Config", "EventHandle", "get_low_latency_rdma_size_hint", "is_sm90_compiled", "topk_idx_t"]
