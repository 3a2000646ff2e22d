# ruff: noqa: N999 - DeepEP's name
"""What programs take from DeepEP's compiled module, as far as it exists here."""

from typing import NoReturn

from anyep.compat.deep_ep.config import Config
from anyep.compat.deep_ep.elastic_sizes import BUFFER_ALIGNMENT, get_logical_domain_size, get_physical_domain_size
from anyep.compat.deep_ep.events import EventHandle
from anyep.compat.deep_ep.indices import topk_idx_t
from anyep.compat.deep_ep.sizes import low_latency_size_hint
from anyep.compat.deep_ep.toolkit import init_jit
from anyep.errors import Unavailable

__all__ = [
    "Config",
    "EventHandle",
    "create_nccl_comm",
    "destroy_nccl_comm",
    "get_elastic_buffer_alignment",
    "get_local_nccl_unique_id",
    "get_logical_domain_size",
    "get_low_latency_rdma_size_hint",
    "get_physical_domain_size",
    "init_jit",
    "is_sm90_compiled",
    "topk_idx_t",
]

_PYTHON_ONLY = ("Buffer", "ElasticBuffer", "calculate_elastic_buffer_size", "create_cpu_handle")


def __getattr__(name: str) -> NoReturn:
    if name in _PYTHON_ONLY:
        raise AttributeError(
            f"deep_ep._C.{name} belongs to DeepEP's C++ half, which there is not; use deep_ep's classes"
        )
    raise AttributeError(f"module 'deep_ep._C' has no attribute {name!r}")


def is_sm90_compiled() -> bool:
    """Return False: no part of this package is compiled ahead for a GPU."""
    return False


def get_low_latency_rdma_size_hint(
    num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
) -> int:
    """Return the bytes that DeepEP's low-latency mode would need."""
    return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_experts)


def get_elastic_buffer_alignment() -> int:
    """Return the unit of V2's buffer sizes: 2 MiB."""
    return BUFFER_ALIGNMENT


def get_local_nccl_unique_id(*arguments: object) -> NoReturn:
    """Raise Unavailable."""
    _no_nccl()


def create_nccl_comm(*arguments: object) -> NoReturn:
    """Raise Unavailable."""
    _no_nccl()


def destroy_nccl_comm(*arguments: object) -> NoReturn:
    """Raise Unavailable."""
    _no_nccl()


def _no_nccl() -> NoReturn:
    raise Unavailable("ranks talk through shared memory and network engines, not through NCCL: pass deep_ep a group")
