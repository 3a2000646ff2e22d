"""V1 dispatches with ``async_finish``: sizes are known when they return, rows are there after the event."""

from __future__ import annotations

import threading

import pytest

from tests.compat.v1_oracle import make_inputs, on_ranks, same_bits, send

GIVEN = make_inputs([9, 31, 0, 5])


@pytest.mark.parametrize("per_host", [8, 2])
@pytest.mark.parametrize("options", [{}, {"num_worst_tokens": 64}])
def test_the_event_brings_what_a_synchronous_dispatch_returns(monkeypatch, options, per_host):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))

    def rank_main(buffer):
        mine = GIVEN[buffer.rank]
        plain = send(buffer, mine, **options)
        late = send(buffer, mine, async_finish=True, **options)
        assert late[3] == plain[3]
        members = tuple(late[4])  # waits where a member needs rows
        late[5].current_stream_wait()
        for one, other in zip((*late[:3], *members), (*plain[:3], *plain[4]), strict=True):
            assert same_bits(one, other)
        assert same_bits(buffer.combine(late[0], late[4])[0], buffer.combine(plain[0], plain[4])[0])

    on_ranks(4, rank_main)


def test_a_cached_dispatch_returns_before_others_have_called():
    began = threading.Event()

    def rank_main(buffer):
        mine = GIVEN[buffer.rank]
        x, *_, handle, _ = send(buffer, mine)
        if buffer.rank:
            assert began.wait(20)
        again, *_, event = buffer.dispatch(mine.x, handle=handle, async_finish=True)
        began.set()
        event.current_stream_wait()
        assert same_bits(again, x)

    on_ranks(4, rank_main)
