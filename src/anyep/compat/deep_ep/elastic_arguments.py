"""What callers of dispatch and combine pass, checked: AssertionError and RuntimeError where upstream raises them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from anyep.compat.deep_ep.checks import check_device, host_assert
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.compat.deep_ep.events import EventHandle, EventOverlap

INDEX_DTYPES = (torch.int64, torch.int32)


def check_event(previous_event: object, allocate_on_comm_stream: bool) -> None:
    """Wait for an event that comes before a call; it needs allocation on the communication stream, as upstream."""
    if previous_event is None:
        return
    host_assert(allocate_on_comm_stream, "previous_event needs allocate_on_comm_stream=True: pass both, or neither")
    wait_for(previous_event)


def wait_for(event: object) -> None:
    """Wait for an EventHandle, or for the one in an EventOverlap; None is over."""
    inner = event.event if isinstance(event, EventOverlap) else event
    if isinstance(inner, EventHandle):
        inner.current_stream_wait()
    elif inner is not None:
        raise TypeError(f"an event must be an EventHandle, as capture() returns, got {type(inner).__name__}")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The options of a dispatch, with defaults and a handle's numbers filled in."""

    num_experts: int
    num_max_tokens: int
    alignment: int
    num_sms: int
    do_expand: bool
    exact: bool
    """whether the CPU learns the number of rows; else the batch is as large as it can be"""
    keep_copy: bool
    tma_scales: bool


class Asked(NamedTuple):
    """The options of a dispatch as its caller gave them."""

    num_experts: int | None
    num_max_tokens: int | None
    alignment: int | None
    num_sms: int
    num_qps: int
    do_cpu_sync: bool | None
    do_expand: bool
    do_zero_padding: bool
    keep_copy: bool
    tma_scales: bool


def agreed_terms(
    handle: EPHandle | None,
    topk_idx: torch.Tensor | None,
    asked: Asked,
    default_max_tokens: int,
    automatic_num_sms: Callable[[int, int], int],
) -> Terms:
    """Fill in what a dispatch leaves open, from its handle or the constructor; AssertionError where they differ."""
    num_experts, num_max_tokens, alignment, num_sms = asked[:4]
    if handle is not None:
        assert topk_idx is None, "topk_idx must be None when a handle is given: the handle has it"
        assert not asked.do_cpu_sync, (
            "the CPU need not wait with a handle, which knows the counts: leave do_cpu_sync out"
        )
        num_experts = _same("num_experts", num_experts, handle.num_experts)
        num_max_tokens = _same("num_max_tokens_per_rank", num_max_tokens, handle.num_max_tokens_per_rank)
        alignment = _same("expert_alignment", alignment, handle.expert_alignment)
        host_assert(asked.do_expand == handle.do_expand, f"do_expand must be {handle.do_expand}, as the handle's")
        num_sms = num_sms or handle.num_sms
    else:
        assert topk_idx is not None, "topk_idx must be given, or a handle that has it"
    assert num_experts is not None, "num_experts must be given where no handle has it"
    host_assert(num_experts > 0, f"num_experts must be positive, got {num_experts}")
    if topk_idx is not None:
        num_sms = num_sms or automatic_num_sms(num_experts, topk_idx.shape[-1])
    alignment = 1 if alignment is None else alignment
    host_assert(alignment > 0, f"expert_alignment must be positive, got {alignment}")
    return Terms(
        num_experts=num_experts,
        num_max_tokens=default_max_tokens if num_max_tokens is None else num_max_tokens,
        alignment=alignment,
        num_sms=num_sms,
        do_expand=asked.do_expand,
        exact=asked.do_cpu_sync is None or asked.do_cpu_sync,
        keep_copy=asked.keep_copy,
        tma_scales=asked.tma_scales,
    )


def _same(name: str, given: int | None, handles: int) -> int:
    assert given is None or given == handles, f"{name} must be the handle's, {handles}, got {given}: leave it out"
    return handles


