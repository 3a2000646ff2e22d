"""The checks of the padded rows find one wrong byte of what is defined, and overlook what is not."""

from __future__ import annotations

import pytest
import torch

from anyep import local_group
from anyep.cli.bench.padded import LOGFMT, Padded
from anyep.cli.bench.padded_checks import DefinedRows, PaddedChecks, check_defined, poison_defined
from anyep.cli.bench.plan import Workload
from anyep.cli.bench.routing import make_exchange
from anyep.numerics.logfmt import encode_logfmt

WORKLOAD = Workload(name="w", tokens=5, hidden=130, topk=3, experts=8, wire="fp8", routing="balanced")


def on_two_ranks(body):
    """Return what ``body(padded, checks)`` returns on each rank."""
    exchange = make_exchange(WORKLOAD, 2)

    def rank_main(member):
        with Padded(member, WORKLOAD, exchange, transport="inprocess", timeout_s=30) as padded:
            return body(padded, PaddedChecks(padded, exchange, WORKLOAD.wire))

    return local_group(2).run(rank_main)


def test_right_bytes_pass():
    assert on_two_ranks(lambda padded, checks: (checks.first(), checks.again())) == [({}, {})] * 2


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("rows", lambda batch: batch.x.view(torch.uint8)[2].__setitem__(7, 0x55)),
        ("scales", lambda batch: batch.scales[3].fill_(7)),
        ("source_token", lambda batch: batch.source_token.__setitem__(1, 99)),
        ("source_count", lambda batch: batch.source_count.__setitem__((0, 1), 99)),
        ("source_begin", lambda batch: batch.source_begin.__setitem__((1, 1), 99)),
    ],
)
def test_one_wrong_byte_of_a_batch_is_found(name, spoil):
    def body(padded, checks):
        batch = DefinedRows.of(padded.dispatch())
        spoil(batch)
        return check_defined(batch, checks._exchange, padded.ep.rank, padded, WORKLOAD.wire)

    assert all(name in text for text in on_two_ranks(body))


@pytest.mark.parametrize("wire", [None, LOGFMT])
def test_one_wrong_output_is_found_in_the_sum(wire):
    def body(padded, checks):
        checks.first()
        padded.in_arena[:, 0].fill_(0.5)
        return checks.again()

    name = "combine_padded" if wire is None else "combine_padded_logfmt10"
    assert all("row" in found[name] for found in on_two_ranks(body))


def test_what_is_undefined_is_not_looked_at():
    def body(padded, checks):
        checks.first()
        received = padded.dispatch()
        received.x.view(torch.uint8).fill_(0x55)
        del received
        return checks.again()

    assert on_two_ranks(body) == [{}, {}]


def test_poison_reaches_every_defined_row():
    def body(padded, checks):
        received = padded.dispatch()
        poison_defined(received)
        return bool((DefinedRows.of(received).x.view(torch.uint8) == 0xFF).all())

    assert on_two_ranks(body) == [True, True]


def test_every_group_of_the_outputs_is_coded():
    headers = on_two_ranks(lambda padded, checks: encode_logfmt(padded.tape.rows(2, 0, torch.arange(50))).header)
    assert all(bool((header != 0).all()) for header in headers)
