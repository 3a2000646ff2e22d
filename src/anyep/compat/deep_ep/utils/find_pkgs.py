"""Where the toolkit lies, under DeepEP's name."""

from anyep.compat.deep_ep.toolkit import check_nccl_so, find_cuda_home

__all__ = ["check_nccl_so", "find_cuda_home"]
