"""Messages between hosts that come a moment after they were looked for, or of which nobody knows any more."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch

import anyep
from anyep.exchange.courier import Outbox
from anyep.exchange.straight import StraightIn
from anyep.transport import hierarchical
from tests.exchange.cases import LAYOUTS
from tests.hosts.shapes import cut_small


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_that_leave_right_after_a_look_are_followed_by_the_rest(played, monkeypatch, layout):
    """Nine pieces, two under way at most: whenever there is no room for another, both leave a moment later."""
    played(1)
    cut_small(monkeypatch, 64)
    room = Outbox.room

    def room_a_moment_ago(box):
        had_room = room(box)
        deadline = time.monotonic() + 1.0
        while not had_room and time.monotonic() < deadline:
            if all(transfer.done() for transfer in box.pending()):
                break
            time.sleep(0.001)
        return had_room

    monkeypatch.setattr(Outbox, "room", room_a_moment_ago)

    def rank_main(member):
        options = {"hidden": 64, "num_experts": 2, "num_topk": 1, "max_tokens_per_rank": 9, "timeout_s": 3.0}
        with anyep.Buffer(member, straight_bytes=0, **options) as ep:
            tokens = 9 * (member.rank == 0)
            x = torch.arange(float(tokens))[:, None].expand(tokens, 64).bfloat16()
            received = ep.dispatch(x, torch.ones(tokens, 1, dtype=torch.int64), layout=layout)
            y = ep.empty_output(received.handle).copy_(received.x)
            assert torch.equal(ep.combine(y, received.handle), x)

    anyep.local_group(2).run(rank_main)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_straight_rows_that_come_right_after_the_turn_of_their_sums_are_summed(played, monkeypatch, layout):
    """They are not here when sums may begin, and are when it is asked what is still to come."""
    played(1)
    pending = StraightIn.pending
    looks: Counter[StraightIn] = Counter()

    def pending_a_moment_later(rows):
        looks[rows] += 1
        if looks[rows] == 1:
            return list(rows._asked)
        deadline = time.monotonic() + 5.0
        while pending(rows) and time.monotonic() < deadline:
            time.sleep(0.001)
        return pending(rows)

    monkeypatch.setattr(StraightIn, "pending", pending_a_moment_later)

    def rank_main(member):
        options = {"hidden": 64, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": 9, "timeout_s": 20.0}
        with anyep.Buffer(member, straight_bytes=1 << 20, **options) as ep:
            x = torch.arange(9.0)[:, None].expand(9, 64).bfloat16()
            received = ep.dispatch(x, torch.tensor([[0, 3]]).repeat(9, 1), torch.ones(9, 2), layout=layout)
            y = ep.empty_output(received.handle).copy_(received.x)
            sums = ep.combine(y, received.handle, out=torch.full((9, 64), -1.0).bfloat16())
            assert torch.equal(sums, 2 * x)

    anyep.local_group(2).run(rank_main)
    assert looks, "rows went straight"


@pytest.mark.parametrize("straight_bytes", [0, 1 << 20], ids=["forwarded", "straight"])
@pytest.mark.parametrize("refusal", ["too many rows", "another call", "a barrier"])
def test_what_was_sent_ahead_of_a_refusal_is_not_taken_for_a_later_message(
    played, monkeypatch, refusal, straight_bytes
):
    """Messages of an operation and of the eighth after it have the same tags here, instead of the 4096th."""
    played(2)
    cut_small(monkeypatch, 700)
    monkeypatch.setattr(hierarchical, "_EPOCH_BITS", 3)
    options = {"hidden": 64, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 40, "max_in_flight": 2}
    tokens = torch.arange(40)
    idx = torch.stack([tokens % 8, (tokens + 4) % 8], 1)

    def call(ep, x):
        if refusal == "too many rows":
            ep.dispatch(x, idx * 0 + 7)
        elif ep.rank != 2:
            ep.dispatch(x, idx)
        elif refusal == "a barrier":
            ep.barrier()
        else:
            ep.dispatch(x, idx, layout="expert")

    def rank_main(member):
        x = torch.full((40, 64), member.rank + 1.0).bfloat16()
        with anyep.Buffer(member, static_rows=90, straight_bytes=straight_bytes, **options) as ep:
            with pytest.raises((anyep.CapacityError, ValueError)):
                call(ep, x)
            for number in range(10):
                batch = x * (number + 1)
                received = ep.dispatch(batch[: 20 + number], idx[: 20 + number])
                y = ep.empty_output(received.handle).copy_(received.x)
                assert torch.equal(ep.combine(y, received.handle), 2 * batch[: 20 + number])

    anyep.local_group(4).run(rank_main)
