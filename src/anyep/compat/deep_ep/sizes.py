"""What DeepEP's low-latency mode would allocate: programs ask before they make a buffer of that size."""

from __future__ import annotations

_CHANNELS_PER_SCALE = 128
_ALIGNMENT = 128
_HEADER_BYTES = 16


def low_latency_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> int:
    """Return bytes: two halves of send and receive memory and flags, each for the larger of dispatch and combine.

    >>> low_latency_size_hint(128, 7168, 288) // 10_000  # in units of 10 kB
    214696
    """
    tokens, scales = num_max_dispatch_tokens_per_rank, 4 * hidden // _CHANNELS_PER_SCALE
    dispatched = _HEADER_BYTES + max(2 * hidden, hidden + scales)
    combined = 2 * hidden + scales
    send = max(tokens * dispatched, num_experts * tokens * combined)
    receive = num_experts * tokens * max(dispatched, combined)
    flags = -(-4 * num_experts // _ALIGNMENT) * _ALIGNMENT
    return (2 * (send + receive + flags) + _ALIGNMENT) // _ALIGNMENT * _ALIGNMENT
