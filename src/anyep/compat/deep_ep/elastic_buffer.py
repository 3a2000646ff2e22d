"""DeepEP V2's buffer: dispatch and combine for any rows, over native buffers that are made as calls need them."""

from __future__ import annotations

import weakref
from typing import NoReturn

import torch

from anyep.compat.deep_ep import elastic_device, elastic_sizes
from anyep.compat.deep_ep.checks import check_torch_deterministic, host_assert, is_deterministic
from anyep.compat.deep_ep.elastic_arguments import Asked, agreed_terms, check_event, check_stats
from anyep.compat.deep_ep.elastic_checked import (
    are_plain,
    check_combine,
    check_dispatch,
    key_of_combine,
    key_of_dispatch,
)
from anyep.compat.deep_ep.elastic_collectives import ElasticCollectives
from anyep.compat.deep_ep.elastic_combine import Outputs, combine
from anyep.compat.deep_ep.elastic_context import ElasticContext, elastic_loops, kernels
from anyep.compat.deep_ep.elastic_dispatch import Dispatched, begin_again, begin_first, dispatch_again, dispatch_first
from anyep.compat.deep_ep.elastic_facts import ElasticFacts
from anyep.compat.deep_ep.elastic_landing import DispatchPlan, Tokens, new_tokens
from anyep.compat.deep_ep.elastic_sms import AUTO_QPS_DIRECT, AUTO_QPS_HYBRID
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.compat.deep_ep.events import EventHandle, EventOverlap, wait_for
from anyep.compat.deep_ep.native import Natives
from anyep.compat.deep_ep.notebook import Notebook
from anyep.errors import ClosedError, Unavailable
from anyep.transport.rendezvous import find_rendezvous

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class ElasticBuffer(ElasticFacts, ElasticCollectives):
    """One rank's side of a group. Making it is collective; so is every dispatch, combine and barrier.

    ``num_bytes`` is echoed, not committed: memory is taken as batches need it. What concerns a GPU's links and
    processors is accepted and changes nothing. Signatures, defaults and results are DeepEP 2.1's; docs/compatibility.md
    lists the differences.
    """

    get_buffer_size_hint = staticmethod(elastic_sizes.get_buffer_size_hint)

    def __init__(
        self,
        group: object,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        self.group = group
        rendezvous = find_rendezvous(group)
        self.rank_idx, self.num_ranks = rendezvous.rank, rendezvous.size
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.deterministic = deterministic
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.explicitly_destroy = explicitly_destroy
        automatic_qps = AUTO_QPS_HYBRID if allow_hybrid_mode else AUTO_QPS_DIRECT
        self.num_allocated_qps = num_allocated_qps or automatic_qps
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()
        self.scaleout_rank_idx, self.scaleup_rank_idx = divmod(self.rank_idx, self.num_scaleup_ranks)
        if num_bytes is None:
            assert min(num_max_tokens_per_rank, hidden) > 0, "give num_bytes, or num_max_tokens_per_rank and hidden"
            num_bytes = self.get_buffer_size_hint(
                group,
                num_max_tokens_per_rank,
                hidden,
                num_topk,
                use_fp8_dispatch,
                allow_hybrid_mode,
                allow_multiple_reduction,
            )
        elastic_sizes.check_sizes(num_bytes, num_cpu_bytes)
        self.num_bytes = num_bytes
        self.num_cpu_bytes = num_cpu_bytes
        self.timeout_s = float(num_cpu_timeout_secs)
        self.runtime: Natives | None = Natives(group, timeout_s=self.timeout_s, heap_bytes=num_bytes)
        self._context: ElasticContext | None = self._make_context(self.runtime)
        self._end = weakref.finalize(self, self.runtime.close)
        self._sms: dict[tuple[object, ...], int] = {}
        rendezvous.allgather(b"")  # all ranks have made theirs when a constructor returns, as upstream

    def _make_context(self, natives: Natives) -> ElasticContext:
        return ElasticContext(
            natives=natives,
            number=self.rank_idx,
            num_ranks=self.num_ranks,
            num_scaleup=self.num_scaleup_ranks,
            keeps_order=self.deterministic or self.num_scaleup_ranks == self.num_ranks,
            several_sums=self.allow_multiple_reduction,
            kernels=kernels(),
            loops=elastic_loops(),
            notebook=Notebook(),
        )

    def destroy(self) -> None:
        """Release everything, when all ranks are here. Idempotent; AssertionError without ``explicitly_destroy``."""
        assert self.explicitly_destroy, (
            "this buffer ends by itself: make it with explicitly_destroy=True to call destroy()"
        )
        if self.runtime is not None:
            self.barrier()
            self.close_collectives()
            self._end()
            self.runtime = self._context = None

    def get_comm_stream(self) -> torch.cuda.Stream:
        """Return the stream on which the exchange works, the current one; Unavailable without CUDA."""
        if not torch.cuda.is_available():
            raise Unavailable("there is no communication stream without CUDA: rows are moved by the host, not on a GPU")
        return torch.cuda.current_stream()

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Wait until every rank is here."""
        (self._context or self._no_context()).natives.barrier(self.num_ranks)

    def dispatch(
        self,
        x: Rows,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Rows, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]:
        """Send each token to the ranks that own its experts.

        ``x`` [T, H] of any dtype, or a pair with scales [T, G] of a 4-byte dtype and any strides; ``topk_idx`` int64
        [T, K], -1 for none; ``topk_weights`` fp32 [T, K]. ``handle``: the places of an earlier dispatch again.

        Returns (rows or pair, topk_idx [N, K] of local experts or None, weights, handle, event): weights are
        [N, K] as they were given, also in columns of other ranks, or [rows] of an expanded batch. Padding, and the
        tail of a batch that did not wait for the CPU, is 0, and -1 in topk_idx.
        """
        if previous_event is not None or previous_event_before_epilogue is not None or is_deterministic():
            _begin(previous_event, previous_event_before_epilogue, allocate_on_comm_stream)
        context = self._context or self._no_context()
        options = (
            *(num_experts, num_max_tokens_per_rank, expert_alignment, num_sms, num_qps, do_cpu_sync, do_expand),
            *(do_zero_padding, do_handle_copy, use_tma_aligned_col_major_sf),
        )
        stats = cumulative_local_expert_recv_stats
        key: tuple[object, ...] | None
        if type(x) is torch.Tensor and topk_idx is not None and handle is None and stats is None:
            # what the native call refuses of topk_idx and topk_weights is checked in full below
            key = (x.shape, x.dtype, topk_weights is None, options)
        else:
            key = key_of_dispatch(x, topk_idx, topk_weights, stats, handle, options)
        plan = context.natives.checked.get(key)
        if plan is None:
            plan, tokens = self._check(context, x, topk_idx, topk_weights, stats, handle, Asked(*options))
            context.natives.remember(key, plan)
        else:
            rows, scales = x if isinstance(x, tuple) else (x, None)
            tokens = new_tokens((rows, scales, topk_idx, topk_weights))
        try:
            if handle is None and not async_with_compute_stream and context.natives.device is None:
                batch = dispatch_first(context, plan, tokens)
            else:
                batch = _sent(context, plan, tokens, handle, go_on=async_with_compute_stream)
        except (TypeError, ValueError):
            tried, given = plan, tokens
            plan, tokens = self._check(context, x, topk_idx, topk_weights, stats, handle, Asked(*options))
            if plan == tried and are_plain(*given):
                raise
            context.natives.remember(key, plan)
            batch = _sent(context, plan, tokens, handle, go_on=async_with_compute_stream)
        if stats is not None:
            stats += batch[3].num_unaligned_recv_tokens_per_expert
        return batch

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring the experts' outputs back and sum them, without weights (elastic_combine.py has the order).

        ``x`` bfloat16 [rows, H], a row for each that was received; ``topk_weights`` fp32 [rows, K], or [rows] of an
        expanded batch; ``bias``: one or two bfloat16 [T, H]. Returns (bfloat16 [T, H], fp32 [T, K] or None, event).
        """
        if previous_event is not None or previous_event_before_epilogue is not None or is_deterministic():
            _begin(previous_event, previous_event_before_epilogue, allocate_on_comm_stream)
        context = self._context or self._no_context()
        host_assert(isinstance(handle, EPHandle), f"handle must be an EPHandle, got {type(handle).__name__}")
        key = key_of_combine(x, topk_weights, bias, handle, num_sms, num_qps)
        ep = context.natives.checked.get(key)
        if ep is None:
            self._check_qps(num_qps, num_sms or handle.num_sms)
            ep, outputs = check_combine(context, x, handle, topk_weights, bias)
            context.natives.remember(key, ep)
        else:
            outputs = Outputs(x, topk_weights, ())
        add = combine if context.natives.device is None else elastic_device.combine
        try:
            sums = add(context, ep, outputs, handle, go_on=async_with_compute_stream)
        except (TypeError, ValueError):
            if are_plain(x, topk_weights):
                raise
            ep, outputs = check_combine(context, x, handle, topk_weights, bias)
            sums = add(context, ep, outputs, handle, go_on=async_with_compute_stream)
        return sums

    def _check(
        self,
        context: ElasticContext,
        x: Rows,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        stats: torch.Tensor | None,
        handle: EPHandle | None,
        asked: Asked,
    ) -> tuple[DispatchPlan, Tokens]:
        """Check a dispatch in full. AssertionError and RuntimeError where upstream raises them."""
        terms = agreed_terms(handle, topk_idx, asked, self.num_max_tokens_per_rank, self.get_theoretical_num_sms)
        self._check_qps(asked.num_qps, terms.num_sms)
        host_assert(
            asked.do_expand or not asked.do_zero_padding, "do_zero_padding needs do_expand=True: pass both, or neither"
        )
        host_assert(stats is None or handle is None, "statistics are counted by a dispatch without a handle only")
        check_stats(stats, terms.num_experts // self.num_ranks)
        return check_dispatch(context, x, topk_idx, topk_weights, handle, terms)

    def _no_context(self) -> NoReturn:
        raise ClosedError("this buffer was destroyed; make a new one")

    def _check_qps(self, num_qps: int, num_sms: int) -> None:
        wanted = num_qps or self.get_theoretical_num_qps(num_sms)
        assert wanted <= self.num_allocated_qps, (
            f"num_qps={wanted} is more than the {self.num_allocated_qps} that were allocated: "
            "pass a larger num_allocated_qps to the constructor"
        )


def _sent(
    context: ElasticContext, plan: DispatchPlan, tokens: Tokens, handle: EPHandle | None, *, go_on: bool
) -> Dispatched:
    """Send tokens in one of the ways there are; ``go_on``: return before that is over."""
    if context.natives.device is not None:
        if handle is None:
            return elastic_device.dispatch_first(context, plan, tokens, go_on=go_on)
        return elastic_device.dispatch_again(context, plan, tokens, handle, go_on=go_on)
    if handle is None:
        return (begin_first if go_on else dispatch_first)(context, plan, tokens)
    return (begin_again if go_on else dispatch_again)(context, plan, tokens, handle)


def _begin(previous_event: object, previous_event_before_epilogue: object, allocate_on_comm_stream: bool) -> None:
    """Check torch's state, and wait for what comes before a call."""
    check_torch_deterministic()
    check_event(previous_event, allocate_on_comm_stream)
    wait_for(previous_event_before_epilogue)
