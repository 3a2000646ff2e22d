"""Gatherer: each rank's tensors in every rank's memory, for the length of a session."""

from __future__ import annotations

import random
import time

import pytest
import torch

import anyep
from anyep.collectives import Gatherer, gathered_bytes


def on_ranks(num_ranks, function, **options):
    def rank_main(member):
        with Gatherer(member, **{"session_bytes": 1 << 16, "max_gathers": 8, "timeout_s": 20.0, **options}) as gatherer:
            return function(gatherer)

    return anyep.local_group(num_ranks).run(rank_main)


def drawn(rank, number, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * number + rank)
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 120, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def as_bytes(x):
    return x.reshape(-1).view(torch.uint8)


def expected(num_ranks, number, shape, dtype=torch.float32):
    return torch.stack([drawn(rank, number, shape, dtype) for rank in range(num_ranks)])


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_every_rank_has_every_ranks_tensor(num_ranks, dtype, kernels):
    shapes = [(3, 5), (), (0, 4), (1,), (1100,)]

    def program(gatherer):
        with gatherer.session() as session:
            for number, shape in enumerate(shapes):
                out = session.all_gather(drawn(gatherer.rank, number, shape, dtype))
                assert out.shape == (num_ranks, *shape)
                assert torch.equal(as_bytes(out), as_bytes(expected(num_ranks, number, shape, dtype)))

    on_ranks(num_ranks, program, kernels=kernels)


def test_results_hold_for_the_whole_session():
    def program(gatherer):
        with gatherer.session() as session:
            outs = [session.all_gather(drawn(gatherer.rank, number, (7,))) for number in range(8)]
            return all(torch.equal(out, expected(3, number, (7,))) for number, out in enumerate(outs))

    assert on_ranks(3, program) == [True] * 3


def test_several_tensors_in_one_gather():
    def program(gatherer):
        rank = gatherer.rank
        with gatherer.session() as session:
            first, second = session.all_gather([drawn(rank, 0, (3,)), drawn(rank, 1, (2, 2), torch.int16)])
            assert session.all_gather([]) == ()
            assert torch.equal(first, expected(2, 0, (3,)))
            assert torch.equal(second, expected(2, 1, (2, 2), torch.int16))

    on_ranks(2, program)


def test_a_filled_slot_is_gathered_where_it_lies():
    def program(gatherer):
        with gatherer.session() as session:
            session.all_gather(torch.zeros(3))
            slot = session.slot((2, 3), torch.float32)
            again = session.slot((2, 3), torch.float32)
            assert slot.data_ptr() == again.data_ptr(), "a slot is not used up before it is gathered"
            slot.copy_(drawn(gatherer.rank, 0, (2, 3)))
            out = session.all_gather(slot)
            assert out[gatherer.rank].data_ptr() == slot.data_ptr()
            assert torch.equal(out, expected(3, 0, (2, 3)))
            first, second = session.slots([(4,), (5,)], torch.int64)
            first.fill_(gatherer.rank), second.fill_(-gatherer.rank)
            outs = session.all_gather([first, second])
            return [out[:, 0].tolist() for out in outs]

    assert on_ranks(3, program) == [[[0, 1, 2], [0, -1, -2]]] * 3


def test_other_memory_of_the_session_is_refused():
    def program(gatherer):
        with gatherer.session() as session:
            slot = session.slot((4,), torch.float32)
            session.all_gather(torch.ones(4))
            with pytest.raises(ValueError, match=r"fill slot\(\) right before"):
                session.all_gather(slot)
            return session.all_gather(slot.clone()).tolist()

    assert on_ranks(2, program) == [[[1.0] * 4] * 2] * 2


def test_gathers_are_waited_for_in_any_order_or_not_at_all():
    def program(gatherer):
        own = random.Random(gatherer.rank)
        for turn in range(40):
            with gatherer.session() as session:
                pendings = [
                    (number, session.all_gather(drawn(gatherer.rank, turn + number, (number, 9)), wait=False))
                    for number in range(8)
                ]
                own.shuffle(pendings)
                if own.random() < 0.1:
                    time.sleep(0.002)
                for number, pending in pendings[: own.randrange(0, 9)]:
                    assert torch.equal(pending.wait(), expected(4, turn + number, (number, 9)))

    on_ranks(4, program)


