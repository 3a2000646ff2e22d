"""Raw rows with words beside them, handles made again from counts, and sums in the order of columns."""

from __future__ import annotations

import contextlib

import pytest
import torch

import anyep

R, E, K, H, P = 3, 6, 3, 24, 5
NUM_TOKENS = (5, 0, 7)
SIZES = {"hidden": H, "num_experts": E, "num_topk": K, "max_tokens_per_rank": 8, "timeout_s": 20}


class Batch:
    def __init__(self, rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        tokens = NUM_TOKENS[rank]
        self.idx = torch.rand(tokens, E, generator=generator).argsort(dim=1)[:, :K].contiguous()
        self.x = torch.randn(tokens, H, generator=generator).bfloat16()
        self.side = torch.randint(-(2**31), 2**31, (tokens, P), dtype=torch.int64, generator=generator).int()


def on_ranks(rank_main, **options):
    def thread_main(member):
        with anyep.Buffer(member, **SIZES, **options) as ep:
            return rank_main(ep, Batch(member.rank))

    return anyep.local_group(R).run(thread_main)


@pytest.fixture(params=[None, 2, 1], ids=["one host", "2+1", "1+1+1"])
def hosts(request, monkeypatch):
    """So many ranks a host; None: all on one."""
    if request.param is not None:
        monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(request.param))
    return request.param


def raw_dispatch(ep: anyep.Buffer, batch: Batch) -> anyep.Received:
    return ep.dispatch((batch.x.view(torch.int16), batch.side), batch.idx)


