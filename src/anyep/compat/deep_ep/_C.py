# ruff: noqa: N999 - DeepEP's name
"""What programs take from DeepEP's compiled module, as far as it exists here."""

from anyep.compat.deep_ep.config import Config
from anyep.compat.deep_ep.events import EventHandle
from anyep.compat.deep_ep.indices import topk_idx_t
from anyep.compat.deep_ep.sizes import low_latency_size_hint

__all__ = ["Config", "EventHandle", "get_low_latency_rdma_size_hint", "is_sm90_compiled", "topk_idx_t"]


def is_sm90_compiled() -> bool:
    """Return False: no kernel here is compiled for a GPU."""
    return False


def get_low_latency_rdma_size_hint(
    num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
) -> int:
    """Return the bytes that DeepEP's low-latency mode would need."""
    return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_experts)
