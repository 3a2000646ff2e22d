"""Numbers that ElasticBuffer tells: domains, sizes, SMs and queue pairs."""

from __future__ import annotations

import math

import pytest
import torch

import anyep
from anyep.compat import deep_ep
from anyep.compat.deep_ep import ElasticBuffer
from tests.compat.v2_world import MIB2, World

MIB = 1 << 20


def group_of(num_ranks):
    return anyep.local_group(num_ranks)[0]


def test_domains_are_one_host_unless_the_environment_divides_it(monkeypatch):
    assert deep_ep.get_physical_domain_size(group_of(4)) == (1, 4)
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    assert deep_ep.get_physical_domain_size(group_of(4)) == (2, 2)
    assert deep_ep.get_logical_domain_size(group_of(4)) == (2, 2)
    assert deep_ep.get_logical_domain_size(group_of(4), allow_hybrid_mode=False) == (1, 4)
    assert deep_ep.get_physical_domain_size(group_of(2)) == (1, 2)


def test_hosts_of_different_sizes_are_refused(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    with pytest.raises(RuntimeError, match="ANYEP_RANKS_PER_HOST=2 must divide"):
        deep_ep.get_physical_domain_size(group_of(3))


def test_the_size_hint_is_the_number_that_users_print(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "8")
    assert ElasticBuffer.get_buffer_size_hint(group_of(16), 4096, 7168, 8) == 1218445312
    wide = ElasticBuffer.get_buffer_size_hint(group_of(64), 4096, 7168, 8)
    assert round(wide / 2**30, 2) == 4.53
    assert ElasticBuffer.get_buffer_size_hint(group_of(8), 8192, 7168, 8) == 904 * MIB


def rows(num_bytes):
    return -(-num_bytes // MIB2) * MIB2


BF16, FP8, BACK = 2 * 512 + 128, 512 + 64 + 128, 2 * 512 + 64
"""Bytes of a row with H=512, K=8: dispatched, dispatched with scales, combined."""


@pytest.mark.parametrize(
    ("per_host", "options", "expected"),
    [
        ("4", {}, max(4 * BF16, 4 * BACK)),
        ("4", {"use_fp8_dispatch": True}, max(4 * FP8, 4 * BACK)),
        ("4", {"allow_multiple_reduction": False}, max(4 * BF16, 8 * BACK)),
        ("2", {"allow_hybrid_mode": False}, max(5 * BF16, 8 * BACK)),
        ("2", {"allow_hybrid_mode": False, "allow_multiple_reduction": False}, (4 * 8 + 8) * BACK),
    ],
)
def test_size_hints_of_the_direct_mode(monkeypatch, per_host, options, expected):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", per_host)
    assert ElasticBuffer.get_buffer_size_hint(group_of(4), 4096, 512, 8, **options) == rows(4096 * expected)


def test_size_hints_of_the_hybrid_mode(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    between = 2 * (4096 + 1280)
    several = ElasticBuffer.get_buffer_size_hint(group_of(4), 4096, 512, 8)
    assert several == rows(max((5 * 4096 + between) * BF16, (6 * 4096 + between) * BACK))
    once = ElasticBuffer.get_buffer_size_hint(group_of(4), 4096, 512, 8, allow_multiple_reduction=False)
    assert once == rows((24 * 4096 + between) * BACK)


def test_without_top_k_the_largest_is_assumed():
    hint = ElasticBuffer.get_buffer_size_hint
    assert hint(group_of(4), 4096, 512) == hint(group_of(4), 4096, 512, 32)


def test_hints_for_the_other_uses_of_a_buffer():
    assert ElasticBuffer.get_engram_storage_size_hint(5000, 1000, 3000) == (rows(2016 * 3000), rows(2016 * 5000))
    assert ElasticBuffer.get_engram_storage_size_hint(5000, 1000, 3000, torch.float8_e4m3fn)[1] == rows(1024 * 5000)
    assert ElasticBuffer.get_pp_buffer_size_hint(MIB + 1, 3) == rows((MIB + 32) * 12)
    session = ElasticBuffer.get_agrs_num_max_session_bytes
    assert session(group_of(2), (3, 5), torch.bfloat16) == 64
    assert session(group_of(2), [(3, 5), (1,)], torch.float32) == 128 + 32
    assert ElasticBuffer.get_agrs_buffer_size_hint(group_of(2), MIB2 + 1) == 2 * MIB2


def sms(*args, num_ranks=4, **options):
    world = World(num_tokens=(0,) * num_ranks)
    return world.run(lambda buffer, _: (buffer.get_theoretical_num_sms(*args), buffer), **options)[0][0]


def test_the_direct_model_follows_the_link_inside_the_host():
    """E=256, K=8, R=4: copies = 4 (1 - C(192, 8) / C(256, 8)); read 1 / copies, write 1, link 3 / 4 of a row."""
    copies = 4 * (1 - math.comb(192, 8) / math.comb(256, 8))
    wanted = 160 / 0.75 * max(1 / copies / 200, 1 / 50)
    assert sms(256, 8, 0, 0, 160) == -(-math.ceil(1.25 * wanted) // 2) * 2


def test_the_hybrid_model_follows_the_slower_link(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    copies = 4 * (1 - math.comb(192, 8) / math.comb(256, 8))
    hosts = 2 * (1 - math.comb(128, 8) / math.comb(256, 8))
    wanted = 50 / (hosts / 2 / copies) * max((1 + hosts) / copies / 200, ((1 + hosts / 2) / copies + 1) / 50)
    assert sms(256, 8, 0, 50, 450) == -(-math.ceil(1.25 * wanted) // 2) * 2


def test_sms_are_even_at_least_four_and_not_more_than_there_are():
    assert sms(256, 8, 0, 0, 1) == 4
    assert sms(256, 8, 0, 0, 100000) == 132
    assert sms(256, 8, 0, 0, 1, prefer_overlap_with_compute=False) == 64
    assert sms(256, 8, num_ranks=1) == 132


def test_what_the_model_does_not_know_is_an_assertion():
    with pytest.raises(AssertionError, match="num_scaleout_topk"):
        sms(256, 8, 1)
    with pytest.raises(AssertionError, match="multiple of 4"):
        sms(255, 8)


def test_queue_pairs_follow_the_mode_and_what_was_allocated():
    def rank_main(buffer, _):
        return buffer.num_allocated_qps, [buffer.get_theoretical_num_qps(n) for n in (4, 12)]

    world = World(num_tokens=(0,))
    assert world.run(rank_main) == [(129, [65, 129])]
    assert world.run(rank_main, num_allocated_qps=70) == [(70, [65, 70])]
    assert world.run(rank_main, allow_hybrid_mode=False) == [(17, [4, 9])]
