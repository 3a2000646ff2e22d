"""What is to be measured, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace

PREFILL_TOKENS = 4096
DECODE_TOKENS = 128
HOST_TOKENS = (512, DECODE_TOKENS)
"""Between hosts; with 4 ranks a host the larger takes 0.36 s over 1 Gbit/s, there and back, and Megatron's way 2 s."""
TRACE = "trace"
"""The routing trace that ships with the package."""
PEERS = ("gloo", "mpich")
WIRE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}
"""Of one channel on its way."""
WIRES = tuple(WIRE_BYTES)
_LARGE_TOKENS = 1024
_TINY_TOKENS = 8
_LARGE_ROUNDS, _SMALL_ROUNDS = 11, 41
_TAIL_ROUNDS, _TINY_ROUNDS = 201, 401
"""Of small workloads by themselves: a 99th percentile needs them."""
_SMALL_IN_A_ROW, _TINY_IN_A_ROW = 8, 32
"""Calls, one behind the other, of a turn of small workloads."""
_TURNS_IN_A_ROW = 21


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
    padded: bool = False
    """whether the padded layout, and overlap with computation, are measured too"""

    @property
    def is_small(self) -> bool:
        """Whether latency matters: a decode step or less."""
        return self.tokens <= DECODE_TOKENS

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
    latency: tuple[Workload, ...] = ()
    """small workloads of which nothing but the time is asked, with nothing else in the caches"""
    sweep: tuple[Workload, ...] = ()
    """workloads in which the ways that rows can go meet"""

    @property
    def has_work(self) -> bool:
        return bool(self.workloads or self.latency or self.sweep)

    def sweep_rounds_of(self, workload: Workload) -> int:
        """Return the timed rounds of one size of the sweep: enough to see a tenth."""
        return self.rounds or max(_SMALL_ROUNDS, self.rounds_of(workload, alone=True))

    def rounds_of(self, workload: Workload, *, alone: bool = False) -> int:
        """Return the timed rounds of one contest; ``alone``: of our operations only, which are fast."""
        if self.rounds is not None:
            return self.rounds
        if alone and workload.is_small:
            return _TINY_ROUNDS if workload.tokens <= _TINY_TOKENS else _TAIL_ROUNDS
        return _LARGE_ROUNDS if workload.tokens >= _LARGE_TOKENS else _SMALL_ROUNDS

    def in_a_row_of(self, workload: Workload) -> int:
        """Return how many calls a turn of a small workload has where they follow each other; 0 for larger ones."""
        if not workload.is_small:
            return 0
        return _TINY_IN_A_ROW if workload.tokens <= _TINY_TOKENS else _SMALL_IN_A_ROW

    def turns_in_a_row_of(self, workload: Workload) -> int:
        """Return the timed rounds of such turns."""
        return 0 if not workload.is_small else self.rounds or _TURNS_IN_A_ROW


_NAMES = {PREFILL_TOKENS: "prefill", DECODE_TOKENS: "decode-size"}


def default_sizes() -> tuple[int, ...]:
    """Return the tokens of the workloads that are measured unless told otherwise."""
    return tuple(_NAMES)


def name_of(tokens: int) -> str:
    """Return the name of a workload of that many tokens."""
    return _NAMES.get(tokens, f"{tokens}-tokens")
