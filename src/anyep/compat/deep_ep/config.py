"""``Config``: numbers that tune DeepEP's queues. There are none here, but programs make configs and ask for sizes."""

from __future__ import annotations

from anyep.compat.deep_ep.checks import host_assert

_HOST_RANKS = 8
_METADATA_BYTES = 8
"""Where a row comes from, and which ranks of its destination host it goes to."""
_MOST_TOPK = _MOST_SCALES = 128
"""For so many columns and scales a row a queue has room."""
_TOPK_IDX_BYTES = 8


def _aligned(number: int, unit: int) -> int:
    return -(-number // unit) * unit


class Config:
    """The queue lengths of a kernel that does not exist here; ``num_sms`` / 2 is the number of channels in handles.

    The size hints are DeepEP's own numbers, so that a program sizes its buffer as it always did; a Buffer echoes them
    and commits nothing for them. RuntimeError for numbers that DeepEP refuses.
    """

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        nvl_send, nvl_recv = num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens
        rdma_send, rdma_recv = num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens
        host_assert(num_sms >= 0, f"num_sms must be at least 0, got {num_sms}")
        host_assert(
            min(nvl_send, nvl_recv, rdma_send, rdma_recv) > 0,
            f"chunk sizes must be positive, got {(nvl_send, nvl_recv, rdma_send, rdma_recv)}",
        )
        host_assert(nvl_send < nvl_recv, f"NVLink chunks: send {nvl_send} must be less than receive {nvl_recv}")
        rdma_recv = _aligned(rdma_recv, rdma_send)
        host_assert(
            2 * rdma_send <= rdma_recv and rdma_send < rdma_recv,
            f"RDMA chunks: send {rdma_send} must be at most half of receive {rdma_recv} (rounded up to its multiple)",
        )
        self._num_sms = num_sms
        self._nvl_recv = nvl_recv
        self._rdma_recv = rdma_recv

    @property
    def _num_channels(self) -> int:
        return self._num_sms // 2

    def _token_bytes(self, hidden_bytes: int) -> int:
        return hidden_bytes + _METADATA_BYTES + _MOST_TOPK * (_TOPK_IDX_BYTES + 4) + 4 * _MOST_SCALES

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return the bytes that DeepEP's queues between the ranks of a host would take."""
        hosts = self._check_ranks(num_ranks)
        queue = 4 * (2 * hosts + 3) + self._nvl_recv * self._token_bytes(hidden_bytes)
        return _aligned(self._num_channels * min(num_ranks, _HOST_RANKS) * queue, 128)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return the bytes that DeepEP's queues between hosts would take; 0 on one host."""
        hosts = self._check_ranks(num_ranks)
        if num_ranks <= _HOST_RANKS:
            return 0
        queue = 4 * 2 * (2 * _HOST_RANKS + 2) + self._rdma_recv * 2 * (self._token_bytes(hidden_bytes) + 16)
        return _aligned(self._num_channels * hosts * queue, 128)

    def _check_ranks(self, num_ranks: int) -> int:
        host_assert(
            num_ranks < _HOST_RANKS or num_ranks % _HOST_RANKS == 0,
            f"DeepEP's sizes are known for less than {_HOST_RANKS} ranks and for multiples of it, got {num_ranks}",
        )
        host_assert(num_ranks <= _HOST_RANKS or self._num_sms % 2 == 0, f"num_sms must be even, got {self._num_sms}")
        return max(num_ranks // _HOST_RANKS, 1)


_DISPATCH = {
    2: (24, 256, 6),
    **dict.fromkeys((4, 8), (6, 256, 6)),
    16: (36, 288, 20),
    **dict.fromkeys((24, 32, 48, 64), (32, 288, 8)),
    96: (20, 480, 12),
    128: (20, 560, 12),
    144: (32, 720, 12),
    160: (28, 720, 12),
}
_COMBINE = {
    2: (10, 256, 6),
    4: (9, 256, 6),
    8: (4, 256, 6),
    16: (4, 288, 12),
    **dict.fromkeys((24, 32, 48, 64), (1, 288, 8)),
    96: (1, 480, 8),
    128: (1, 560, 8),
    **dict.fromkeys((144, 160), (2, 720, 8)),
}
"""(NVLink send, NVLink receive, RDMA send) by rank count; RDMA receive is 128."""


def recommended_config(num_ranks: int, num_sms: int, *, combine: bool) -> Config:
    """Return DeepEP's own choice. AssertionError for rank counts that it does not know."""
    table = _COMBINE if combine else _DISPATCH
    assert num_ranks in table, (
        f"Unsupported number of EP ranks: {num_ranks}; known are {sorted(table)}. "
        "Calls without a config take any number"
    )
    return Config(num_sms, *table[num_ranks], 128)
