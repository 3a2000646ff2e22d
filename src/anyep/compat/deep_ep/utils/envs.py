"""What programs ask of their surroundings, under DeepEP's name."""

from anyep.compat.deep_ep.checks import check_torch_deterministic
from anyep.compat.deep_ep.elastic_sizes import get_logical_domain_size, get_physical_domain_size

__all__ = ["check_torch_deterministic", "get_logical_domain_size", "get_physical_domain_size"]