def check_tokens(
    x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    routing_shape: tuple[int, int],
    topk_weights: torch.Tensor | None,
    terms: Terms,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return rows, scales and weights of a dispatch, contiguous but for the scales; RuntimeError as upstream's host."""
    data, scales = x if isinstance(x, tuple) else (x, None)
    check_device("x", data)
    _require(data.dim() == 2 and data.shape[1] > 0, "x must be [T, H] with at least one channel", data)
    num_tokens = data.shape[0]
    most = terms.num_max_tokens
    _require(num_tokens <= most, f"x must have at most num_max_tokens_per_rank={most} tokens", data)
    host_assert(
        num_tokens == routing_shape[0], f"topk_idx must be [T, K] with T={num_tokens}, got {list(routing_shape)}"
    )
    if scales is not None:
        check_device("the scales", scales)
        _require(
            scales.dim() == 2 and scales.shape[0] == num_tokens and scales.itemsize == 4 and scales.shape[1] > 0,
            f"scales must be [T, packs] of 4-byte numbers with T={num_tokens}",
            scales,
        )
        scales = scales.detach()
    if topk_weights is not None:
        check_device("topk_weights", topk_weights)
        _require(
            topk_weights.dtype == torch.float32 and topk_weights.shape == routing_shape,
            "topk_weights must be float32, and of topk_idx's shape",
            topk_weights,
        )
        topk_weights = topk_weights.detach().contiguous()
    return data.detach().contiguous(), scales, topk_weights


def check_routing(topk_idx: torch.Tensor) -> torch.Tensor:
    """Return ``topk_idx`` [T, K], contiguous; RuntimeError for others."""
    check_device("topk_idx", topk_idx)
    _require(topk_idx.dim() == 2 and topk_idx.shape[1] > 0, "topk_idx must be [T, K]", topk_idx)
    _require(topk_idx.dtype in INDEX_DTYPES, "topk_idx must be int64 (deep_ep.topk_idx_t) or int32", topk_idx)
    return topk_idx.contiguous()


def check_stats(stats: torch.Tensor | None, num_local_experts: int) -> None:
    """Check the counters that a dispatch adds to."""
    if stats is not None:
        _require(
            stats.dtype == torch.int32 and list(stats.shape) == [num_local_experts],
            f"cumulative_local_expert_recv_stats must be int32 [{num_local_experts}]",
            stats,
        )


def check_outputs(
    x: torch.Tensor, handle: EPHandle, topk_weights: torch.Tensor | None, *, several_sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check what experts return, a row for each row of the batch, and return it contiguous."""
    check_device("x", x)
    _require(x.dtype == torch.bfloat16 and x.dim() == 2 and x.shape[1] > 0, "x must be bfloat16 [rows, H]", x)
    rows = handle.num_rows
    _require(x.shape[0] == rows, f"x must have the {rows} rows that were received with this handle", x)
    if topk_weights is None:
        return x.detach().contiguous(), None
    check_device("topk_weights", topk_weights)
    host_assert(
        several_sums or not handle.do_expand,
        "topk_weights of an expanded batch need allow_multiple_reduction=True: leave them out",
    )
    shape = [rows] if handle.do_expand else [rows, handle.kind.num_topk]
    _require(
        topk_weights.dtype == torch.float32 and list(topk_weights.shape) == shape,
        f"topk_weights must be float32 {shape}",
        topk_weights,
    )
    return x.detach().contiguous(), topk_weights.detach().contiguous()


def unpack_bias(bias: object, num_tokens: int, hidden: int) -> tuple[torch.Tensor, ...]:
    """Return up to two biases, bfloat16 [T, H]."""
    if bias is None:
        return ()
    several = bias if isinstance(bias, tuple) else (bias,)
    assert not isinstance(bias, tuple) or len(bias) == 2, f"a tuple of biases must have 2 tensors, got {len(several)}"
    given = []
    for one in several:
        if one is None:
            continue
        assert isinstance(one, torch.Tensor), f"bias must be a tensor or two, got {type(one).__name__}"
        check_device("bias", one)
        _require(
            one.dtype == torch.bfloat16 and list(one.shape) == [num_tokens, hidden],
            f"bias must be bfloat16 [{num_tokens}, {hidden}]",
            one,
        )
        given.append(one.detach().contiguous())
    return tuple(given)


def _require(holds: bool, rule: str, tensor: torch.Tensor) -> None:
    """Raise RuntimeError with the rule and what came; texts of tensors are made where they are read."""
    if not holds:
        dtype = str(tensor.dtype).removeprefix("torch.")
        host_assert(False, f"{rule}, got {dtype} {list(tensor.shape)}")
