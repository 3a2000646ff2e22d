"""What is to be measured, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace

PREFILL_TOKENS = 4096
DECODE_TOKENS = 128
TRACE = "trace"
"""The routing trace that ships with the package."""
PEERS = ("gloo", "mpich")
WIRE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}
"""Of one channel on its way."""
WIRES = tuple(WIRE_BYTES)
_LARGE_TOKENS = 1024
_LARGE_ROUNDS, _SMALL_ROUNDS = 11, 41


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One exchange that every rank makes, again and again."""

    name: str
    tokens: int
    """of each rank"""
    hidden: int
    topk: int
    experts: int
    wire: str
    routing: str
    """``"balanced"``, ``"zipf"``, ``"trace"``, or the path of a trace file"""

    def with_tokens(self, tokens: int) -> Workload:
        return replace(self, tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole run of the benchmark; every rank gets the same one."""

    ranks: int
    workloads: tuple[Workload, ...]
    peers: tuple[str, ...]
    transport: str
    rounds: int | None
    """timed rounds of each contest; None: by the number of tokens"""
    timeout_s: float

    def rounds_of(self, workload: Workload) -> int:
        """Return the timed rounds of one contest."""
        if self.rounds is not None:
            return self.rounds
        return _LARGE_ROUNDS if workload.tokens >= _LARGE_TOKENS else _SMALL_ROUNDS


def default_sizes() -> tuple[tuple[str, int], ...]:
    """Return name and tokens of the workloads that are measured unless told otherwise."""
    return (("prefill", PREFILL_TOKENS), ("decode-size", DECODE_TOKENS))


def name_of(tokens: int) -> str:
    """Return the name of a workload of that many tokens."""
    return {size: name for name, size in default_sizes()}.get(tokens, f"{tokens}-tokens")
