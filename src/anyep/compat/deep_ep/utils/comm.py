"""Which ranks share a host, under DeepEP's name."""

from anyep.compat.deep_ep.elastic_sizes import get_logical_domain_size, get_physical_domain_size

__all__ = ["get_logical_domain_size", "get_physical_domain_size"]
