"""Runs a case on real ranks and holds every byte against the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import anyep
from anyep.exchange import courier, receive, setup, sums_in
from anyep.layout.hosts import HostMap
from anyep.testing.oracle import PADDING, Arrivals, as_bytes, expected_rows
from anyep.testing.oracle_sums import expected_sum
from anyep.transport.registry import open_transport
from tests.exchange.cases import Case

NAMES = ("x", "scales", "topk_idx", "topk_weights", "source_begin", "source_count", "source_token")


@dataclass(frozen=True, kw_only=True, eq=False)
class ReceivedCopy:
    """A received batch without its handle: what can travel between processes. FP8 travels as bytes."""

    bytes_of: dict[str, tuple[torch.dtype, torch.Tensor]]
    counts: list[int]

    @classmethod
    def of(cls, received: anyep.Received) -> ReceivedCopy:
        tensors = {name: tensor for name in NAMES if (tensor := getattr(received, name)) is not None}
        return cls(
            bytes_of={name: (t.dtype, as_bytes(dense(t))) for name, t in tensors.items()},
            counts=received.counts,
        )

    def __getattr__(self, name: str) -> torch.Tensor | None:
        if name not in NAMES:
            raise AttributeError(name)
        dtype, data = self.bytes_of.get(name, (None, None))
        return None if data is None else data.view(dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What one rank got from its calls."""

    received: ReceivedCopy
    again: ReceivedCopy
    y: torch.Tensor
    combined: torch.Tensor
    weights: torch.Tensor | None


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a row-major copy, whose strides are the usual ones also where a size is 1."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def poison_arenas() -> None:
    """From now on this process's buffers fill memory with 0xFF before it is used: what nobody writes is seen."""
    setup.open_transport = partial(open_transport, poison=True)
    receive.fresh = poisoned
    courier.piece_memory = sums_in.piece_memory = poisoned_bytes


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Stands for private memory with any content."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor.reshape(-1).view(torch.uint8).fill_(0xFF)
    return tensor


def poisoned_bytes(num_bytes: int) -> np.ndarray:
    """Stands for the memory of a piece that crosses."""
    return np.full(num_bytes, 0xFF, np.uint8)


def open_buffer(case: Case, group: object, **options: object) -> anyep.Buffer:
    return anyep.Buffer(
        group,
        hidden=case.hidden,
        num_experts=case.num_experts,
        num_topk=case.num_topk,
        max_tokens_per_rank=case.most_tokens,
        wire=case.wire,
        scales=case.scales,
        expert_alignment=case.alignment,
        static_rows=case.static_rows,
        placement=case.placement,
        num_threads=case.num_threads,
        **{"eager_bytes": case.eager_bytes, "timeout_s": 60.0} | options,
    )


def play(case: Case, ep: anyep.Buffer) -> Outcome:
    """Dispatch, compute something on every row, combine, and dispatch once more the same way."""
    batch = case.batches[ep.rank]
    received = ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights, layout=case.layout)
    y = expert_output(case, received, ep)
    weights = received.topk_weights  # none in the padded layout, where the dispatch's are applied at the origin
    result = ep.combine(y, received.handle, topk_weights=weights, bias=batch.bias or None, reduce=case.reduce)
    again = ep.dispatch(batch.x, None, batch.topk_weights, handle=received.handle)
    return Outcome(
        received=ReceivedCopy.of(received),
        again=ReceivedCopy.of(again),
        y=y,
        combined=result if weights is None else result.x,
        weights=None if weights is None else result.topk_weights,
    )


def expert_output(case: Case, received: anyep.Received, ep: anyep.Buffer) -> torch.Tensor:
    """Return another value for every row; in the arena for even seeds, elsewhere for odd ones."""
    dtype = torch.bfloat16 if case.wire == "fp8" else received.x.dtype
    shape = received.x.shape
    y = ep.empty_output(received.handle) if case.seed % 2 == 0 else torch.empty(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(case.seed + 31 * ep.rank)
    y.copy_(torch.randn(shape, generator=generator))
    return y


def check(case: Case, outcomes: list[Outcome | None], hosts: HostMap | None = None) -> None:
    """Compare every rank's outcome with the oracle, bit for bit; ``hosts``: where ranks live on several.

    Ranks that take no part have none.
    """
    assert [rank for rank, outcome in enumerate(outcomes) if outcome is None] == sorted(case.absent)
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            check_received(case, rank, outcome.received)
            check_received(case, rank, outcome.again)
            present = [outcome if other is None else other for other in outcomes]  # the oracle asks absent ones nothing
            _check_sums(case, rank, present, hosts)


def _check_sums(case: Case, rank: int, outcomes: list[Outcome], hosts: HostMap | None) -> None:
    outcome = outcomes[rank]
    expected = expected_sum(
        case.exchange,
        rank,
        lambda owner, rows: outcomes[owner].y.view(-1, case.hidden)[rows],
        dtype=outcome.y.dtype,
        reduce=case.reduce,
        bias=case.batches[rank].bias,
        factors=case.batches[rank].topk_weights if case.layout == "padded" else None,
        hosts=hosts,
    )
    assert_same("combined", outcome.combined, expected)
    if outcome.weights is not None:
        back = expected_sum(
            case.exchange,
            rank,
            lambda owner, rows: outcomes[owner].received.topk_weights[rows],
            dtype=torch.float32,
            reduce=case.reduce,
            hosts=hosts,
        )
        assert_same("returned weights", outcome.weights, back)


def check_received(case: Case, rank: int, received: ReceivedCopy) -> None:
    there = case.exchange.arrivals[rank]
    rows = expected_rows(
        there, lambda source, token: case.batches[source].x[token], wire=case.wire, scales=case.scales, rows=slice(None)
    )
    x, scales = rows if isinstance(rows, tuple) else (rows, None)
    assert received.counts == there.counts
    assert (received.scales is None) == (scales is None)
    if case.layout == "padded":
        check_blocks(case, received, there, x, scales)
        return
    assert_same("x", received.x, x)
    if scales is not None:
        assert_same("scales", received.scales, scales)
    assert_same("topk_idx", received.topk_idx, there.topk_idx)
    assert (received.topk_weights is None) == (there.topk_weights is None)
    if there.topk_weights is not None:
        assert_same("topk_weights", received.topk_weights, there.topk_weights)


def check_blocks(
    case: Case, received: ReceivedCopy, there: Arrivals, x: torch.Tensor, scales: torch.Tensor | None
) -> None:
    """Compare the defined rows of the padded layout, and what is said of their sources."""
    shape = (len(there.counts), case.block_rows)
    defined = there.source != PADDING
    for name, expected in (("x", x), ("scales", scales), ("source_token", there.token.int())):
        if expected is not None:
            got = getattr(received, name)
            assert got.shape[:2] == shape
            assert_same(name, got.reshape(expected.shape)[defined], expected[defined])
    source_LP = there.source.view(shape)
    for source in range(case.num_ranks):
        assert received.source_count[:, source].tolist() == (source_LP == source).sum(dim=1).tolist()
        begins = [int((row < source).sum() - (row == PADDING).sum()) for row in source_LP]
        assert received.source_begin[:, source].tolist() == begins


def assert_same(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare dtype, shape and every bit."""
    assert actual.dtype == expected.dtype, name
    assert actual.shape == expected.shape, name
    if actual.numel():
        assert torch.equal(as_bytes(dense(actual)), as_bytes(dense(expected))), name
