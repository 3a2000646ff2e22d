"""Who is blamed, as a table: what is seen of each rank, and the one error that follows."""

from __future__ import annotations

import pytest

from anyep.errors import PeerLost, PeerTimeout
from anyep.transport.base import Blame
from anyep.transport.liveness import (
    Departure,
    Wait,
    blame_for,
    follows_from_peer,
    lost,
    silent,
    spell_ranks,
    standing_still,
)

DIED, CLOSED, FAILED = (Departure(how=how) for how in ("died", "closed", "failed"))


def blames(*ranks: int, timeout: bool) -> Departure:
    return Departure(how="failed", blame=Blame(ranks=ranks, timeout=timeout))


def wait_for(*missing: int, rank: int = 0, size: int = 6) -> Wait:
    return Wait(
        step="dispatch 12: rows",
        epoch=12,
        rank=rank,
        missing=missing,
        arrived=[other for other in range(size) if other not in missing],
        elapsed_s=1.25,
        timeout_s=30.0,
        names={3: "process 4711"},
    )


@pytest.mark.parametrize(
    ("missing", "departures", "kind", "ranks"),
    [
        ([3], {3: DIED}, PeerLost, (3,)),
        ([3], {3: CLOSED}, PeerLost, (3,)),
        ([3], {3: FAILED}, PeerLost, (3,)),
        ([1, 3, 4], {3: DIED, 4: CLOSED}, PeerLost, (3, 4)),
        ([1], {1: blames(3, timeout=True)}, PeerTimeout, (3,)),
        ([1], {1: blames(3, timeout=False)}, PeerLost, (3,)),
        ([1, 3], {1: blames(3, timeout=True)}, PeerTimeout, (3,)),
        ([1, 2, 3], {1: blames(3, timeout=True), 2: blames(3, 4, timeout=True)}, PeerTimeout, (3, 4)),
        ([1, 2], {1: blames(3, timeout=True), 2: blames(4, timeout=False)}, PeerLost, (4,)),
        ([1, 2], {1: blames(3, timeout=True), 2: DIED}, PeerLost, (2,)),
        ([1], {1: blames(0, timeout=True)}, PeerTimeout, (0,)),
    ],
)
def test_the_culprit_is_named_and_not_the_messenger(missing, departures, kind, ranks):
    error = lost(wait_for(*missing), departures)
    assert type(error) is kind
    assert error.ranks == ranks
    assert error.step == "dispatch 12: rows"
    for text in ("dispatch 12: rows (epoch 12, rank 0)", f"missing: {spell_ranks(missing)}"):
        assert text in str(error)
    for rank in ranks:
        assert f"rank {rank}" in str(error)


@pytest.mark.parametrize("departures", [{}, {2: DIED}, {2: blames(3, timeout=True)}])
def test_ranks_that_owe_nothing_are_nobodys_fault(departures):
    assert lost(wait_for(1, 3), departures) is None


@pytest.mark.parametrize(
    ("missing", "waits", "named"),
    [
        ([1], {}, [1]),
        ([1, 2], {}, [1, 2]),
        ([1], {1: [2]}, [2]),
        ([1, 2], {1: [2]}, [2]),
        ([1], {1: [2], 2: [3], 3: [4]}, [4]),
        ([1], {1: [2, 3], 3: [4]}, [2, 4]),
        ([1], {1: [0, 2]}, [2]),
        ([1, 2], {1: [2], 2: [1, 3]}, [3]),
        ([1], {1: [0]}, [1]),
        ([1, 2], {1: [2], 2: [1]}, [1, 2]),
    ],
)
def test_who_stands_still_is_at_the_end_of_all_waits(missing, waits, named):
    """Rank 0 asks. Where all wait for each other, as after calls in different orders, those that are missing are."""
    assert standing_still(missing, lambda rank: waits.get(rank, []), 0) == named


def test_a_text_tells_who_only_waits_itself():
    error = silent(wait_for(1, 2), {3: None})
    assert error.ranks == (3,)
    for text in (
        "no message from rank 1, rank 2 within timeout_s=30",
        "missing: 1-2",
        "Who is missing waits in turn, in the end for rank 3 (process 4711)",
        "look whether it is stopped, still computing, or in another call",
        "raise timeout_s if it only needs longer",
    ):
        assert text in str(error)


def test_texts_tell_who_what_and_what_to_do():
    died = str(lost(wait_for(3), {3: DIED}))
    assert "rank 3 (process 4711) died while this rank needed it. arrived: 0-2, 4-5; missing: 3" in died
    assert "make a new one" in died
    passed_on = str(lost(wait_for(1, 2), {1: blames(3, timeout=True), 2: blames(3, timeout=True)}))
    assert "rank 3 (process 4711) was silent for longer than timeout_s, as ranks 1-2 said before leaving" in passed_on
    own = str(lost(wait_for(1), {1: blames(0, timeout=True)}))
    assert "rank 0 (this rank) was silent" in own
    late = silent(wait_for(3, 4), {3: None, 4: None})
    assert late.ranks == (3, 4)
    for text in (
        "rank 3 (process 4711), rank 4",
        "timeout_s=30 (waited 1.25 s)",
        "arrived: 0-2, 5; missing: 3-4",
        "raise timeout_s",
    ):
        assert text in str(late)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([], "none"), ([4], "4"), ([2, 1, 0], "0-2"), ([0, 2, 4, 5, 9], "0, 2, 4-5, 9"), ([1, 1, 2], "1-2")],
)
def test_ranks_are_spelled_for_people(ranks, text):
    assert spell_ranks(ranks) == text


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PeerLost("", ranks=[2], step="x"), Blame(ranks=(2,), timeout=False)),
        (PeerTimeout("", ranks=[0, 2], step="x", holders=[70, 72]), Blame(ranks=(1, 2), timeout=True)),
        (PeerTimeout("", ranks=[0, 2], step="x", holders=[70, 79]), Blame(ranks=(2,), timeout=True)),
        (PeerTimeout("", ranks=[7], step="x", holders=[79]), Blame(ranks=(0,), timeout=False)),
        (PeerTimeout("", ranks=[7], step="x"), Blame(ranks=(0,), timeout=False)),
        (ValueError(), Blame(ranks=(0,), timeout=False)),
    ],
)
def test_an_error_of_another_buffer_is_told_in_the_numbers_of_this_one(error, told):
    """Rank 0 of 71, 72 and 70; a buffer may name holders that take no part here."""
    assert blame_for(error, 0, [71, 72, 70]) == told


def test_a_text_tells_who_waits_in_another_buffer():
    text = str(silent(wait_for(1), {1: 5}))
    assert "Rank 1 waits in another buffer of its process, for rank 5 of that buffer" in text


def test_what_follows_from_a_peer():
    peer = PeerLost("gone", ranks=[1], step="x")
    assert follows_from_peer(peer)
    caused, meanwhile = RuntimeError("could not go on"), RuntimeError("cleaning up failed too")
    caused.__cause__ = peer
    meanwhile.__context__ = caused
    assert follows_from_peer(caused)
    assert follows_from_peer(meanwhile)
    assert not follows_from_peer(ValueError("mine"))
    assert not follows_from_peer(None)
