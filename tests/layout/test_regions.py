"""Sizes known before anything is allocated."""

from hypothesis import given
from hypothesis import strategies as st

from anyep.layout.regions import RowBytes, account_step, hit_probability, row_region

ROW = RowBytes(x=7168, scales=224, topk_idx=64, topk_weights=32, token=4, y=14336)


def test_hit_probability_counts_distinct_ranks():
    assert abs(8 * hit_probability(256, 32, 8) - 5.29) < 0.01
    assert hit_probability(4, 4, 2) == 1.0
    assert hit_probability(4, 0, 2) == 0.0
    assert hit_probability(4, 3, 2) == 1.0


def test_step_at_the_published_shape():
    step = account_step(ROW, num_ranks=8, max_tokens=4096, num_topk=8, num_experts=256, local_experts=32)
    assert 21_600 < step.balanced_rows < 21_700
    assert step.worst_rows == 32768
    assert step.worst_bytes == 32768 * (7168 + 224 + 64 + 32 + 14336 + 32)


@given(st.integers(0, 1000), st.integers(1, 9999), st.integers(0, 300), st.integers(1, 32))
def test_regions_do_not_overlap(num_rows, x_bytes, scale_bytes, topk):
    row = RowBytes(x=x_bytes, scales=scale_bytes, topk_idx=8 * topk, topk_weights=4 * topk, token=4, y=2 * x_bytes)
    region = row_region(row, num_rows)
    assert region.scales_offset >= row.x * num_rows
    assert region.scales_offset % 128 == region.weights_offset % 128 == region.token_offset % 128 == 0
    assert region.data_bytes >= (row.x + row.scales) * num_rows
    assert region.weights_offset >= row.topk_idx * num_rows
    assert region.token_offset >= region.weights_offset + row.topk_weights * num_rows
    assert region.routing_bytes == region.token_offset + row.token * num_rows
