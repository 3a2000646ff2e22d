"""Every byte against the oracle. Each check returns None, or a sentence that says where the first difference lies."""

from __future__ import annotations

import torch

from anyep.cli.bench.tape import OUTPUT, PEER_OUTPUT, SENT, Tape
from anyep.exchange.handle import Received
from anyep.layout.hosts import HostMap
from anyep.numerics.logfmt import decode_logfmt, encode_logfmt
from anyep.testing.oracle import Arrivals, Exchange, as_bytes, expected_rows
from anyep.testing.oracle_sums import expected_sum, terms
from anyep.testing.peers.base import Peer

_ROWS = 128
"""Rows judged at once: the oracle's intermediate tensors stay below 50 MiB."""
_BF16_HALF_ULP = 2.0**-8
_FP32_ULP = 2.0**-23


def check_received(received: Received, exchange: Exchange, rank: int, tape: Tape, wire: str) -> str | None:
    """Compare a batch: counts, routing, rows and scales, bit for bit."""
    arrivals = exchange.arrivals[rank]
    if received.counts != arrivals.counts:
        return f"counts on rank {rank} are {received.counts}, expected {arrivals.counts}"
    parts = (received.x,) if received.scales is None else (received.x, received.scales)
    assert received.topk_idx is not None, "only the padded layout has none"
    routing = _routing_differs(arrivals, rank, received.topk_idx, received.topk_weights)
    return routing or check_rows(parts, arrivals, rank, tape, wire)


def check_combined(
    out: torch.Tensor,
    exchange: Exchange,
    rank: int,
    tape: Tape,
    *,
    weighs: bool = False,
    logfmt: bool = False,
    hosts: HostMap | None = None,
) -> str | None:
    """Compare combine's result with the same order of additions, bit for bit.

    ``weighs``: one row a (token, column), multiplied with its weight and added in the order of the columns.
    ``logfmt``: rows came back in LogFMT-10. ``hosts``: rows of another host came back as its rounded sum.
    """

    def outputs(destination: int, rows: torch.Tensor) -> torch.Tensor:
        sent = tape.rows(OUTPUT, destination, rows)
        return decode_logfmt(encode_logfmt(sent), tape.hidden) if logfmt else sent

    reduce, factors = ("expert", exchange.routing[rank].topk_weights) if weighs else ("rank", None)
    for first, last in _pieces(len(out)):
        tokens = slice(first, last)
        expected = expected_sum(
            exchange, rank, outputs, dtype=out.dtype, reduce=reduce, factors=factors, tokens=tokens, hosts=hosts
        )
        difference = first_difference(out[first:last], expected, first)
        if difference:
            return f"combined on rank {rank}: {difference}"
    return None


def check_rows(parts: tuple[torch.Tensor, ...], arrivals: Arrivals, rank: int, tape: Tape, wire: str) -> str | None:
    """Compare received rows [N, H], and scales [N, G] where the wire has them."""
    return _shape_differs(parts[0], arrivals, rank) or _rows_differ(parts, arrivals, rank, tape, wire)


def check_same(name: str, got: torch.Tensor | None, verified: torch.Tensor | None) -> str | None:
    """Compare with a result that the oracle has already passed."""
    if got is None or verified is None:
        return None if got is verified else f"{name} is missing"
    if got.shape != verified.shape:
        return f"{name} has shape {list(got.shape)}, expected {list(verified.shape)}"
    difference = first_difference(got, verified, 0)
    return f"{name}: {difference}" if difference else None


def check_same_batch(got: Received, verified: Received) -> str | None:
    """Compare a batch with one that the oracle has already passed."""
    if got.counts != verified.counts:
        return f"counts are {got.counts}, expected {verified.counts}"
    fields = ("x", "scales", "topk_idx", "topk_weights")
    return next(
        (text for name in fields if (text := check_same(name, getattr(got, name), getattr(verified, name)))), None
    )


