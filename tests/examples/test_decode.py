"""The decode example: short enough for a page, and the same layer for any number of ranks."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from anyep import local_group

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("decode")


def plain_layer(example, x, gate, shared):
    """The same layer without ranks, without FP8 and LogFMT."""
    weights, idx = (x.float() @ gate).softmax(dim=1).topk(example.TOPK)
    routed = torch.zeros(x.shape)
    for column in range(example.TOPK):
        for token, expert in enumerate(idx[:, column].tolist()):
            routed[token] += weights[token, column] * (x[token].float() @ example.expert_weights(expert))
    return x.float() + torch.tanh(x.float() @ shared) @ shared + routed


def test_one_step_is_the_plain_layer(example, monkeypatch):
    taken = []
    decode = example.decode

    def listen(ep, x, gate, shared, experts):
        out = decode(ep, x, gate, shared, experts)
        taken.append((x, gate, shared, out))
        return out

    monkeypatch.setattr(example, "decode", listen)
    monkeypatch.setattr(example, "STEPS", 1)
    local_group(2).run(example.rank_main)
    assert len(taken) == 2
    for x, gate, shared, out in taken:
        expected = plain_layer(example, x, gate, shared)
        assert (out.float() - expected).norm() < 0.03 * expected.norm()  # FP8 there, LogFMT-10 and BF16 back


def test_it_runs_as_it_is(example):
    outputs = local_group(example.RANKS).run(example.rank_main)
    assert [tuple(out.shape) for out in outputs] == [(example.TOKENS, example.HIDDEN)] * example.RANKS
    assert all(bool(out.isfinite().all()) for out in outputs)


def test_it_fits_a_page():
    assert len(EXAMPLES.joinpath("decode.py").read_text().splitlines()) <= 60