@pytest.mark.parametrize("eager_bytes", [0, 1 << 16])
def test_raw_rows_arrive_bit_by_bit_with_the_words_beside_them(eager_bytes):
    def rank_main(ep, batch):
        received = raw_dispatch(ep, batch)
        return received.x, received.scales

    batches = [Batch(rank) for rank in range(R)]
    results = on_ranks(rank_main, wire="raw16", side_words=P, eager_bytes=eager_bytes)
    for rank, (x, side) in enumerate(results):
        here = [(batch.idx // (E // R) == rank).any(dim=1) for batch in batches]
        expected = torch.cat([batch.x[mine] for batch, mine in zip(batches, here, strict=True)])
        assert torch.equal(x, expected.view(torch.int16))
        assert torch.equal(side, torch.cat([batch.side[mine] for batch, mine in zip(batches, here, strict=True)]))


@pytest.mark.parametrize(("wire", "dtype"), [("raw8", torch.uint8), ("raw32", torch.int32), ("raw64", torch.int64)])
def test_raw_rows_have_the_integer_type_of_their_width(wire, dtype):
    received = on_ranks(lambda ep, batch: ep.dispatch(batch.x.to(dtype), batch.idx).x, wire=wire)
    assert all(x.dtype == dtype and x.shape[1] == H for x in received)


def test_words_beside_rows_are_refused_where_the_wire_has_scales():
    with pytest.raises(ValueError, match="side_words goes with"):
        anyep.Buffer(anyep.local_group(1)[0], **SIZES, wire="bf16", side_words=1)


def test_a_raw_buffer_with_side_words_refuses_rows_without_them():
    def rank_main(ep, batch):
        with pytest.raises(TypeError, match="pair"):
            ep.dispatch(batch.x.view(torch.int16), batch.idx)

    on_ranks(rank_main, wire="raw16", side_words=P)


@pytest.mark.parametrize("straight_bytes", [0, 1 << 20])
def test_a_recalled_handle_combines_and_dispatches_like_the_first_one(hosts, straight_bytes):
    def rank_main(ep, batch):
        received = raw_dispatch(ep, batch)
        again = ep.handles.recall(batch.idx.clone(), torch.from_numpy(received.handle.announced.copy()))
        y = received.x.view(torch.bfloat16)
        sums = ep.combine(y, received.handle)
        assert torch.equal(ep.combine(y, again), sums)
        by_column = ep.combine(y, received.handle, reduce="column")
        assert torch.equal(ep.combine(y, again, reduce="column"), by_column)
        cached = ep.dispatch((batch.x.view(torch.int16), batch.side), handle=again)
        assert torch.equal(cached.x, received.x)
        assert torch.equal(cached.scales, received.scales)
        assert torch.equal(ep.combine(y, cached.handle), sums)

    on_ranks(rank_main, wire="raw16", side_words=P, straight_bytes=straight_bytes)


def test_what_is_recalled_between_hosts_does_not_go_with_the_dispatchs_own_handle(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")

    def rank_main(ep, batch):
        received = raw_dispatch(ep, batch)
        recalled = ep.handles.recall(batch.idx, torch.from_numpy(received.handle.announced))
        y = received.x.view(torch.bfloat16)
        with pytest.raises(ValueError, match="ranks disagree: the handle is of dispatch"):
            ep.combine(y, recalled if ep.rank == 1 else received.handle)
        assert torch.equal(ep.combine(y, recalled), ep.combine(y, received.handle))

    on_ranks(rank_main, wire="raw16", side_words=P)


def test_rows_of_what_was_recalled_are_forwarded_in_pieces_however_small_the_rows_that_asked(monkeypatch):
    """1 MiB might go straight, and the rows that ask are far smaller; those that follow are not."""
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")

    def rank_main(ep, batch):
        received = raw_dispatch(ep, batch)
        recalled = ep.handles.recall(batch.idx, torch.from_numpy(received.handle.announced))
        before = ep.stats().straight_rows
        ep.dispatch((batch.x.view(torch.int16), batch.side), handle=recalled)
        ep.combine(received.x.view(torch.bfloat16), recalled)
        return before, ep.stats().straight_rows - before

    outcomes = on_ranks(rank_main, wire="raw16", side_words=P, straight_bytes=1 << 20)
    assert sum(before for before, _ in outcomes) > 0
    assert [went for _, went in outcomes] == [0, 0, 0]


def test_ranks_may_mix_recalled_and_adopted_handles():
    def rank_main(ep, batch):
        received = raw_dispatch(ep, batch)
        recalled = ep.handles.recall(batch.idx, torch.from_numpy(received.handle.announced))
        y = received.x.view(torch.bfloat16)
        mixed = ep.combine(y, recalled if ep.rank == 1 else ep.handles.adopt(received.handle))
        return torch.equal(mixed, ep.combine(y, received.handle))

    assert all(on_ranks(rank_main, wire="raw16", side_words=P))


def test_a_compact_dispatch_can_be_recalled_in_the_expert_layout(hosts):
    def rank_main(ep, batch):
        compact = ep.dispatch(batch.x.view(torch.int16), batch.idx)
        expert = ep.dispatch(batch.x.view(torch.int16), batch.idx, layout="expert")
        again = ep.handles.recall(
            batch.idx, torch.from_numpy(compact.handle.announced), layout="expert", expert_alignment=4
        )
        y = expert.x.view(torch.bfloat16)
        assert torch.equal(ep.combine(y, again, reduce="expert"), ep.combine(y, expert.handle, reduce="expert"))

    on_ranks(rank_main, wire="raw16", expert_alignment=4)


def test_recall_refuses_indices_that_do_not_belong_to_the_counts(hosts):
    def rank_main(ep, batch):
        received = ep.dispatch(batch.x.view(torch.int16), batch.idx)
        with pytest.raises(ValueError, match="does not belong to these counts"):
            ep.handles.recall(torch.full((8, K), E - 1), torch.from_numpy(received.handle.announced))

    on_ranks(rank_main, wire="raw16")


@pytest.mark.parametrize("per_host", [3, 2, 1])
def test_sums_by_column_add_each_rank_where_its_last_column_stands(monkeypatch, per_host):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))

    def rank_main(ep, batch):
        idx = torch.tensor([[5, 0, 2]]) if ep.rank == 0 else torch.empty(0, K, dtype=torch.int64)
        x = torch.zeros(len(idx), H, dtype=torch.int16)
        received = ep.dispatch(x, idx)
        value = {0: 2.0**30, 1: -(2.0**30), 2: 1.0}[ep.rank]
        y = torch.full((received.x.shape[0], H), value).bfloat16()
        plain = ep.combine(y, received.handle)
        return plain, ep.combine(y, received.handle, reduce="column")

    plain, by_column = on_ranks(rank_main, wire="raw16")[0]
    assert (plain == 1).all()  # (2 ** 30 - 2 ** 30) + 1, ranks 0, 1, 2
    assert (by_column == 0).all()  # (1 + 2 ** 30) - 2 ** 30, experts 5, 0, 2


def test_groups_of_ranks_have_sums_of_their_own():
    def rank_main(ep, batch):
        received = raw_dispatch(ep, batch)
        y = received.x.view(torch.bfloat16)
        grouped = ep.handles.by_group(received.handle, 2)
        sums = ep.combine(y, grouped.handle, reduce="column").view(-1, 2, H)
        return sums, grouped.group_order

    for rank, (sums, order) in enumerate(on_ranks(rank_main, wire="raw16", side_words=P)):
        batch = Batch(rank)
        owner = batch.idx // (E // R)
        for token in range(len(owner)):
            copies = [len({int(r) for r in owner[token] if int(r) // 2 == group}) for group in range(2)]
            for group in range(2):
                assert torch.equal(sums[token, group], (copies[group] * batch.x[token].float()).bfloat16())
            last = {int(r) // 2: column for column, r in enumerate(owner[token])}
            expected = sorted(last, key=lambda group: last[group])
            assert order[token].tolist() == expected + [-1] * (2 - len(expected))


def test_a_handle_is_adopted_by_another_buffer_with_the_same_hosts_alone(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")

    def rank_main(member):
        with contextlib.ExitStack() as stack:
            member.allgather(b"")
            one, other = (stack.enter_context(anyep.Buffer(member, **SIZES, wire="raw16")) for _ in range(2))
            if member.rank == 0:
                monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "1")
            member.allgather(b"")
            apart = stack.enter_context(anyep.Buffer(member, **SIZES, wire="raw16"))
            batch = Batch(member.rank)
            received = one.dispatch(batch.x.view(torch.int16), batch.idx)
            y = received.x.view(torch.bfloat16)
            assert torch.equal(other.combine(y, other.handles.adopt(received.handle)), one.combine(y, received.handle))
            with pytest.raises(ValueError, match=r"hosts of ranks \[\[0, 1\], \[2\]\], and this one hosts of ranks"):
                apart.handles.adopt(received.handle)
            with pytest.raises(anyep.Unavailable, match="by_group sums ranks whose rows can be read here"):
                one.handles.by_group(received.handle, 2)

    anyep.local_group(R).run(rank_main)


def test_sums_by_column_are_refused_where_no_handle_keeps_that_order():
    def rank_main(ep, batch):
        received = ep.dispatch(batch.x, batch.idx)
        with pytest.raises(ValueError, match="raw wire"):
            ep.combine(received.x, received.handle, reduce="column")

    on_ranks(rank_main, wire="bf16")
