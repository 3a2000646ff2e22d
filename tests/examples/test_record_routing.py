"""The example that makes the shipped trace: its layer is right, it learns, and the same steps give the same file."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch.nn import functional

from anyep.layout.placement import even_placement
from anyep.layout.trace_file import RoutingTrace, TraceEntry

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def torch_as_it_was():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("record_routing")


@pytest.fixture
def tiny_moe(example):
    return importlib.import_module("tiny_moe")


@pytest.fixture
def sizes(tiny_moe):
    return tiny_moe.Sizes(
        hidden=16, num_heads=2, num_experts=12, num_topk=3, expert_width=4, shared_width=8, context=32, batch=4
    )


def plain_experts(layer, x, capacity):
    """Token by token and expert by expert; an expert takes its first ``capacity`` tokens."""
    affinity = torch.sigmoid(x @ layer.gate.weight.T)
    chosen = (affinity + layer.bias).topk(layer.sizes.num_topk).indices
    taken = [0] * layer.sizes.num_experts
    outputs = []
    for token, experts in enumerate(chosen.tolist()):
        total = sum(affinity[token, expert] for expert in experts)
        output = layer.shared(x[token])
        for expert in experts:
            taken[expert] += 1
            if taken[expert] <= capacity:
                inner = functional.silu(x[token] @ layer.up[expert])
                output = output + affinity[token, expert] / total * (inner @ layer.down[expert])
        outputs.append(output)
    return torch.stack(outputs)


@pytest.mark.parametrize("factor", [100.0, 1.0, 0.25])
def test_the_grouped_layer_is_the_plain_one(tiny_moe, sizes, monkeypatch, factor):
    monkeypatch.setattr(tiny_moe, "CAPACITY_FACTOR", factor)
    torch.manual_seed(0)
    layer = tiny_moe.Experts(sizes).double().eval()
    layer.bias += 0.1 * torch.randn(12)
    x = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(40, 16, dtype=torch.float64)
    inputs = (x, *layer.parameters())
    output, expected = layer(x), plain_experts(layer, x, math.ceil(factor * 40 * 3 / 12))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    for found, wanted in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_the_bias_moves_against_the_load(tiny_moe, sizes):
    torch.manual_seed(0)
    layer = tiny_moe.Experts(sizes)
    chosen = []
    layer.listener = lambda idx, weights: chosen.append(idx)
    layer(torch.randn(40, 16))
    load = torch.bincount(chosen[0].flatten(), minlength=12)
    assert load.max() > 10 > load.min()
    assert torch.equal(layer.bias, tiny_moe.BIAS_STEP * torch.sign(10.0 - load))
    before = layer.bias.clone()
    layer.eval()(torch.randn(40, 16))
    assert torch.equal(layer.bias, before)


def test_recorded_weights_are_sorted_and_coarse(example):
    idx, weights = example.by_weight(torch.tensor([[4, 9, 2]]), torch.tensor([[0.1, 0.53125 + 1e-4, 0.3]]))
    assert idx.tolist() == [[9, 2, 4]]
    assert weights.tolist() == [[0.5625, 0.3125, 0.1015625]]
    assert torch.equal(weights.half().float(), weights)


def test_the_corpus_leaves_tests_out_and_holds_files_back(example, tmp_path):
    for name in ("b.py", "a/z.py", "a/test/x.py", "site-packages/y.py", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"# {name}\n")
    corpus = example.read_corpus(tmp_path)
    assert corpus.num_files == 2
    assert bytes(corpus.held_out.tolist()) == b"# a/z.py\n"
    assert bytes(corpus.learned.tolist()) == b"# b.py\n"


def test_held_out_batches_are_neighbouring_windows(example, sizes):
    held_out = (torch.arange(1000) % 251).to(torch.uint8)
    corpus = example.Corpus(learned=held_out, held_out=held_out, num_files=1)
    batches = list(example.held_out_batches(corpus, sizes, 300))
    assert [tuple(batch.shape) for batch in batches] == [(4, 33)] * 3
    assert torch.equal(batches[0][:, :-1].flatten(), held_out[:128].long())
    assert torch.equal(batches[0][:-1, -1], batches[0][1:, 0])
    assert batches[2][0, 0] == held_out[(1000 - 128 - 1) * 2 // 3]


def test_it_learns(example, tiny_moe, sizes):
    example.make_deterministic(0)
    text = torch.frombuffer(bytearray(EXAMPLES.joinpath("record_routing.py").read_bytes()), dtype=torch.uint8)
    corpus = example.Corpus(learned=text, held_out=text, num_files=1)
    sizes = dataclasses.replace(sizes, learning_rate=2e-2)
    model = tiny_moe.Model(sizes)
    before = example.bits_per_byte(model, example.held_out_batches(corpus, sizes, 1024))
    assert 7 < before < 10
    assert len(list(example.training_steps(model, corpus, sizes, 60))) == 60
    assert example.bits_per_byte(model, example.held_out_batches(corpus, sizes, 1024)) < before - 3


def test_the_skew_table(example):
    idx = np.array([[0, 1], [0, 3], [0, 2], [1, 0]], np.int32)
    entry = TraceEntry(layer=2, step=0, rank=0, topk_idx=idx, topk_weights=np.ones((4, 2), np.float16))
    table = example.skew_table(RoutingTrace(num_experts=4, num_topk=2, entries=(entry,)), num_ranks=2)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    cells = [line.replace("│", " ").split() for line in capture.get().splitlines() if "│" in line]
    assert cells == [["2", "4", "2.00", "1.50", "1.50"], ["uniform", "1.67"]]


def test_ranks_that_uniform_routing_reaches(example):
    placement = even_placement(256, 8)
    assert example.uniform_ranks(placement, 1) == pytest.approx(1)
    assert example.uniform_ranks(placement, 256) == pytest.approx(8)
    random = np.random.default_rng(0)
    drawn = random.random((20000, 256)).argpartition(8, axis=1)[:, :8]
    reached = np.mean([len(set(row)) for row in (drawn // 32).tolist()])
    assert example.uniform_ranks(placement, 8) == pytest.approx(reached, abs=0.03)


def test_the_command_gives_the_same_file_again(example, tmp_path):
    contents = []
    for name in ("a.npz", "b.npz"):
        arguments = f"--steps 2 --tokens 2049 --experts 12 --topk 3 --seed 5 --out {tmp_path / name}".split()
        result = CliRunner().invoke(example.main, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        assert "bits per byte before training" in result.output
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    trace = RoutingTrace.load(tmp_path / "a.npz")
    assert (trace.num_experts, trace.num_topk, trace.layers) == (12, 3, (0, 1))
    assert [e.num_tokens for e in trace.entries] == [2048] * 4
    assert "2 steps of 2048 tokens" in trace.description


def test_minutes_end_the_training(example, tmp_path):
    arguments = f"--steps 1000 --minutes 0 --tokens 1 --experts 8 --topk 1 --out {tmp_path / 'a.npz'}".split()
    result = CliRunner().invoke(example.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert ", 1 steps of" in RoutingTrace.load(tmp_path / "a.npz").description
