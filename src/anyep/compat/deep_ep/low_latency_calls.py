"""V1's low-latency calls with DeepEP's signatures; :class:`Buffer` inherits them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from anyep.compat.deep_ep import low_latency, low_latency_sums
from anyep.compat.deep_ep.checks import check_torch_deterministic, is_deterministic, refuse
from anyep.compat.deep_ep.events import EventOverlap
from anyep.compat.deep_ep.low_latency_handles import LowLatencyHandle
from anyep.compat.deep_ep.masks import Masks
from anyep.compat.deep_ep.native import Natives
from anyep.compat.deep_ep.normal_batch import NormalContext
from anyep.compat.deep_ep.underway import ends_of

Tensors = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Hook = Callable[[], None]


class LowLatencyCalls:
    """A row for each (token, expert), in blocks of fixed size; masks of ranks that take no part."""

    low_latency_mode: bool
    _masks: Masks

    _context: NormalContext | None

    @abstractmethod
    def _no_context(self) -> NoReturn:
        """Raise RuntimeError: there are no buffers below."""

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Tensors, torch.Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Send a row for each (token, expert): (recv_x, recv_count [L], handle, event, hook).

        ``recv_x`` [L, R * Tmax, H], with FP8 a pair with its scales. With a hook nothing is valid until it was called.
        """
        self._check_low_latency(async_finish, return_recv_hook)
        statistics = None
        if cumulative_local_expert_recv_stats is not None or dispatch_wait_recv_cost_stats is not None:
            statistics = low_latency.Statistics(cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats)
        sizes = (num_max_dispatch_tokens_per_rank, num_experts)
        request = low_latency.new_request((x, topk_idx, *sizes, use_fp8, round_scale, use_ue8m0))
        natives, masks = (self._context or self._no_context()).natives, self._masks
        if masks.enabled:
            masks.add(natives.left_out())
        go_on = async_finish or return_recv_hook
        return low_latency.dispatch(natives, masks, request, statistics, go_on=go_on, wants_hook=return_recv_hook)

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook | None]:
        """Sum each token's rows times their weights, in top-k order: (combined_x [T, H], event, hook)."""
        self._check_low_latency(async_finish, return_recv_hook)
        if zero_copy and use_logfmt:
            refuse("zero_copy and use_logfmt exclude each other")
        given = low_latency_sums.new_sum(
            (x, topk_idx, topk_weights, use_logfmt, zero_copy, out, combine_wait_recv_cost_stats)
        )
        natives, go_on = (self._context or self._no_context()).natives, async_finish or return_recv_hook
        combined, underway = low_latency_sums.combine(natives, self._masks, handle, given, go_on=go_on)
        return combined, *ends_of(underway, wants_hook=return_recv_hook)

    def get_next_low_latency_combine_buffer(self, handle: object) -> torch.Tensor:
        """Return BF16 [L, R * Tmax, H], which ``low_latency_combine(zero_copy=True)`` reads where it lies."""
        return low_latency_sums.next_combine_buffer(self._natives(), handle)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Do nothing: normal and low-latency calls of any sizes do not disturb each other here."""

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mask a rank (or take it in again): from the next call on it is neither sent to nor waited for."""
        self._note_expelled()
        with self._masks.undone_if_refused():
            self._masks.update(rank_to_mask, mask)
            self._leave_out()

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 1 for masked ranks and those whose silence or end ended this buffer, 0 for others, int32 [R]."""
        self._note_expelled()
        self._masks.query(mask_status, self._natives().culprits())

    def low_latency_clean_mask_buffer(self) -> None:
        """Take in every rank."""
        with self._masks.undone_if_refused():
            self._masks.clean()
            self._leave_out()

    def _leave_out(self) -> None:
        try:
            self._natives().leave_out(self._masks.ranks)
        except ValueError as error:
            self._note_expelled()
            refuse(str(error))

    def _note_expelled(self) -> None:
        """Mask the ranks that did not come to a call, which then went on without them."""
        if self._masks.enabled:
            self._masks.add(self._natives().left_out())

    def _natives(self) -> Natives:
        return (self._context or self._no_context()).natives

    def _check_low_latency(self, async_finish: bool, return_recv_hook: bool) -> None:
        if is_deterministic():
            check_torch_deterministic()
        if not self.low_latency_mode:
            refuse("make the Buffer with low_latency_mode=True for low-latency calls")
        if async_finish and return_recv_hook:
            refuse("async_finish and return_recv_hook exclude each other")
