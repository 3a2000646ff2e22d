"""What callers ask a V2 buffer about its ranks and about the SMs and queue pairs that DeepEP would take."""

from __future__ import annotations

from anyep.compat.deep_ep.elastic_sizes import logical_domain, physical_domain
from anyep.compat.deep_ep.elastic_sms import Rates, theoretical_num_qps, theoretical_num_sms
from anyep.compat.deep_ep.events import EventHandle


class ElasticFacts:
    """Answers that exchange nothing. The heir sets these before the first question."""

    num_ranks: int
    allow_hybrid_mode: bool
    prefer_overlap_with_compute: bool
    num_allocated_qps: int
    _sms: dict[tuple[object, ...], int]

    def get_physical_domain_size(self) -> tuple[int, int]:
        """Return (hosts, ranks a host)."""
        hosts, per_host = physical_domain(self.num_ranks)
        return hosts, per_host

    def get_logical_domain_size(self) -> tuple[int, int]:
        """Return (scale-out ranks, scale-up ranks): the physical ones, or (1, R) without the hybrid mode."""
        scaleout, scaleup = logical_domain(self.num_ranks, self.allow_hybrid_mode)
        return scaleout, scaleup

    @staticmethod
    def capture() -> EventHandle:
        """Return an event that marks this moment."""
        return EventHandle()

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """Return how many SMs upstream's model would take (elastic_sms.py), for callers who ask."""
        assert num_scaleout_topk == 0, f"num_scaleout_topk must be 0: others are not defined, got {num_scaleout_topk}"
        key = (num_experts, num_topk, rdma_gbs, nvlink_gbs, sm_read_gbs, sm_write_gbs)
        known = self._sms.get(key)
        if known is None:
            known = self._sms[key] = theoretical_num_sms(
                logical_domain(self.num_ranks, self.allow_hybrid_mode),
                physical_domain(self.num_ranks),
                num_experts=num_experts,
                num_topk=num_topk,
                rates=Rates(rdma=rdma_gbs, nvlink=nvlink_gbs, sm_read=sm_read_gbs, sm_write=sm_write_gbs),
                overlap=self.prefer_overlap_with_compute,
            )
        return known

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Return how many queue pairs so many SMs would use, at most ``num_allocated_qps``."""
        return theoretical_num_qps(num_sms, hybrid=self.allow_hybrid_mode, allocated=self.num_allocated_qps)
