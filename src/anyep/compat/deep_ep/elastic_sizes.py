"""Sizes that DeepEP V2 tells its callers, by its formulas. They are echoed here, and not committed.

Legend: R ranks, S scale-up ranks (of a host), O scale-out ranks (hosts), K top-k, Tmax tokens of a rank at most.
"""

from __future__ import annotations

from typing import NamedTuple

from anyep import config
from anyep.compat.deep_ep.checks import host_assert
from anyep.transport.rendezvous import find_rendezvous

BUFFER_ALIGNMENT = 2 << 20
_ROW_ALIGNMENT = 32
_SCALE_CHANNELS = 32
"""Upstream makes room for scales of so many channels, the finest that it supports."""
_MOST_TOPK = 32
_SPARE_TOKENS = 1280
"""For what its channels hold on their way between hosts."""


class Domain(NamedTuple):
    """How ranks lie on hosts: rank = scale-out rank * num_scaleup + scale-up rank."""

    num_scaleout: int
    num_scaleup: int


def align(value: int, to: int) -> int:
    """Return the first multiple of ``to`` from ``value`` on."""
    return -(-value // to) * to


def physical_domain(num_ranks: int) -> Domain:
    """Return hosts and ranks a host; ``ANYEP_RANKS_PER_HOST`` divides the ranks of this one among hosts."""
    per_host = config.ranks_per_host()
    if per_host is None or per_host >= num_ranks:
        return Domain(1, num_ranks)
    host_assert(
        num_ranks % per_host == 0,
        f"ANYEP_RANKS_PER_HOST={per_host} must divide the number of ranks, which is {num_ranks}",
    )
    return Domain(num_ranks // per_host, per_host)


def logical_domain(num_ranks: int, allow_hybrid_mode: bool) -> Domain:
    """Return the hosts between which a token crosses once; all ranks are alike without the hybrid mode."""
    return physical_domain(num_ranks) if allow_hybrid_mode else Domain(1, num_ranks)


def get_physical_domain_size(group: object) -> tuple[int, int]:
    """Return (hosts, ranks a host)."""
    hosts, per_host = physical_domain(find_rendezvous(group).size)
    return hosts, per_host


def get_logical_domain_size(group: object, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """Return (scale-out ranks, scale-up ranks): the physical ones, or (1, R) without the hybrid mode."""
    scaleout, scaleup = logical_domain(find_rendezvous(group).size, allow_hybrid_mode)
    return scaleout, scaleup


def get_buffer_size_hint(
    group: object,
    num_max_tokens_per_rank: int,
    hidden: int,
    num_topk: int = 0,
    use_fp8_dispatch: bool = False,
    allow_hybrid_mode: bool = True,
    allow_multiple_reduction: bool = True,
) -> int:
    """Return the bytes upstream's buffer would take, for either direction, in whole 2 MiB."""
    num_ranks = find_rendezvous(group).size
    physical, logical = physical_domain(num_ranks), logical_domain(num_ranks, allow_hybrid_mode)
    topk = num_topk or _MOST_TOPK
    sent, returned = _row_bytes(hidden, topk, use_fp8_dispatch)
    if logical.num_scaleout > 1:
        out_rows, back_rows = _hybrid_rows(logical, num_max_tokens_per_rank, topk, allow_multiple_reduction)
    else:
        all_linked = physical.num_scaleout == 1
        out_rows, back_rows = _direct_rows(
            num_ranks, num_max_tokens_per_rank, topk, allow_multiple_reduction, all_linked
        )
    return align(max(out_rows * sent, back_rows * returned), BUFFER_ALIGNMENT)


def _row_bytes(hidden: int, topk: int, fp8: bool) -> tuple[int, int]:
    """Bytes of a row that is dispatched (with scales, indices and weights), and of one that comes back."""
    scales = 4 * -(-hidden // _SCALE_CHANNELS) if fp8 else 0
    x = hidden if fp8 else 2 * hidden
    routing = 8 * topk + 4 * (1 + topk)
    sent = sum(align(part, _ROW_ALIGNMENT) for part in (x, scales, routing))
    return sent, align(2 * hidden, _ROW_ALIGNMENT) + align(8 * topk, _ROW_ALIGNMENT)


def _direct_rows(num_ranks: int, tokens: int, topk: int, multi: bool, all_linked: bool) -> tuple[int, int]:
    out = (num_ranks if all_linked else num_ranks + 1) * tokens
    staged = 0 if all_linked else num_ranks * tokens * (1 if multi else topk)
    return out, staged + (min(num_ranks, topk) if multi else topk) * tokens


def _hybrid_rows(domain: Domain, tokens: int, topk: int, multi: bool) -> tuple[int, int]:
    hosts, per_host = domain
    between = hosts * (tokens + _SPARE_TOKENS)
    inside = (min(per_host, topk) if multi else topk) * hosts * tokens
    back = inside + (min(hosts, topk) if multi else topk) * tokens + between
    return per_host * hosts * tokens + tokens + between, back


def check_sizes(num_bytes: int, num_cpu_bytes: int) -> None:
    """Raise DeepEP's error for bytes of a buffer, and of its CPU part, that a caller cannot mean."""
    text = f"in whole {BUFFER_ALIGNMENT} bytes"
    host_assert(
        num_bytes > 0 and num_bytes % BUFFER_ALIGNMENT == 0, f"num_bytes must be positive and {text}, got {num_bytes}"
    )
    host_assert(
        num_cpu_bytes % BUFFER_ALIGNMENT == 0 and 0 <= num_cpu_bytes <= num_bytes,
        f"num_cpu_bytes must be at most num_bytes and {text}, got {num_cpu_bytes}",
    )
