"""Buffers that cannot be made: wrong arguments, arguments that differ between ranks, and groups that are none."""

from __future__ import annotations

import pytest

import anyep

H, K, E, R = 64, 3, 8, 2


def good(**changes) -> dict:
    return {"hidden": H, "num_experts": E, "num_topk": K, "max_tokens_per_rank": 16, "timeout_s": 20} | changes


CONSTRUCTORS = [
    ("hidden 0", {"hidden": 0}, ValueError, ["hidden must be at least 1", "0"]),
    ("hidden a float", {"hidden": 64.0}, TypeError, ["hidden must be an integer", "64.0"]),
    ("hidden a bool", {"hidden": True}, TypeError, ["hidden must be an integer", "True"]),
    ("no experts", {"num_experts": 0}, ValueError, ["num_experts"]),
    ("no top-k", {"num_topk": 0}, ValueError, ["num_topk"]),
    ("negative tokens", {"max_tokens_per_rank": -1}, ValueError, ["max_tokens_per_rank"]),
    ("an unknown wire", {"wire": "fp4"}, ValueError, ["wire", "'fp8'", "'fp4'"]),
    ("unknown scales", {"wire": "fp8", "scales": "int8"}, ValueError, ["scales", "'ue8m0'", "'int8'"]),
    ("scales without fp8", {"scales": "pow2"}, ValueError, ["wire='fp8'", "'bf16'"]),
    ("a huge alignment", {"expert_alignment": 2**31}, ValueError, ["expert_alignment", "at most"]),
    ("huge static rows", {"static_rows": 2**31}, ValueError, ["static_rows", "at most 2147483647"]),
    ("huge experts", {"num_experts": 2**62}, ValueError, ["num_experts", "at most"]),
    ("a placement of words", {"placement": ["a"] * 8}, TypeError, ["placement[0]", "'a'"]),
    ("a placement that is no sequence", {"placement": 5}, TypeError, ["placement must be a sequence", "5"]),
    ("alignment 0", {"expert_alignment": 0}, ValueError, ["expert_alignment"]),
    ("negative static rows", {"static_rows": -1}, ValueError, ["static_rows"]),
    ("negative eager bytes", {"eager_bytes": -1}, ValueError, ["eager_bytes must be at least 0", "-1"]),
    ("eager bytes a float", {"eager_bytes": 1e6}, TypeError, ["eager_bytes must be an integer", "1000000.0"]),
    ("eager bytes a bool", {"eager_bytes": True}, TypeError, ["eager_bytes must be an integer", "True"]),
    ("huge eager bytes", {"eager_bytes": 2**31}, ValueError, ["eager_bytes", "at most"]),
    ("nothing in flight", {"max_in_flight": 0}, ValueError, ["max_in_flight must be at least 1", "0"]),
    ("no number in flight", {"max_in_flight": None}, TypeError, ["max_in_flight must be an integer", "None"]),
    ("in flight a text", {"max_in_flight": "4"}, TypeError, ["max_in_flight must be an integer", "'4'"]),
    ("too many in flight", {"max_in_flight": 1025}, ValueError, ["max_in_flight", "at most 1024"]),
    ("no threads", {"num_threads": 0}, ValueError, ["num_threads"]),
    ("a negative arena", {"arena_bytes": -1}, ValueError, ["arena_bytes"]),
    ("an impossible arena", {"arena_bytes": 1 << 50}, anyep.CapacityError, ["MiB"]),
    ("no time", {"timeout_s": 0}, ValueError, ["timeout_s"]),
    ("time as text", {"timeout_s": "1"}, TypeError, ["timeout_s"]),
    ("a short placement", {"placement": [0, 1]}, ValueError, ["placement", "num_experts=8", "2"]),
    ("a placement outside", {"placement": [0, 1, 2, 0, 1, 0, 1, 0]}, ValueError, ["expert 2 on rank 2", "0 to 1"]),
    ("an unknown transport", {"transport": "carrier pigeon"}, ValueError, ["transport", "carrier pigeon"]),
    ("an interface without a name", {"interface": ""}, ValueError, ["interface", "None"]),
    ("unknown kernels", {"kernels": "cobol"}, ValueError, ["kernels", "cobol"]),
]


@pytest.mark.parametrize(
    ("changes", "error_type", "words"), [row[1:] for row in CONSTRUCTORS], ids=[r[0] for r in CONSTRUCTORS]
)
def test_constructor_refuses(changes, error_type, words):
    def rank_main(member):
        with pytest.raises(error_type) as caught:
            anyep.Buffer(member, **good(**changes))
        return str(caught.value)

    for text in anyep.local_group(R).run(rank_main):
        assert all(word.lower() in text.lower() for word in words), text


def test_one_rank_with_bad_arguments_is_named_on_all():
    def rank_main(member):
        with pytest.raises(ValueError, match="hidden must be at least 1") as caught:
            anyep.Buffer(member, **good(hidden=-3 if member.rank == 1 else H))
        return str(caught.value)

    first, second = anyep.local_group(2).run(rank_main)
    assert "rank 1 could not make its buffer" in first
    assert "hidden must be at least 1" in first
    assert "hidden must be at least 1" in second


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("hidden", [64, 128]),
        ("num_experts", [8, 16]),
        ("num_topk", [3, 2]),
        ("max_tokens_per_rank", [16, 17]),
        ("wire", ["bf16", "fp8"]),
        ("expert_alignment", [1, 8]),
        ("static_rows", [None, 100]),
        ("placement", [None, [0] * 8]),
        ("max_in_flight", [4, 5]),
        ("eager_bytes", [None, 0]),
        ("scales", ["fp32", "pow2"]),
    ],
)
def test_arguments_that_differ_between_ranks(name, values):
    extra = {"wire": "fp8"} if name == "scales" else {}

    def rank_main(member):
        with pytest.raises(ValueError, match=f"{name} differs between ranks") as caught:
            anyep.Buffer(member, **good(**extra | {name: values[member.rank]}))
        return str(caught.value)

    for text in anyep.local_group(2).run(rank_main):
        assert "on rank 0" in text
        assert "on rank 1" in text


@pytest.mark.parametrize("group", [3, "world", object()], ids=["int", "str", "object"])
def test_something_that_is_no_group(group):
    with pytest.raises(TypeError, match=r"group.*local_group"):
        anyep.Buffer(group, **good())
