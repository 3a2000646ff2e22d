"""The model that trains: it learns, alike on any number of ranks, and goes on where it stopped."""

from __future__ import annotations

import email
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import anyep
from anyep.testing.processes import run_processes

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TEXT = Path(email.__file__).parent  # not this project's own text: curves would change with every line of it
SIZES = {"hidden": 32, "layers": 2, "experts": 8, "width": 16, "context": 32, "batch": 8}
OPTIONS = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]


@pytest.fixture(scope="module", autouse=True)
def on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield


@pytest.fixture(scope="module")
def example(on_path):
    return importlib.import_module("train_bytes")


@pytest.fixture(scope="module")
def plan(example):
    return example.Plan(sizes=example.Sizes(**SIZES), steps=100, text=TEXT, evaluate_every=50, progress=False)


@pytest.fixture(scope="module")
def curves(example, plan):
    """The whole training on 1, 2 and 4 rank processes."""
    return {ranks: example.train_here(ranks, plan) for ranks in (1, 2, 4)}


def difference(one, other):
    return max(abs(a - b) / a for a, b in zip(one, other, strict=True))


def test_it_learns(curves):
    for history in curves.values():
        assert history.steps == 100
        assert 7.8 < history.bits[0] < 9.0  # it knows nothing: about 8 bits
        assert history.bits[-1] < 0.65 * history.bits[0]
        (_, first), (_, last) = history.held_out
        assert last < first


def test_the_curve_is_the_same_on_any_number_of_ranks(curves):
    for ranks in (2, 4):
        assert difference(curves[1].bits, curves[ranks].bits) < 1e-3
        assert curves[ranks].held_out[-1][1] == pytest.approx(curves[1].held_out[-1][1], rel=1e-3)


@pytest.fixture(scope="module")
def checkpoints(example, plan, tmp_path_factory):
    """Half of the training on 2 ranks, with a checkpoint on the way."""
    folder = tmp_path_factory.mktemp("checkpoints")
    example.train_here(2, replace(plan, steps=50, checkpoint=folder, save_every=30))
    return folder


def test_checkpoints_are_whole(checkpoints):
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000030", "step-000050"]
    names = {path.name for path in (checkpoints / "step-000050").iterdir()}
    assert names == {"replicated.pt", "experts-0.pt", "experts-1.pt"}


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_resumed_training_is_the_uninterrupted_one(example, plan, curves, checkpoints, ranks):
    """Bit for bit on as many ranks. On others to rounding, until it grows: a token may choose another expert for it."""
    history = example.train_here(ranks, replace(plan, checkpoint=checkpoints, resume=True))
    assert history.steps == 100
    if ranks == 2:
        assert history.bits == curves[2].bits
        assert history.held_out == curves[2].held_out
    else:
        assert difference(history.bits[:75], curves[2].bits[:75]) < 1e-5
    for path in checkpoints.glob("step-000100*/*"):
        path.unlink()
    (checkpoints / "step-000100").rmdir()


def test_a_checkpoint_of_another_model_is_refused(example, plan, checkpoints):
    other = replace(plan, sizes=replace(plan.sizes, width=24), checkpoint=checkpoints, resume=True)
    with pytest.raises(example.click.ClickException, match="is of another training: width 16 there, 24 here"):
        example.train_here(2, other)


def test_a_checkpoint_that_was_not_finished_is_passed_over(on_path, tmp_path):
    checkpoint = importlib.import_module("byte_checkpoint")
    for name in ("step-000100", "step-000200.partial", "step-000090"):
        (tmp_path / name).mkdir()
    assert checkpoint.find_latest(tmp_path).name == "step-000100"


def forward(group, rank, num_ranks, sizes):
    """Each sequence of this rank by itself, so that dense products have one shape on any number of ranks."""
    from byte_model import Model

    from anyep import nn

    options = {"hidden": sizes.hidden, "num_experts": sizes.experts, "num_topk": sizes.topk, "wire": "fp32"}
    text = torch.randint(256, (sizes.batch, 1, sizes.context + 1), generator=torch.Generator().manual_seed(1))
    with nn.open_pair(group, max_tokens_per_rank=sizes.context, **options) as ep, torch.no_grad():
        model = Model(ep, sizes)
        return torch.cat([model(one) for one in text[rank::num_ranks]])


