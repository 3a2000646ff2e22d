"""What ``anyep bench`` was asked for: options that belong together, what the user left open, and the plans for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import click

from anyep.cli.bench.plan import DECODE_TOKENS, HOST_TOKENS, Plan, Workload, default_sizes, name_of

ONE_HOST = ("shm", "inprocess")
HOSTS_TRANSPORTS = ("auto", "nixl", "gloo")
DRAWN = ("balanced", "zipf")
_DEFAULT_RANKS, _DEFAULT_TOPK, _DEFAULT_EXPERTS = 8, 8, 256


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options, by their names; None where the user left one open."""

    ranks: int | None
    tokens: tuple[int, ...]
    hidden: int
    topk: int | None
    experts: int | None
    wire: tuple[str, ...]
    routing: str
    compare: tuple[str, ...]
    latency: tuple[tuple[int, int], ...]
    """ranks and tokens"""
    sweep: tuple[int, ...]
    hosts: tuple[int, ...]
    rounds: int | None
    transport: str | None
    timeout: float
    draws: bool
    """whether a picture was asked for"""
    has_links: bool
    """whether links were given"""
    job: int | None = None
    """ranks of the job that this runs in"""

    @property
    def in_job(self) -> bool:
        """Whether this process is a rank, and starts none."""
        return self.job is not None and self.transport != "inprocess"

    def checked(self, job: int | None) -> Asked:
        """Return the same with hosts' ranks, transport, top-k and experts filled in. UsageError where options clash."""
        asked = replace(self, job=job)
        asked = replace(asked, transport=asked._check_transport())
        if asked.hosts:
            asked = asked._with_hosts()
        topk, experts = asked._check_routing()
        asked = replace(asked, topk=topk, experts=experts)
        asked._check_comparisons(experts)
        if asked.latency and asked.in_job:
            raise click.UsageError("--latency starts ranks of its own; leave it out inside a job")
        if asked.draws and (not asked.sweep or len(asked.wire) > 1):
            raise click.UsageError("--picture draws a --sweep of one --wire")
        return asked

    def plan(self) -> Plan:
        """Return the plan but for the latencies, which have ranks of their own."""
        return Plan(
            ranks=self._num_ranks,
            workloads=self._workloads(self.tokens or self._default_tokens()),
            peers=self.compare,
            transport=str(self.transport),
            rounds=self.rounds,
            timeout_s=self.timeout,
            sweep=self._workloads(self.sweep),
        )

    def latency_plans(self) -> list[Plan]:
        """Return a plan for each number of ranks whose latency was asked for."""
        none = replace(self.plan(), workloads=(), peers=(), sweep=())
        return [
            replace(none, ranks=n, latency=self._workloads(size for ranks, size in self.latency if ranks == n))
            for n in dict.fromkeys(ranks for ranks, _ in self.latency)
        ]

    @property
    def _num_ranks(self) -> int:
        return self.ranks or (self.job if self.in_job else None) or _DEFAULT_RANKS

    def _default_tokens(self) -> tuple[int, ...]:
        if self.latency or self.sweep:
            return ()
        return HOST_TOKENS if self.hosts else default_sizes()

    def _workloads(self, sizes: Iterable[int]) -> tuple[Workload, ...]:
        assert self.topk is not None, "checked"
        assert self.experts is not None, "checked"
        sizes = tuple(sizes)
        return tuple(
            Workload(
                name=name_of(n),
                tokens=n,
                hidden=self.hidden,
                topk=self.topk,
                experts=self.experts,
                wire=wire,
                routing=self.routing,
                padded=n <= DECODE_TOKENS and self.transport in ONE_HOST,
            )
            for wire in self.wire
            for n in sizes
        )

    def _check_transport(self) -> str:
        """Return the transport, ours where the user left it open. A job may span real hosts."""
        if self.has_links and not self.hosts:
            raise click.UsageError("--link goes with --hosts")
        across = HOSTS_TRANSPORTS if self.job is not None else ()
        possible = HOSTS_TRANSPORTS if self.hosts else (*ONE_HOST, *across)
        if self.transport is not None and self.transport not in possible:
            where = "without --hosts" if self.hosts else "with --hosts, or inside a job"
            raise click.UsageError(f"--transport {self.transport} goes {where}; possible: {', '.join(possible)}")
        return self.transport or possible[0]

    def _with_hosts(self) -> Asked:
        given = {
            "--ranks": self.ranks,
            "--compare": self.compare,
            "--latency": self.latency,
            "--sweep": self.sweep,
            "--picture": self.draws,
        }
        if others := [option for option, value in given.items() if value]:
            raise click.UsageError(f"--hosts has ranks and comparisons of its own; leave out {', '.join(others)}")
        if self.in_job:
            raise click.UsageError("--hosts starts ranks of its own; leave it out inside a job")
        return replace(self, ranks=sum(self.hosts), compare=("gloo",))

    def _check_routing(self) -> tuple[int, int]:
        """Return top-k and experts, from the trace where the user left them open."""
        if self.routing in DRAWN:
            topk, experts = self.topk or _DEFAULT_TOPK, self.experts or _DEFAULT_EXPERTS
            if topk > experts:
                raise click.UsageError(
                    f"--topk {topk} is more than --experts {experts}: a token's experts are distinct"
                )
            return topk, experts
        from anyep.cli.bench.routing import open_trace

        try:
            trace = open_trace(self.routing)
            topk, experts = self.topk or trace.num_topk, self.experts or trace.num_experts
            trace.batches(1, 1, num_experts=experts, num_topk=topk)
        except (OSError, ValueError) as error:
            raise click.UsageError(f"--routing {self.routing}: {error}") from error
        return topk, experts

    def _check_comparisons(self, experts: int) -> None:
        if not self.compare:
            return
        option, divisor = ("--hosts", "the ranks divide") if self.hosts else ("--compare", "--ranks divides")
        if self.transport == "inprocess":
            raise click.UsageError("--compare needs rank processes; leave out --transport inprocess")
        if not set(self.wire) <= {"bf16", "fp8"}:
            wires = ", ".join(self.wire)
            raise click.UsageError(f"{option} goes with --wire bf16 or fp8: the others move BF16; got {wires}")
        if experts % self._num_ranks:
            raise click.UsageError(f"{option} needs --experts that {divisor}, got {experts} and {self._num_ranks}")
        if 0 in self.tokens:
            raise click.UsageError(
                f"{option} goes with --tokens of at least 1: an empty batch is no exchange to compare"
            )
