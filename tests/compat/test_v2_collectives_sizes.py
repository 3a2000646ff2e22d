"""The static size hints: bytes as upstream's formulas give them, worked out by hand."""

from __future__ import annotations

import pytest
import torch

import anyep
from anyep.compat.deep_ep.elastic_collectives import ElasticCollectives

MIB = 1 << 20


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, 1, 1), (2 * MIB, 2 * MIB)),
        ((100_000, 512, 4096), (4 * MIB, 98 * MIB)),  # 1024 bytes a row: 4 MiB, 97.66 MiB
        ((65_536, 17, 65_537, torch.float8_e4m3fn), (4 * MIB, 2 * MIB)),  # 17 -> 32 bytes a row
        ((65_537, 16, 65_536, torch.bfloat16), (2 * MIB, 4 * MIB)),
        ((0, 512, 0), (0, 0)),
    ],
)
def test_engram(arguments, expected):
    assert ElasticCollectives.get_engram_storage_size_hint(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((1, 1), 2 * MIB), ((MIB, 2), 8 * MIB), ((MIB - 31, 1), 4 * MIB), ((MIB + 1, 1), 6 * MIB)],
)
def test_pipeline(arguments, expected):
    assert ElasticCollectives.get_pp_buffer_size_hint(*arguments) == expected


@pytest.mark.parametrize(
    ("shapes", "dtype", "expected"),
    [
        ((5,), torch.float32, 64),  # 3 * 20 = 60
        ((2, 4), torch.bfloat16, 64),  # 3 * 16 = 48
        ([(5,), (2, 4)], torch.float32, 160),  # 60 -> 64, 96
        (((), (0,)), torch.float32, 32),
        (torch.Size([8]), torch.int8, 32),
    ],
)
def test_sessions(shapes, dtype, expected):
    member = anyep.local_group(3)[0]
    assert ElasticCollectives.get_agrs_num_max_session_bytes(member, shapes, dtype) == expected


@pytest.mark.parametrize(("session_bytes", "expected"), [(0, 0), (1, 2 * MIB), (2 * MIB + 1, 4 * MIB)])
def test_buffers_for_sessions(session_bytes, expected):
    member = anyep.local_group(2)[0]
    assert ElasticCollectives.get_agrs_buffer_size_hint(member, session_bytes) == expected