def test_a_forward_pass_has_the_same_bits_on_any_number_of_ranks(example, plan):
    sizes = replace(plan.sizes, batch=4, row_by_row=True)
    whole = run_processes(1, forward, 1, sizes)[0]
    for ranks in (2, 4):
        for rank, part in enumerate(run_processes(ranks, forward, ranks, sizes)):
            assert torch.equal(part, whole[rank::ranks])


def test_rows_by_themselves_are_the_grouped_rows(on_path):
    model = importlib.import_module("byte_model")
    sizes = model.Sizes(hidden=32, experts=4, width=16)

    def rank_main(member):
        from anyep import nn

        options = {"hidden": 32, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": 9, "wire": "fp32"}
        with nn.open_pair(member, **options) as ep:
            x = torch.randn(9, 32, generator=torch.Generator().manual_seed(member.rank))
            idx = torch.arange(18).view(9, 2) % 4
            grouped = model.make_moe(ep, sizes, 1).experts
            batch = nn.dispatch(ep, x, idx, torch.ones(9, 2))
            return torch.allclose(model.RowByRow(grouped.compute)(batch), grouped.compute(batch), atol=1e-6)

    assert anyep.local_group(2).run(rank_main) == [True, True]


def test_batches_are_a_function_of_their_number(on_path):
    text = importlib.import_module("byte_text")
    corpus = text.read_corpus(TEXT, 16)
    one, again, other = (corpus.batch(number, 4, 16, seed=0) for number in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.shape == (4, 17)


def test_held_out_files_are_not_learned(on_path, tmp_path):
    text = importlib.import_module("byte_text")
    for number in range(32):
        (tmp_path / f"{number:02}.py").write_bytes(bytes([number]) * 40)
    corpus = text.read_corpus(tmp_path, 16)
    assert corpus.held_out.unique().tolist() == [15, 31]
    assert corpus.training.unique().tolist() == [number for number in range(31) if number != 15]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ranks", "3"], "--batch 8 must be a multiple of the 3 ranks"),
        (["--topk", "9"], "--topk 9 must be at most --experts 8"),
        (["--hidden", "36"], "--hidden 36 must be a multiple of 8"),
        (["--resume"], "--resume and --save-every need --checkpoint"),
        (["--steps", "0"], "'--steps'"),
        (["--json", "nowhere/curve.json"], "there is no folder nowhere"),
    ],
)
def test_bad_options(example, options, text):
    result = CliRunner().invoke(example.main, [*OPTIONS, *options])
    assert result.exit_code == 2
    assert text in " ".join(result.output.split())


@pytest.mark.parametrize("what", ["no text", "no checkpoint"])
def test_what_ranks_refuse_is_told_in_a_sentence(example, tmp_path, what):
    options = ["--text", str(tmp_path)] if what == "no text" else ["--checkpoint", str(tmp_path), "--resume"]
    result = CliRunner().invoke(example.main, [*OPTIONS, "--ranks", "2", *options])
    assert result.exit_code == 1
    assert ("0 .py files" if what == "no text" else "there is no checkpoint in") in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_under_torchrun_with_picture_and_record(tmp_path):
    pytest.importorskip("matplotlib")
    picture, record = tmp_path / "curve.png", tmp_path / "curve.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(EXAMPLES / "train_bytes.py"), *OPTIONS, "--steps", "4", "--text", str(TEXT)),
            *("--picture", str(picture), "--json", str(record)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after 4 steps on 2 ranks") == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = json.loads(record.read_text())
    assert len(written["bits"]) == 4
    assert written["versions"]["torch"] == torch.__version__


def test_a_picture_without_its_package_names_the_extra(example, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(example.main, [*OPTIONS, "--picture", str(tmp_path / "a.png")])
    assert result.exit_code == 1
    assert "anyep[pictures]" in result.output
