"""The work of two micro-batches on one rank, and two orders in which it can be done.

Legend: T tokens of a micro-batch, H hidden, E experts, R ranks, N received rows, P rows of an expert's padded block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timeline import Span

import anyep

SCHEDULES = ("sequential", "overlapped")
Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What every rank does."""

    tokens: int = 128
    """of each of the two micro-batches"""
    hidden: int = 7168
    width: int = 64
    """of an expert, and of what attention looks at"""
    num_experts: int = 16
    num_topk: int = 4
    num_layers: int = 3
    rounds: int = 11
    layout: str = "expert"


@dataclass(frozen=True, kw_only=True)
class Round:
    """One schedule, once, on one rank."""

    out: list[Tensor]
    """of both micro-batches, [T, H] bfloat16"""
    spans: list[Span]
    waited_s: list[float]
    """for each rank"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank saw: spans of every round, and seconds that it waited for each rank in all of them."""

    spans: dict[str, list[list[Span]]]
    waited_s: dict[str, list[float]]
    same_bits: bool


@dataclass(kw_only=True)
class Clock:
    """Writes down what happens when, in seconds of the clock that all processes of a host share."""

    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def span(self, kind: str, batch: int) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.spans.append(Span(kind=kind, batch=batch, begin=begin, end=time.perf_counter()))

    def in_flight(self, kind: str, batch: int, begin: float) -> None:
        self.spans.append(Span(kind=kind, batch=batch, begin=begin, end=time.perf_counter(), in_flight=True))


class Model:
    """One rank's share of the layers, each of which is the same."""

    def __init__(self, ep: anyep.Buffer, sizes: Sizes) -> None:
        self.ep, self.sizes = ep, sizes
        H, W, T = sizes.hidden, sizes.width, sizes.tokens
        local = sizes.num_experts // ep.num_ranks
        own = torch.Generator().manual_seed(ep.rank)
        self.project = torch.randn(H, W, generator=own) / H**0.5
        self.up = torch.randn(local, H, W, generator=own) / H**0.5
        self.down = torch.randn(local, W, H, generator=own) / W**0.5
        self.inputs = [torch.randn(T, H, generator=own).bfloat16() for _ in range(2)]
        scores = [torch.rand(T, sizes.num_experts, generator=own).topk(sizes.num_topk) for _ in range(2)]
        self.topk_idx = [one.indices for one in scores]  # drawn: as even as a trained gate's
        self.topk_weights = [one.values for one in scores]

    def attend(self, x: Tensor) -> Tensor:
        """[T, H] to [T, H]: project, mix all tokens by their scores, project back."""
        narrow = x.float() @ self.project
        scores = (narrow @ narrow.T / narrow.shape[1] ** 0.5).softmax(dim=1)
        return (x + scores @ narrow @ self.project.T).bfloat16()

    def post_dispatch(self, x: Tensor, batch: int) -> anyep.Pending[anyep.Received]:
        routing = self.topk_idx[batch], self.topk_weights[batch]
        return self.ep.dispatch(x, *routing, layout=self.sizes.layout, wait=False)

    def compute(self, received: anyep.Received) -> Tensor:
        """Two matrix products for each local expert, [N, H] or [L, P, H], where combine reads without a copy."""
        y = self.ep.empty_output(received.handle)
        begin = 0
        for local, count in enumerate(received.counts):
            rows = (local, slice(count)) if received.x.dim() == 3 else (slice(begin, begin + count),)
            y[rows] = (received.x[rows].float() @ self.up[local]).relu() @ self.down[local]
            begin += count
        if received.topk_weights is not None:  # the padded layout's are applied where the tokens come from
            y *= received.topk_weights.sum(dim=1, keepdim=True)
        return y


