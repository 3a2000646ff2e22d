"""V1's ``Buffer``: DeepEP's signatures, defaults and refusals; the work is that of :class:`anyep.Buffer`.

Legend: T tokens, H hidden, K top-k, E experts, L local experts, R ranks, N received rows.
"""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch

from anyep.compat.deep_ep import layout, normal, normal_sums
from anyep.compat.deep_ep.checks import (
    check_streams,
    check_torch_deterministic,
    host_assert,
    is_deterministic,
    refuse,
)
from anyep.compat.deep_ep.config import Config, recommended_config
from anyep.compat.deep_ep.domains import domain_of
from anyep.compat.deep_ep.events import EventHandle, EventOverlap, wait_for
from anyep.compat.deep_ep.low_latency_calls import LowLatencyCalls
from anyep.compat.deep_ep.masks import Masks
from anyep.compat.deep_ep.native import Natives
from anyep.compat.deep_ep.normal_batch import NormalContext, new_batch
from anyep.compat.deep_ep.sizes import low_latency_size_hint
from anyep.config import nvshmem_qp_depth
from anyep.errors import Unavailable
from anyep.transport.rendezvous import find_rendezvous

_SIZE_UNIT = 128

Tensors = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Buffer(LowLatencyCalls):
    """One rank's side of expert-parallel communication, with the interface that DeepEP had until version 2.5.

    ``num_nvl_bytes`` and ``num_rdma_bytes`` are echoed: memory is taken as batches need it (with a GPU for each process
    they are the memory that all map). One buffer serves the normal calls and, with ``low_latency_mode``, the others
    too. See docs/compatibility.md for what differs.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: object,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: object = None,
    ) -> None:
        """Make a buffer on a torch.distributed ``group`` (or what :class:`anyep.Buffer` takes), or an mpi4py ``comm``.

        Raises ValueError without either, RuntimeError for sizes that are no multiples of 128.
        """
        if group is None and comm is None:
            raise ValueError("Either 'group' or 'comm' must be provided.")
        rendezvous = find_rendezvous(group if group is not None else comm)
        for name, size in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
            host_assert(size >= 0 and size % _SIZE_UNIT == 0, f"{name} must be a multiple of {_SIZE_UNIT}, got {size}")
        self.rank = rendezvous.rank
        self.group_size = rendezvous.size
        self.group = group if group is not None else comm
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self.runtime: Natives | None = Natives(rendezvous, heap_bytes=num_nvl_bytes + num_rdma_bytes)
        domain = domain_of(self.group_size)
        if low_latency_mode or domain.crosses_hosts:
            self.nvshmem_qp_depth = nvshmem_qp_depth()
        self._context = normal.context_of(self.runtime, domain)
        self.runtime.expels = enable_shrink
        self._masks = Masks(self.group_size, self.rank, enabled=enable_shrink)
        self._local: dict[bool, torch.Tensor] = {}
        if not explicitly_destroy:
            weakref.finalize(self, self.runtime.close)

    def destroy(self) -> None:
        """Leave the group; the buffer cannot be used any more. AssertionError unless made with explicitly_destroy."""
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"
        runtime, self.runtime, self._context = self.runtime, None, None
        if runtime is not None:
            runtime.close()

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Return False: no part of this package is compiled ahead for a GPU."""
        return False

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set how many multiprocessors a config names (half of them is the number of channels in handles); even."""
        assert new_num_sms % 2 == 0, "The SM count must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """Return an event for everything that was called so far."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Return the bytes that DeepEP would need; pass them on as ``num_rdma_bytes``."""
        return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Return DeepEP's config for dispatch. AssertionError for rank counts that it does not know."""
        return recommended_config(num_ranks, Buffer.num_sms, combine=False)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Return DeepEP's config for combine. AssertionError for rank counts that it does not know."""
        return recommended_config(num_ranks, Buffer.num_sms, combine=True)

    def get_comm_stream(self) -> torch.cuda.Stream:
        """Return the current stream, behind which an exchange of CUDA tensors stands; Unavailable without CUDA."""
        if not torch.cuda.is_available():
            raise Unavailable("there is no communication stream without CUDA: rows are moved by the host, not on a GPU")
        return torch.cuda.current_stream()

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> torch.Tensor:
        """Return a tensor on memory of the size that was asked for, from byte ``offset`` on; nothing else uses it.

        One-dimensional, or the first elements of it in shape ``size``. The memory is taken on the first call.
        """
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        memory = self._local.get(use_rdma_buffer)
        if memory is None:
            memory = self._local[use_rdma_buffer] = torch.empty(num_bytes, dtype=torch.uint8, device=self._where())
        rest = memory[offset:]
        flat = rest[: rest.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        if size is None:
            return flat
        assert flat.numel() >= size.numel(), f"{size} does not fit {flat.numel()} elements of the buffer"
        return flat[: size.numel()].view(size)

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count tokens: int32 [R], int32 [hosts] or None, int32 [E], and bool [T, R] of who goes where."""
        _begin(previous_event, async_finish, allocate_on_comm_stream)
        context = self._context or self._no_context()
        count = layout.count_on_device if _is_on_gpu(topk_idx) else layout.count
        counted = count(topk_idx, num_experts, context.domain)
        context.natives.note_layout(topk_idx, counted)
        return (*counted, EventOverlap(EventHandle() if async_finish else None))

    def dispatch(
        self,
        x: Tensors,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        """Send tokens to ranks: (recv_x, recv_topk_idx, recv_topk_weights, counts of local experts, handle, event).

        Rows come in the order (source rank, source token). With a ``handle``: (recv_x, None, None, None, None, event).
        """
        if previous_event is not None or allocate_on_comm_stream or is_deterministic():
            _begin(previous_event, async_finish, allocate_on_comm_stream)
        context = self._context or self._no_context()
        if handle is not None:
            assert topk_idx is None, "a cached dispatch takes no topk_idx: its handle has it"
            assert topk_weights is None, "a cached dispatch takes no topk_weights"
            return normal.dispatch_again(context, x, handle, go_on=async_finish)
        num_sms = self.num_sms
        if config is not None:
            if not isinstance(config, Config):
                raise TypeError(f"config must be a deep_ep.Config, got {type(config).__name__}")
            num_sms = config._num_sms
        layout = (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank)
        batch = new_batch((topk_idx, topk_weights, *layout, num_worst_tokens, expert_alignment))
        return normal.dispatch(context, x, batch, num_sms, go_on=async_finish)

    def combine(
        self,
        x: torch.Tensor,
        handle: tuple[Any, ...],
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Sum each token's rows, unweighted: (combined_x [T, H], combined_topk_weights [T, K] or None, event)."""
        if previous_event is not None or allocate_on_comm_stream or is_deterministic():
            _begin(previous_event, async_finish, allocate_on_comm_stream)
        context = self._context or self._no_context()
        return normal_sums.combine(context, x, handle, topk_weights, bias, go_on=async_finish)

    internode_dispatch = dispatch
    internode_combine = combine

    def _where(self) -> str:
        return "cpu" if self.runtime is None or self.runtime.device is None else self.runtime.device

    _context: NormalContext | None = None

    def _no_context(self) -> NoReturn:
        refuse("this Buffer was destroyed, or its __init__ was replaced and not called")


def _is_on_gpu(tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.is_cuda


def _begin(
    previous_event: EventOverlap | EventHandle | None, async_finish: bool, allocate_on_comm_stream: bool
) -> None:
    """Check what does not depend on tensors, and let what the caller orders this call behind be over."""
    check_torch_deterministic()
    if allocate_on_comm_stream:
        check_streams(previous_event, async_finish, allocate_on_comm_stream)
    wait_for(previous_event)