def check_peer(peer: Peer, exchange: Exchange, rank: int, tape: Tape) -> str | None:
    """Run a comparison once and judge its results by the same oracle."""
    arrivals = exchange.arrivals[rank]
    rows = peer.dispatch()
    routing = peer.received_routing()
    difference = check_rows((rows,), arrivals, rank, tape, "bf16")
    if routing is not None:
        difference = difference or _routing_differs(arrivals, rank, *routing)
    tape.fill(rows, PEER_OUTPUT, rank, torch.arange(len(rows)))
    out = peer.combine(rows)
    return difference or _sum_differs(out, exchange, rank, tape, weighs=peer.weighs)


def first_difference(got: torch.Tensor, expected: torch.Tensor, first_row: int) -> str | None:
    """Say which byte of two tensors [n, m] of one dtype differs first."""
    left, right = as_bytes(got.contiguous()), as_bytes(expected)
    if torch.equal(left, right):
        return None
    unequal = left != right
    row, byte = (int(n) for n in unequal.nonzero()[0])
    values = [int(tensor[row, byte]) for tensor in (left, right)]
    return (
        f"row {first_row + row}, byte {byte} is 0x{values[0]:02x}, expected 0x{values[1]:02x} "
        f"({int(unequal.sum())} bytes differ in these {len(got)} rows)"
    )


def _shape_differs(rows: torch.Tensor, arrivals: Arrivals, rank: int) -> str | None:
    if len(rows) == arrivals.num_rows:
        return None
    return f"rank {rank} received {len(rows)} rows, expected {arrivals.num_rows}"


def _rows_differ(parts: tuple[torch.Tensor, ...], arrivals: Arrivals, rank: int, tape: Tape, wire: str) -> str | None:
    def sent(source: int, tokens: torch.Tensor) -> torch.Tensor:
        return tape.rows(SENT, source, tokens)

    for first, last in _pieces(arrivals.num_rows):
        expected = expected_rows(arrivals, sent, wire=wire, rows=slice(first, last))
        for name, got, right in zip(
            ("rows", "scales"), parts, expected if isinstance(expected, tuple) else (expected,), strict=False
        ):
            difference = first_difference(got[first:last], right, first)
            if difference:
                return f"received {name} on rank {rank}: {difference}"
    return None


def _routing_differs(
    arrivals: Arrivals, rank: int, topk_idx: torch.Tensor, topk_weights: torch.Tensor | None
) -> str | None:
    index = check_same(f"topk_idx on rank {rank}", topk_idx.to(arrivals.topk_idx.dtype), arrivals.topk_idx)
    return index or check_same(f"topk_weights on rank {rank}", topk_weights, arrivals.topk_weights)


def _sum_differs(out: torch.Tensor, exchange: Exchange, rank: int, tape: Tape, *, weighs: bool) -> str | None:
    """Compare a sum in fp32 whose order is not known.

    Bound: half a unit of BF16 for the rounding; and for each of at most K products and K additions, here and there, one
    unit of fp32 of the sum of magnitudes.
    """
    weights = exchange.routing[rank].topk_weights if weighs else None
    rounding = 4 * exchange.routing[rank].topk_idx.shape[1] * _FP32_ULP
    all_terms = list(terms(exchange, rank))
    for first, last in _pieces(len(out)):
        total = torch.zeros(last - first, out.shape[1])
        magnitude = torch.zeros_like(total)
        for term in all_terms:
            here = term.of_tokens(first, last)
            rows = tape.rows(PEER_OUTPUT, here.destination, here.row).float()
            if weights is not None:
                rows *= weights[here.token, here.column].bfloat16().float()[:, None]
            total.index_add_(0, here.token - first, rows)
            magnitude.index_add_(0, here.token - first, rows.abs_())
        error = (out[first:last].float() - total).abs_()
        wrong = ~(error <= magnitude.mul_(rounding).add_(total.abs(), alpha=_BF16_HALF_ULP))
        if bool(wrong.any()):
            token, channel = (int(n) for n in wrong.nonzero()[0])
            return (
                f"combined on rank {rank}: token {first + token}, channel {channel} is "
                f"{float(out[first + token, channel])}, expected {float(total[token, channel])}"
            )
    return None


def _pieces(num_rows: int) -> list[tuple[int, int]]:
    return [(first, min(first + _ROWS, num_rows)) for first in range(0, num_rows, _ROWS)]