class Schedule:
    """The steps of one micro-batch after another; each knows what it does, the schedules below say when."""

    def __init__(self, model: Model, clock: Clock) -> None:
        self.model, self.clock = model, clock
        self.x = list(model.inputs)
        self._handles: dict[int, anyep.Handle] = {}
        self._under_way: dict[int, tuple[float, anyep.Pending[Any]]] = {}

    def attention(self, batch: int) -> None:
        with self.clock.span("attention", batch):
            self.x[batch] = self.model.attend(self.x[batch])

    def dispatch(self, batch: int) -> None:
        self._post("dispatch", batch, lambda: self.model.post_dispatch(self.x[batch], batch))

    def expert(self, batch: int) -> None:
        received = self._wait("dispatch", batch)
        with self.clock.span("expert", batch):
            self.x[batch] = self.model.compute(received)
        self._handles[batch] = received.handle

    def combine(self, batch: int) -> None:
        y, handle = self.x[batch], self._handles.pop(batch)
        self._post("combine", batch, lambda: self.model.ep.combine(y, handle, wait=False))

    def finish(self, batch: int) -> None:
        self.x[batch] = self._wait("combine", batch)

    def _post(self, kind: str, batch: int, post: Callable[[], anyep.Pending[Any]]) -> None:
        begin = time.perf_counter()
        with self.clock.span(kind, batch):
            self._under_way[batch] = begin, post()

    def _wait(self, kind: str, batch: int) -> Any:
        begin, pending = self._under_way.pop(batch)
        with self.clock.span(kind, batch):
            result = pending.wait()
        self.clock.in_flight(kind, batch, begin)
        return result


def sequential(steps: Schedule, num_layers: int) -> None:
    """Every exchange is waited for at once."""
    for _ in range(num_layers):
        for batch in (0, 1):
            steps.attention(batch)
            steps.dispatch(batch)
            steps.expert(batch)
            steps.combine(batch)
            steps.finish(batch)


def overlapped(steps: Schedule, num_layers: int) -> None:
    """Every exchange has the other micro-batch's work behind it."""
    for layer in range(num_layers):
        for batch in (0, 1):
            if layer > 0:
                steps.finish(batch)
            steps.attention(batch)
            steps.dispatch(batch)
        for batch in (0, 1):
            steps.expert(batch)
            steps.combine(batch)
    steps.finish(0)
    steps.finish(1)


def run_once(model: Model, schedule: Callable[[Schedule, int], None]) -> Round:
    """Run one schedule behind a barrier."""
    steps = Schedule(model, Clock())
    model.ep.barrier()
    before = model.ep.stats().waiting_s_by_source
    schedule(steps, model.sizes.num_layers)
    waited = model.ep.stats().waiting_s_by_source - before
    return Round(out=[x.clone() for x in steps.x], spans=steps.clock.spans, waited_s=waited.tolist())


def rank_main(group: object, rank: int, sizes: Sizes) -> Report:
    """Run both schedules in turn, a round to warm up and then those that count."""
    buffer = anyep.Buffer(
        group,
        hidden=sizes.hidden,
        num_experts=sizes.num_experts,
        num_topk=sizes.num_topk,
        max_tokens_per_rank=sizes.tokens,
    )
    with buffer as ep:
        model = Model(ep, sizes)
        rounds: dict[str, list[Round]] = {name: [] for name in SCHEDULES}
        for _ in range(1 + sizes.rounds):
            for name, schedule in zip(SCHEDULES, (sequential, overlapped), strict=True):
                rounds[name].append(run_once(model, schedule))
        first = rounds["sequential"][0].out
        waited_s = {name: [one.waited_s for one in ones[1:]] for name, ones in rounds.items()}
        return Report(
            spans={name: [one.spans for one in ones[1:]] for name, ones in rounds.items()},
            waited_s={name: [sum(times) for times in zip(*waits, strict=True)] for name, waits in waited_s.items()},
            same_bits=all(_same(one.out, first) for ones in rounds.values() for one in ones),
        )


def _same(out: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(out, expected, strict=True))