@pytest.mark.parametrize("max_gathers", [1, 2, 3])
def test_random_sessions_of_slow_and_fast_ranks(max_gathers):
    shared = random.Random(max_gathers)
    plan = [
        [[(shared.randrange(0, 30),) for _ in range(shared.randrange(0, 3))] for _ in range(max_gathers)]
        for _ in range(200)
    ]

    def program(gatherer):
        own = random.Random(gatherer.rank)
        for turn, gathers in enumerate(plan):
            with gatherer.session() as session:
                for shapes in gathers[: 1 + turn % max_gathers]:
                    outs = session.all_gather([drawn(gatherer.rank, turn + i, shape) for i, shape in enumerate(shapes)])
                    for i, (out, shape) in enumerate(zip(outs, shapes, strict=True)):
                        assert torch.equal(out, expected(3, turn + i, shape))
                if own.random() < 0.05:
                    time.sleep(0.001)

    on_ranks(3, program, max_gathers=max_gathers)


def test_a_session_has_room_for_exactly_its_bytes():
    session_bytes = gathered_bytes(3, (5,), torch.float32) + gathered_bytes(3, (1,), torch.uint8)

    def program(gatherer):
        for _ in range(2):
            with gatherer.session() as session:
                session.all_gather(torch.ones(5))
                with pytest.raises(
                    anyep.CapacityError, match=f"64 of this session exceeds its session_bytes={session_bytes}"
                ):
                    session.all_gather(torch.ones(11, dtype=torch.uint8))
                with pytest.raises(anyep.CapacityError):
                    session.slot((11,), torch.uint8)
                assert session.all_gather(torch.ones(1, dtype=torch.uint8)).sum() == 3
        return session_bytes

    assert on_ranks(3, program, session_bytes=session_bytes) == [96] * 3


def test_a_session_has_no_more_calls_than_it_was_made_for():
    def program(gatherer):
        with gatherer.session() as session:
            session.all_gather(torch.ones(1))
            with pytest.raises(anyep.CapacityError, match="max_gathers=1"):
                session.all_gather(torch.ones(1))
        with gatherer.session() as session:
            return session.all_gather(torch.ones(1)).sum().item()

    assert on_ranks(2, program, max_gathers=1) == [2.0, 2.0]


def test_ranks_that_gather_differently_all_learn_and_the_next_session_is_good():
    def program(gatherer):
        with gatherer.session() as session:
            with pytest.raises(ValueError, match="ranks gather different shapes or dtypes: rank"):
                session.all_gather(torch.ones(2 + (gatherer.rank == 1)))
            with pytest.raises(ValueError, match="enter a new one"):
                session.all_gather(torch.ones(2))
        with gatherer.session() as session:
            return session.all_gather(torch.full((2,), float(gatherer.rank)))[:, 1].tolist()

    assert on_ranks(3, program) == [[0.0, 1.0, 2.0]] * 3


def test_sessions_come_one_after_the_other():
    def program(gatherer):
        session = gatherer.session()
        with pytest.raises(ValueError, match="close it before the next one"):
            gatherer.session()
        pending = session.all_gather(torch.ones(1), wait=False)
        session.close()
        session.close()
        with pytest.raises(ValueError, match="this session was closed"):
            pending.wait()
        with pytest.raises(ValueError, match="this session was closed"):
            session.all_gather(torch.ones(1))
        with gatherer.session() as other:
            return other.all_gather(torch.ones(1)).sum().item()

    assert on_ranks(2, program) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda session: session.all_gather(1.0), TypeError, "not iterable"),
        (lambda session: session.all_gather([1.0]), TypeError, r"x\[0\] must be a torch.Tensor, got float"),
        (lambda session: session.all_gather(torch.ones(1, device="meta")), ValueError, "on meta"),
    ],
)
def test_a_refused_call_costs_nothing(call, kind, text):
    def program(gatherer):
        with gatherer.session() as session:
            if gatherer.rank == 0:
                with pytest.raises(kind, match=text):
                    call(session)
            return session.all_gather(torch.ones(1)).sum().item()

    assert on_ranks(2, program) == [2.0, 2.0]


def test_a_rank_that_does_not_gather_is_named():
    def program(gatherer):
        session = gatherer.session()
        if gatherer.rank == 1:
            time.sleep(0.6)
            return None
        with pytest.raises(anyep.PeerTimeout, match="all_gather 1 of session 1") as caught:
            session.all_gather(torch.ones(1))
        assert caught.value.ranks == (1,)
        with pytest.raises(anyep.ClosedError, match="PeerTimeout"):
            session.all_gather(torch.ones(1))
        return True

    assert on_ranks(2, program, timeout_s=0.2)[0] is True
