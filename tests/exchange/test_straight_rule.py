"""When rows go straight to another host's ranks: by the bytes that cross in addition, up to a limit."""

from __future__ import annotations

import pytest

from anyep.exchange.straight_rule import StraightRule, most_bytes_for

RULE = StraightRule(most_bytes=1000, spare_bytes=100, reason="a test")


@pytest.mark.parametrize(
    ("there", "back", "pays"),
    [
        ((900, 900), (1000, 1000), True),
        ((900, 850), (1000, 950), True),
        ((900, 850), (1000, 949), False),
        ((1001, 1001), (10, 10), False),
        ((10, 10), (1001, 1001), False),
        ((500, 600), (700, 500), True),
    ],
    ids=["nothing more", "just as much", "a byte too much", "too many there", "too many back", "less there"],
)
def test_straight_pays_up_to_as_many_more_bytes_as_cross_while_somebody_forwards(there, back, pays):
    assert RULE.pays(there, back) is pays


def test_what_the_caller_asked_for_is_a_limit_alone():
    given = StraightRule(most_bytes=1000, spare_bytes=None, reason="a test")
    assert given.pays((1000, 1), (1000, 1))
    assert not given.pays((1001, 1001), (1, 1))


def test_what_all_ranks_together_send_straight_to_one_stays_bounded():
    assert all(ranks * most_bytes_for(ranks) <= 64 << 20 for ranks in (1, 8, 64, 100, 5000))
