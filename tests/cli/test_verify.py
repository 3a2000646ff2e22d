"""The checks of the benchmark find one wrong byte, and say where."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from anyep.cli.bench.plan import Workload
from anyep.cli.bench.routing import even_owners, make_exchange
from anyep.cli.bench.tape import OUTPUT, PEER_OUTPUT, SENT, Tape
from anyep.cli.bench.verify import check_combined, check_peer, check_received
from anyep.exchange.handle import Received
from anyep.testing.oracle import expected_rows
from anyep.testing.oracle_sums import expected_sum, terms

RANK = 1


def workload(wire="fp8", routing="balanced"):
    return Workload(name="w", tokens=9, hidden=130, topk=3, experts=8, wire=wire, routing=routing)


@pytest.fixture
def tape():
    return Tape(130, torch.bfloat16)


def received(exchange, tape, wire="fp8"):
    """What a faultless dispatch would return."""
    there = exchange.arrivals[RANK]
    rows = expected_rows(there, lambda rank, rows: tape.rows(SENT, rank, rows), wire=wire, rows=slice(None))
    x, scales = rows if isinstance(rows, tuple) else (rows, None)
    return Received(
        x=x,
        scales=scales,
        topk_idx=there.topk_idx.clone(),
        topk_weights=there.topk_weights.clone(),
        counts=list(there.counts),
        handle=None,
    )


@pytest.mark.parametrize("wire", ["fp8", "bf16"])
def test_a_right_batch_passes(tape, wire):
    exchange = make_exchange(workload(wire), 2)
    assert check_received(received(exchange, tape, wire), exchange, RANK, tape, wire) is None


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda r: r.x.view(torch.uint8)[3].__setitem__(129, 0x55), "received rows on rank 1: row 3, byte 129 is 0x55"),
        (lambda r: r.scales.view(torch.uint8)[8].__setitem__(7, 0x55), "received scales on rank 1: row 8, byte 7"),
        (lambda r: r.topk_idx[2].fill_(7), "topk_idx on rank 1: row 2, byte 0 is 0x07"),
        (lambda r: r.topk_weights[4].fill_(7), "topk_weights on rank 1: row 4"),
        (lambda r: r.counts.__setitem__(0, 99), "counts on rank 1 are [99,"),
    ],
)
def test_one_wrong_byte_of_a_batch_is_found(tape, spoil, expected):
    exchange = make_exchange(workload(), 2)
    batch = received(exchange, tape)
    spoil(batch)
    difference = check_received(batch, exchange, RANK, tape, "fp8")
    assert difference is not None
    assert expected in difference


def test_two_rows_in_each_others_place_are_found(tape):
    exchange = make_exchange(workload(), 2)
    batch = received(exchange, tape)
    batch.x.view(torch.uint8)[[1, 2]] = batch.x.view(torch.uint8)[[2, 1]]
    assert "row 1, byte 0" in (check_received(batch, exchange, RANK, tape, "fp8") or "")


def test_one_wrong_bit_of_a_sum_is_found(tape):
    exchange = make_exchange(workload(), 2)
    out = expected_sum(exchange, RANK, lambda rank, rows: tape.rows(OUTPUT, rank, rows), dtype=torch.bfloat16)
    assert check_combined(out, exchange, RANK, tape) is None
    out.view(torch.uint8)[5, 12] ^= 1
    assert "combined on rank 1: row 5, byte 12" in (check_combined(out, exchange, RANK, tape) or "")


class FakePeer:
    """A faultless comparison of one rank, or one that spoils its sum by less than two units of the last place."""

    name, layout = "fake", "expert"

    def __init__(self, exchange, tape, weighs, error):
        self.exchange, self.tape, self.weighs, self.error = exchange, tape, weighs, error

    def dispatch(self):
        there = self.exchange.arrivals[RANK]
        return expected_rows(there, partial(self.tape.rows, SENT), wire="bf16", rows=slice(None))

    def received_routing(self):
        return None

    def combine(self, y):
        weights = self.exchange.routing[RANK].topk_weights.bfloat16().float()
        total = torch.zeros(9, 130)
        for term in terms(self.exchange, RANK):
            factor = weights[term.token, term.column][:, None] if self.weighs else 1.0
            total[term.token] += factor * self.tape.rows(PEER_OUTPUT, term.destination, term.row).float()
        out = total.bfloat16()
        out.view(torch.int16)[4, 17] += self.error
        return out


@pytest.mark.parametrize("weighs", [True, False])
@pytest.mark.parametrize("error", [0, 2])
def test_a_comparison_is_judged_too(tape, weighs, error):
    exchange = replace(make_exchange(workload("bf16"), 2), layout="expert")
    difference = check_peer(FakePeer(exchange, tape, weighs, error), exchange, RANK, tape)
    assert (difference is None) == (error == 0), difference
    if error:
        assert "token 4, channel 17" in difference


def test_tapes_repeat_and_rows_differ():
    rows = Tape(40, torch.bfloat16).rows(SENT, 3, torch.arange(500))
    assert torch.equal(rows, Tape(40, torch.bfloat16).rows(SENT, 3, torch.arange(500)))
    assert len({tuple(row.tolist()) for row in rows}) == 500
    assert not torch.equal(rows, Tape(40, torch.bfloat16).rows(SENT, 4, torch.arange(500)))
    assert not torch.equal(rows, Tape(40, torch.bfloat16).rows(OUTPUT, 3, torch.arange(500)))


@pytest.mark.parametrize("routing", ["balanced", "zipf"])
def test_drawn_routing_is_distinct_and_repeats(routing):
    exchange = make_exchange(workload(routing=routing), 3)
    assert exchange.expert_rank == [0, 0, 0, 1, 1, 1, 2, 2]
    again = make_exchange(workload(routing=routing), 3)
    for one, other in zip(exchange.routing, again.routing, strict=True):
        assert torch.equal(one.topk_idx, other.topk_idx)
        assert all(len(set(row)) == 3 for row in one.topk_idx.tolist())
        torch.testing.assert_close(one.topk_weights.sum(1), torch.ones(9))
    assert not torch.equal(exchange.routing[0].topk_idx, exchange.routing[1].topk_idx)


def test_zipf_has_hot_experts():
    loads = torch.bincount(
        torch.cat([one.topk_idx.flatten() for one in make_exchange(big("zipf"), 2).routing]), minlength=64
    )
    even = torch.bincount(
        torch.cat([one.topk_idx.flatten() for one in make_exchange(big("balanced"), 2).routing]), minlength=64
    )
    assert loads.max() > 3 * loads.float().mean()
    assert even.max() < 2 * even.float().mean()


def big(routing):
    return Workload(name="w", tokens=500, hidden=8, topk=4, experts=64, wire="bf16", routing=routing)


def test_owners_are_contiguous():
    assert even_owners(5, 3) == [0, 0, 1, 1, 2]
