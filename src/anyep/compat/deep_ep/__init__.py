"""DeepEP's interface (V1 ``Buffer``, V2 ``ElasticBuffer``) on AnyEP: ``anyep compat-path`` puts it on a program's path.

Differences are listed in docs/compatibility.md. There is no ``HybridEPBuffer``, for which clients probe.
"""

from anyep.compat.deep_ep.buffer import Buffer
from anyep.compat.deep_ep.config import Config
from anyep.compat.deep_ep.elastic_buffer import ElasticBuffer
from anyep.compat.deep_ep.elastic_sizes import get_logical_domain_size, get_physical_domain_size
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.compat.deep_ep.events import EventHandle, EventOverlap
from anyep.compat.deep_ep.indices import topk_idx_t
from anyep.compat.deep_ep.toolkit import check_nccl_so, find_cuda_home, init_jit
from anyep.version import __version__

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "check_nccl_so",
    "find_cuda_home",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "init_jit",
    "topk_idx_t",
]
