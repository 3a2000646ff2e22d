"""RowStore: what is fetched is what was written, whoever owns it and whatever the owners do meanwhile."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

import anyep
from anyep.collectives import RowStore


def on_ranks(num_ranks, function, **options):
    def rank_main(member):
        with RowStore(member, **{"timeout_s": 20.0, **options}) as store:
            return function(store)

    return anyep.local_group(num_ranks).run(rank_main)


def rows_of(rank, n, *shape, dtype=torch.float32, version=0):
    count = n * torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(1000 * version + rank)
    return torch.randint(0, 120, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(n, *shape)


def everything(num_ranks, n, *shape, dtype=torch.float32, version=0):
    return torch.cat([rows_of(rank, n, *shape, dtype=dtype, version=version) for rank in range(num_ranks)])


def as_bytes(x):
    return x.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_rows_come_from_every_rank_bit_by_bit(num_ranks, dtype, kernels):
    def program(store):
        store.write(rows_of(store.rank, 7, 3, 5, dtype=dtype))
        indices = torch.randint(0, 7 * num_ranks, (4, 6), generator=torch.Generator().manual_seed(store.rank))
        expected = everything(num_ranks, 7, 3, 5, dtype=dtype)[indices]
        for chosen in (indices, indices.int(), indices.T.contiguous().T):
            fetched = store.fetch(chosen)
            assert fetched.shape == (4, 6, 3, 5)
            assert torch.equal(as_bytes(fetched), as_bytes(expected))

    on_ranks(num_ranks, program, kernels=kernels)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (700,), (2, 2049)])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_rows_of_any_size_and_any_number_of_indices(shape, count):
    def program(store):
        store.write(rows_of(store.rank, 4, *shape))
        indices = torch.randint(0, 8, (count,), generator=torch.Generator().manual_seed(count))
        fetched = store.fetch(indices)
        assert torch.equal(fetched, everything(2, 4, *shape)[indices])

    on_ranks(2, program)


def test_random_writes_and_fetches_of_slow_and_fast_ranks():
    """Each rank fetches as often as it likes between writes, in both ways, and always sees exactly one version."""

    def program(store):
        own = random.Random(store.rank)
        for version in range(60):
            n, width = 1 + version % 3, (1, 17, 300)[version % 7 % 3]
            store.write(rows_of(store.rank, n, width, version=version))
            table = everything(3, n, width, version=version)
            kept = []
            for _ in range(own.randrange(0, 5)):
                indices = torch.randint(0, 3 * n, (own.randrange(0, 40),))
                if own.random() < 0.5:
                    kept.append((indices, store.fetch(indices, wait=False)))
                else:
                    assert torch.equal(store.fetch(indices), table[indices])
            if own.random() < 0.1:
                time.sleep(0.002)
            for indices, pending in kept if own.random() < 0.5 else []:
                assert torch.equal(pending.wait(), table[indices])

    on_ranks(3, program)


def test_a_fetch_that_is_waited_for_after_the_next_write_has_the_rows_of_its_time():
    def program(store):
        store.write(torch.full((2, 500), 1.0))
        pending = store.fetch(torch.arange(4), wait=False)
        store.write(torch.full((2, 500), 2.0))
        return bool((pending.wait() == 1).all()), bool((store.fetch(torch.arange(4)) == 2).all())

    assert on_ranks(2, program) == [(True, True)] * 2


def test_owners_need_not_be_there():
    gone = threading.Event()

    def rank_main(member):
        with RowStore(member) as store:
            store.write(torch.full((2, 3), float(store.rank)))
            if store.rank == 0:
                assert gone.wait(20)
                return store.fetch(torch.tensor([0, 2, 3])).tolist()
        gone.set()
        return None

    assert anyep.local_group(2).run(rank_main)[0] == [[0.0] * 3, [1.0] * 3, [1.0] * 3]


def test_the_written_tensor_may_be_changed_at_once():
    def program(store):
        rows = torch.ones(3, 4)
        store.write(rows)
        rows.zero_()
        return float(store.fetch(torch.arange(6)).sum())

    assert on_ranks(2, program) == [24.0, 24.0]


def test_strided_rows_are_stored_as_they_look():
    def program(store):
        store.write(torch.arange(6.0).reshape(2, 3).T)
        return store.fetch(torch.tensor([2, 3])).tolist()

    assert on_ranks(2, program) == [[[2.0, 5.0], [0.0, 3.0]]] * 2


def test_out_takes_the_rows():
    def program(store):
        store.write(torch.ones(1, 2))
        out = torch.zeros(3, 2)
        assert store.fetch(torch.tensor([0, 1, 0]), out=out) is out
        with pytest.raises(ValueError, match=r"contiguous cpu tensor \[3, 2\]"):
            store.fetch(torch.tensor([0, 1, 0]), out=torch.zeros(2, 2))
        with pytest.raises(TypeError, match=r"torch.float32, got torch.int64"):
            store.fetch(torch.tensor([0]), out=torch.zeros(1, 2, dtype=torch.int64))
        return out.tolist()

    assert on_ranks(2, program) == [[[1.0, 1.0]] * 3] * 2


@pytest.mark.parametrize("bad", [-1, 6, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("fetch", [RowStore.fetch, lambda *args, **kw: RowStore.fetch(*args, **kw, wait=False).wait()])
def test_an_index_outside_is_named_and_nothing_is_written(bad, fetch):
    def program(store):
        store.write(torch.ones(3, 4))
        out = torch.zeros(2, 2, 4)
        with pytest.raises(ValueError, match=rf"indices\[1, 0\] is {bad}, .* rows 0 to 5 \(3 of each of 2 ranks\)"):
            fetch(store, torch.tensor([[0, 1], [bad, 2]]), out=out)
        assert not out.any()
        return float(store.fetch(torch.tensor([5])).sum())

    assert on_ranks(2, program) == [4.0, 4.0]


def test_an_empty_store_has_no_rows():
    def program(store):
        with pytest.raises(ValueError, match="nothing was written"):
            store.fetch(torch.tensor([0]))
        store.write(torch.ones(0, 4))
        with pytest.raises(ValueError, match=r"indices\[0\] is 0"):
            store.fetch(torch.tensor([0]))
        return store.fetch(torch.zeros(0, dtype=torch.int64)).shape

    assert on_ranks(2, program) == [(0, 4)] * 2


def test_ranks_that_differ_all_refuse_and_keep_the_earlier_rows():
    def program(store):
        store.write(torch.ones(2, 4))
        for other in (torch.zeros(3, 4), torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.int32)):
            with pytest.raises(ValueError, match="rows must be the same on every rank"):
                store.write(torch.zeros(2, 4) if store.rank else other)
        kept = store.fetch(torch.arange(6)).sum()
        store.write(torch.full((1, 1), 3.0))
        return float(kept), float(store.fetch(torch.arange(3)).sum())

    assert on_ranks(3, program) == [(24.0, 9.0)] * 3


def test_a_rank_without_memory_makes_all_refuse(monkeypatch):
    def program(store):
        store.write(torch.ones(2, 4))
        if store.rank == 1:
            monkeypatch.setattr(store._transport, "allocate", lambda _: refuse())
        with pytest.raises(anyep.CapacityError, match=r"rank 1 has no memory|none left"):
            store.write(torch.zeros(200, 4))
        return float(store.fetch(torch.arange(4)).sum())

    def refuse():
        raise anyep.CapacityError("none left")

    assert on_ranks(2, program) == [16.0, 16.0]


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda store: store.write(torch.tensor(1.0)), ValueError, r"rows must be \[n, \.\.\.\]"),
        (lambda store: store.write([[1.0]]), TypeError, "rows must be a torch.Tensor"),
        (lambda store: store.fetch([0]), TypeError, "indices must be a torch.Tensor"),
        (lambda store: store.fetch(torch.tensor([0.0])), TypeError, "indices must be int32 or int64"),
    ],
)
def test_a_refused_call_costs_nothing(call, kind, text):
    def program(store):
        store.write(torch.ones(1, 1))
        if store.rank == 0:
            with pytest.raises(kind, match=text):
                call(store)
        store.write(torch.full((1, 1), 5.0))
        return store.fetch(torch.tensor([1])).item()

    assert on_ranks(2, program) == [5.0, 5.0]


def test_a_rank_that_does_not_come_to_write_is_named():
    def program(store):
        if store.rank == 1:
            time.sleep(0.5)
            return None
        with pytest.raises(anyep.PeerTimeout, match="write 1: open") as caught:
            store.write(torch.ones(1))
        assert caught.value.ranks == (1,)
        with pytest.raises(anyep.ClosedError, match="PeerTimeout"):
            store.fetch(torch.tensor([0]))
        return True

    assert on_ranks(3, program, timeout_s=0.2)[0] is True
