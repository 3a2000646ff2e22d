"""Pipeline send and receive under DeepEP's names: neighbours in a ring (anyep.collectives.ring)."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from anyep.collectives.ring import Ring
from anyep.compat.deep_ep.elastic_refusals import VECTOR_BYTES, RefusedCall, refused_as_upstream, require
from anyep.compat.deep_ep.elastic_sizes import BUFFER_ALIGNMENT, align


class PipelineCalls:
    """The heir sets these before the first call, and closes what ``_pp`` is."""

    group: Any
    rank_idx: int
    num_bytes: int
    timeout_s: float

    _pp: Ring | None = None
    _pp_max_bytes = 0

    def pp_set_config(self, num_max_tensor_bytes: int, num_max_inflight_tensors: int) -> None:
        """Set the largest tensor and how many may be on their way in one direction; collective.

        What was sent before and not received is dropped.
        """
        wanted = self.get_pp_buffer_size_hint(num_max_tensor_bytes, num_max_inflight_tensors)
        require(num_max_tensor_bytes % VECTOR_BYTES == 0, f"num_max_tensor_bytes must be a multiple of {VECTOR_BYTES}")
        require(num_max_inflight_tensors > 0, "num_max_inflight_tensors must be at least 1")
        require(wanted <= self.num_bytes, f"this takes {wanted} bytes, and the buffer has {self.num_bytes}")
        ring = Ring(
            self.group, max_bytes=num_max_tensor_bytes, slots=num_max_inflight_tensors, timeout_s=self.timeout_s
        )
        weakref.finalize(self, ring.close)
        former, self._pp, self._pp_max_bytes = self._pp, ring, num_max_tensor_bytes
        if former is not None:  # every rank is here, so nobody needs it any more
            former.close()

    def pp_send(self, t: torch.Tensor, dst_rank_idx: int, num_sms: int = 0) -> None:
        """Send to rank +-1; waits while ``num_max_inflight_tensors`` are on their way. ``num_sms``: no meaning here."""
        ring = self._ring_for(t, dst_rank_idx)
        with refused_as_upstream():
            ring.send(_flat_bytes(t).cpu(), dst_rank_idx)

    def pp_recv(self, t: torch.Tensor, src_rank_idx: int, num_sms: int = 0) -> None:
        """Receive the next tensor of rank +-1 into ``t``, which has as many bytes. ``num_sms``: no meaning here."""
        ring, there = self._ring_for(t, src_rank_idx), _flat_bytes(t)
        with refused_as_upstream():
            got = ring.recv(src_rank_idx, out=there if there.is_cpu else torch.empty_like(there, device="cpu"))
        if got is not there:
            there.copy_(got)

    def _ring_for(self, t: torch.Tensor, peer: int) -> Ring:
        if self._pp is None:
            raise RefusedCall("Assertion exception: call pp_set_config on every rank first")
        neighbours = sorted({self._pp.previous, self._pp.next})
        require(
            peer in neighbours,
            f"rank {peer} is no neighbour of rank {self.rank_idx}: {' and '.join(map(str, neighbours))} are",
        )
        require(t.is_contiguous(), f"the tensor must be contiguous, got strides {t.stride()}")
        require(
            t.nbytes <= self._pp_max_bytes and t.nbytes % VECTOR_BYTES == 0,
            f"the tensor must have a multiple of {VECTOR_BYTES} bytes up to {self._pp_max_bytes}, got {t.nbytes}",
        )
        return self._pp

    @staticmethod
    def get_pp_buffer_size_hint(num_max_tensor_bytes: int, num_max_inflight_tensors: int) -> int:
        """Return the bytes of four queues (two directions, both ends), in whole 2 MiB."""
        queues = 4 * num_max_inflight_tensors * align(num_max_tensor_bytes, VECTOR_BYTES)
        return align(queues, BUFFER_ALIGNMENT)


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
