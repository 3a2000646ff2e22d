"""A handle between hosts, member by member and channel by channel, counted from the inputs of all ranks."""

from __future__ import annotations

import pytest
import torch

from anyep.compat import deep_ep
from tests.compat.v1_oracle import E, arrival, make_inputs, on_ranks, rows_of, same_bits, send

RANKS, PER_HOST, CHANNELS = 4, 2, 3
HOSTS = RANKS // PER_HOST


@pytest.fixture(autouse=True)
def hosts(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(PER_HOST))


def reached(given):
    """Return which ranks each of a rank's tokens goes to, as sets."""
    owner = torch.where(given.topk_idx < 0, -1, given.topk_idx // (E // RANKS))
    return [set(row) - {-1} for row in owner.tolist()]


def length(given):
    """Return how many consecutive tokens a channel has."""
    return max(1, -(-len(given.x) // CHANNELS))


def before(flags, channel, given):
    """Return how many flagged tokens stand in channels before this one."""
    return sum(flags[: channel * length(given)])


def goes(given, destination, group):
    """Return for each token whether it goes to a rank, or a host, of that number."""
    return [any(rank // group == destination for rank in ranks) for ranks in reached(given)]


def check_sent(handle, mine):
    _, host_sent, sent, *_, host_head, _ = handle
    for group, prefix in ((1, sent), (PER_HOST, host_sent)):
        for destination in range(RANKS // group):
            flags = goes(mine, destination, group)
            assert prefix[destination].tolist() == [before(flags, c + 1, mine) for c in range(CHANNELS)]
    for host in range(HOSTS):
        flags = goes(mine, host, PER_HOST)
        for token, going in enumerate(flags):
            channel = token // length(mine)
            assert host_head[token, host] == (sum(flags[channel * length(mine) : token]) if going else -1)


def check_received(handle, given, rank):
    _, _, _, host_received, host_ends, starts, ends, meta, _, nvl_head = handle
    there = arrival(given, rank)
    flags = [goes(one, rank, 1) for one in given]
    first = 0
    for source, one in enumerate(given):
        assert starts[source].tolist() == [first + before(flags[source], c, one) for c in range(CHANNELS)]
        first += sum(flags[source])
        assert int(ends[source]) == first
    for host in range(HOSTS):
        sources = range(host * PER_HOST, (host + 1) * PER_HOST)
        wanted = [sum(before(flags[s], c + 1, given[s]) for s in sources) for c in range(CHANNELS)]
        assert host_received[host].tolist() == wanted
        assert int(host_ends[host]) == int(ends[sources[-1]])
    assert meta.view(torch.int32).tolist() == [[s // PER_HOST, 1 << rank % PER_HOST] for s in there.source]
    own, other = nvl_head[:, rank % PER_HOST], nvl_head[:, 1 - rank % PER_HOST]
    assert own.tolist() == list(range(len(there.token)))
    assert (other == -1).all()


@pytest.mark.parametrize("tokens", [[5, 33, 12, 8], [0, 7, 1, 0]])
def test_every_channel_of_every_member_between_hosts(tokens):
    given = make_inputs(tokens)

    def rank_main(buffer):
        mine = given[buffer.rank]
        *_, handle, _ = send(buffer, mine, config=deep_ep.Config(2 * CHANNELS))
        inside, *numbers = handle
        assert inside.dtype == torch.bool
        assert [ranks.nonzero().flatten().tolist() for ranks in inside] == [sorted(ranks) for ranks in reached(mine)]
        assert [one.dtype for one in numbers] == [torch.int32] * 6 + [torch.uint8] + [torch.int32] * 2
        check_sent(handle, mine)
        check_received(handle, given, buffer.rank)

    on_ranks(RANKS, rank_main)


@pytest.mark.parametrize("tokens", [[5, 33, 12, 8], [0, 7, 1, 0], [6, 9, 4]])
def test_rows_between_hosts_come_in_the_order_of_one_host(tokens):
    given = make_inputs(tokens)

    def rank_main(buffer):
        x, idx, weights, counts, handle, _ = send(buffer, given[buffer.rank])
        there = arrival(given, buffer.rank)
        assert same_bits(x, rows_of(given, buffer.rank, lambda one: one.x))
        assert same_bits(idx, there.topk_idx)
        assert same_bits(weights, there.topk_weights)
        assert counts == there.counts
        assert len(handle) == 10
        again = buffer.dispatch(given[buffer.rank].x.float(), handle=handle)
        assert same_bits(again[0], rows_of(given, buffer.rank, lambda one: one.x.float()))
        assert again[1:5] == (None, None, None, None)

    on_ranks(len(tokens), rank_main)


@pytest.mark.parametrize("per_host", [8, 2])
@pytest.mark.parametrize("tokens", [[5, 0, 3, 0], [0, 0, 0, 0]])
def test_ranks_that_send_or_receive_nothing_have_members_too(tokens, per_host, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    given = make_inputs(tokens)
    for one in given:
        one.topk_idx[:] = torch.where(one.topk_idx < 0, -1, one.topk_idx % 3)  # rank 0's experts alone

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, weights, _, handle, _ = send(buffer, mine)
        members = tuple(handle)
        for one in members:  # as programs that log or send them do
            assert one.contiguous().view(torch.uint8).numel() == one.nbytes
        assert (
            len(members[3 if per_host == 8 else 7])
            == len(x)
            == (len(arrival(given, 0).token) if not buffer.rank else 0)
        )
        copies = tuple(one.clone() for one in members)
        expected = buffer.combine(x, handle, weights)[:2]
        found = buffer.combine(x, copies, weights)[:2]
        assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))
        assert same_bits(buffer.dispatch(mine.x, handle=copies)[0], x)

    on_ranks(RANKS, rank_main)
