"""Experts on ranks."""

import numpy as np
import pytest

from anyep.layout.placement import even_placement, mapped_placement


def test_even_placement_gives_the_first_ranks_one_more():
    placement = even_placement(10, 4)
    assert placement.expert_rank_E.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert placement.expert_local_E.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1]
    assert placement.experts_per_rank_R.tolist() == [3, 3, 2, 2]


def test_more_ranks_than_experts():
    placement = even_placement(2, 5)
    assert placement.experts_per_rank_R.tolist() == [1, 1, 0, 0, 0]


def test_mapped_placement_numbers_experts_in_ascending_order():
    placement = mapped_placement([2, 0, 2, 2, 0], 3)
    assert placement.expert_local_E.tolist() == [0, 0, 1, 2, 1]
    assert placement.experts_per_rank_R.tolist() == [2, 0, 3]


@pytest.mark.parametrize("bad", [3, -1])
def test_mapped_placement_refuses_a_rank_outside(bad):
    with pytest.raises(ValueError, match=f"expert 1 on rank {bad}; ranks are 0 to 2"):
        mapped_placement([0, bad, 2], 3)


def test_placements_agree_where_both_can_say_it():
    even = even_placement(7, 3)
    mapped = mapped_placement(even.expert_rank_E.tolist(), 3)
    assert np.array_equal(even.expert_local_E, mapped.expert_local_E)
