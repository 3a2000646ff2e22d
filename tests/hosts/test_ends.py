"""Ranks of other hosts that end: the culprit is named everywhere, and nothing of it is taken for a result."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch

import anyep
from anyep.exchange import setup


@pytest.mark.parametrize("straight_bytes", [0, 1 << 20], ids=["forwarded", "straight"])
@pytest.mark.parametrize("end", ["raises", "closes", "sleeps"])
def test_a_rank_of_another_host_that_ends_is_named_everywhere(played, end, straight_bytes):
    """Rank 3 of 4 does not come to combine; rank 1 may forward for it, so that rank 0 hears of it at second hand."""
    played(2)
    kind = anyep.PeerTimeout if end == "sleeps" else anyep.PeerLost

    def rank_main(member):
        options = {"hidden": 64, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 8, "timeout_s": 1.0}
        with anyep.Buffer(member, straight_bytes=straight_bytes, **options) as ep:
            tokens = torch.arange(8)
            received = ep.dispatch(torch.ones(8, 64).bfloat16(), torch.stack([tokens, (tokens + 3) % 8], 1))
            if member.rank == 3:
                if end == "raises":
                    raise ArithmeticError("not its day")
                if end == "sleeps":
                    time.sleep(2.5)
                return
            with pytest.raises(kind) as caught:
                ep.combine(received.x, received.handle)
            assert caught.value.ranks == (3,)

    group = anyep.local_group(4)
    if end == "raises":
        with pytest.raises(ArithmeticError):
            group.run(rank_main)
    else:
        group.run(rank_main)


@pytest.mark.parametrize("idle", ["forwarder", "source"])
def test_a_forwarder_that_computes_is_named_and_not_the_source_that_has_sent(played, idle):
    """Rank 1 forwards for rank 3. Rank 0 misses rank 3's rows; who computes for longer than timeout_s is to blame."""
    played(2)
    idler = {"forwarder": 1, "source": 3}[idle]

    def rank_main(member):
        late = member.rank == idler
        options = {"hidden": 64, "num_experts": 4, "num_topk": 1, "max_tokens_per_rank": 8, "straight_bytes": 0}
        with anyep.Buffer(member, timeout_s=6.0 if late else 1.0, **options) as ep:
            tokens = 8 * (member.rank == 3)
            x, idx = torch.ones(tokens, 64).bfloat16(), torch.zeros(tokens, 1, dtype=torch.int64)
            if late and idle == "source":
                time.sleep(2.0)
            pending = ep.dispatch(x, idx, layout="padded", wait=False)
            if late:
                time.sleep(2.0)
                with pytest.raises(anyep.PeerError):
                    pending.wait()
            elif member.rank == 0:
                with pytest.raises(anyep.PeerTimeout) as caught:
                    pending.wait()
                assert caught.value.ranks == (idler,)
            else:
                with contextlib.suppress(anyep.PeerError):
                    pending.wait()

    anyep.local_group(4).run(rank_main)


def test_who_has_announced_and_left_is_not_taken_for_the_one_that_its_forwarder_waits_for(played):
    """Rank 0 forwards for ranks 2 and 4, of which 4 does not come; ranks 2 and 3 give up before ranks 0 and 1 do."""
    played(2)

    def rank_main(member):
        options = {"hidden": 64, "num_experts": 5, "num_topk": 1, "max_tokens_per_rank": 8, "straight_bytes": 0}
        timeout_s = 0.8 if member.rank in (2, 3) else 3.0
        with anyep.Buffer(member, timeout_s=timeout_s, **options) as ep:
            if member.rank == 4:
                time.sleep(4.0)
                return None
            if member.rank == 0:
                time.sleep(0.2)  # rank 1 gives up first
            with pytest.raises(anyep.PeerTimeout) as caught:
                ep.barrier()
            return caught.value.ranks

    assert anyep.local_group(5).run(rank_main) == [(4,)] * 4 + [None]


def test_a_rank_that_fails_while_buffers_are_made_is_named_everywhere(played, monkeypatch):
    """Rank 3 of 4 fails; whoever hears of it leaves too, says why, and is not taken for the culprit."""
    played(2)
    measured_rule = setup.measured_rule

    def fails_on_rank_3(transport, *args, **options):
        if transport.rank == 3:
            raise ArithmeticError("not its day")
        return measured_rule(transport, *args, **options)

    monkeypatch.setattr(setup, "measured_rule", fails_on_rank_3)

    def rank_main(member):
        with pytest.raises(ArithmeticError if member.rank == 3 else anyep.PeerLost) as caught:
            anyep.Buffer(member, hidden=64, num_experts=8, num_topk=2, max_tokens_per_rank=8, timeout_s=2.0)
        return getattr(caught.value, "ranks", None)

    assert anyep.local_group(4).run(rank_main) == [(3,), (3,), (3,), None]


def test_rows_of_a_rank_that_gave_up_do_not_cross(played):
    """Rank 3 lends its rows, gives up and writes over them; rank 2 forwards for rank 0, which reads nothing else."""
    played(2)
    together, gone = threading.Barrier(4), threading.Event()

    def rank_main(member):
        options = {"hidden": 64, "num_experts": 4, "num_topk": 1, "max_tokens_per_rank": 8, "timeout_s": 5.0}
        with anyep.Buffer(member, eager_bytes=0, straight_bytes=0, **options) as ep:
            tokens = 8 * (member.rank == 0)
            x = torch.ones(tokens, 64).bfloat16()
            received = ep.dispatch(x, torch.full((tokens, 1), 3), layout="padded")
            y = ep.empty_output(received.handle).fill_(1.0)
            pending = ep.combine(y, received.handle, wait=False)
            while not pending.done():  # low latency: until somebody waits only the announcements have come
                time.sleep(0.001)
            together.wait()
            if member.rank == 3:
                try:
                    raise ArithmeticError("not its day")
                except ArithmeticError as error:
                    ep.__exit__(ArithmeticError, error, None)
                y.fill_(float("nan"))
                gone.set()
                return
            assert gone.wait(5.0)
            if member.rank == 2:
                time.sleep(0.2)  # rank 0 waits by now
            elif member.rank == 1:
                return
            with pytest.raises(anyep.PeerLost) as caught:
                pending.wait()
            assert caught.value.ranks == (3,)

    anyep.local_group(4).run(rank_main)
