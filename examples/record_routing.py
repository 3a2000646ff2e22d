"""Train a small Mixture-of-Experts language model on Python's standard library and record where its tokens go.

Run as ``python examples/record_routing.py``; the shipped trace (docs/routing-traces.md) is this script's output. The
model is in tiny_moe.py: only its routing has to be real, so the experts are tiny, but their number is not.

The same steps on the same machine, Python and torch give the same file: seeds are fixed, and one thread adds in one
order. ``--minutes`` ends training by the clock and gives that up.
"""

from __future__ import annotations

import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tiny_moe import Model, Sizes
from torch import Tensor, nn

from anyep.layout.placement import Placement, even_placement
from anyep.layout.trace_file import RoutingTrace, TraceRecorder

HELD_OUT_EVERY = 16
"""one file of so many is never trained on"""
LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
WEIGHT_BITS = 3
"""mantissa bits that recorded weights keep: a quarter less file than with 4, and a replay needs no more"""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Bytes to learn from, and bytes of other files to be judged on; uint8 [bytes]."""

    learned: Tensor
    held_out: Tensor
    num_files: int


def read_corpus(folder: Path) -> Corpus:
    """Read every Python source file below ``folder`` in sorted order, tests and installed packages left out."""
    files = [path for path in sorted(folder.rglob("*.py")) if not LEFT_OUT.intersection(path.relative_to(folder).parts)]
    learned = b"".join(path.read_bytes() for n, path in enumerate(files) if n % HELD_OUT_EVERY)
    held_out = b"".join(path.read_bytes() for path in files[::HELD_OUT_EVERY])
    return Corpus(learned=_bytes(learned), held_out=_bytes(held_out), num_files=len(files))


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows(text: Tensor, first: Tensor, context: int) -> Tensor:
    """Return int64 [n, context + 1]: the bytes that begin at each of ``first`` [n]."""
    return text[first[:, None] + torch.arange(context + 1)].long()


def held_out_batches(corpus: Corpus, sizes: Sizes, num_tokens: int) -> Iterator[Tensor]:
    """Yield batches of neighbouring windows, from places spread evenly over the held-out files."""
    num_batches = math.ceil(num_tokens / sizes.batch_tokens)
    inside = torch.arange(sizes.batch) * sizes.context
    last = len(corpus.held_out) - sizes.batch_tokens - 1
    for n in range(num_batches):
        yield windows(corpus.held_out, last * n // num_batches + inside, sizes.context)


@torch.no_grad()
def bits_per_byte(model: Model, batches: Iterator[Tensor]) -> float:
    """Return the mean over batches, as the model would do it in use."""
    model.eval()
    bits = [float(model(batch)) for batch in batches]
    model.train()
    return sum(bits) / len(bits)


def training_steps(model: Model, corpus: Corpus, sizes: Sizes, steps: int) -> Iterator[float]:
    """Train ``steps`` steps and yield each one's bits per byte."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=sizes.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    warm = min(50, 1 + steps // 10)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, 0.05 + 0.475 * (1 + math.cos(math.pi * n / steps)))
    )
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        first = torch.randint(len(corpus.learned) - sizes.context, (sizes.batch,), generator=random)
        bits = model(windows(corpus.learned, first, sizes.context))
        optimizer.zero_grad()
        bits.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        yield float(bits.detach())


def train(model: Model, corpus: Corpus, sizes: Sizes, *, steps: int, minutes: float | None, console: Console) -> int:
    """Train with a progress bar and return the steps made; ``minutes`` ends it at one that depends on the machine."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    started, smooth, step = time.monotonic(), 0.0, 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps)
        for step, bits in enumerate(training_steps(model, corpus, sizes, steps), 1):
            smooth = bits if step == 1 else 0.95 * smooth + 0.05 * bits
            progress.update(task, advance=1, description=f"step {step}: {smooth:.2f} bits per byte")
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                break
    return step


def by_weight(chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Put the heaviest expert first, as gates without a bias do, and keep WEIGHT_BITS of each weight's mantissa."""
    weights, order = weights.detach().sort(dim=1, descending=True, stable=True)
    mantissa, exponent = torch.frexp(weights)
    grid = 2 ** (WEIGHT_BITS + 1)
    return chosen.gather(1, order), torch.ldexp((mantissa * grid).round() / grid, exponent)


@torch.no_grad()
def record(model: Model, batches: Iterator[Tensor], out: Path, description: str) -> None:
    """Write the routing of every batch at every expert layer."""
    layers = model.experts()
    sizes = layers[0].sizes
    recorder = TraceRecorder(
        out,
        num_experts=sizes.num_experts,
        num_topk=sizes.num_topk,
        num_layers=len(layers),
        description=description,
    )
    model.eval()
    with recorder:
        for layer in layers:
            layer.listener = lambda chosen, weights: recorder.add(*by_weight(chosen, weights))
        for batch in batches:
            model(batch)
    for layer in layers:
        layer.listener = None


def skew_table(trace: RoutingTrace, num_ranks: int) -> Table:
    """Say how uneven each layer's load is, and how far a token's experts are spread over ``num_ranks`` ranks."""
    placement = even_placement(trace.num_experts, num_ranks)
    table = Table(
        "layer", "tokens", "expert load", "rank load", "ranks a token", title=f"max / mean, {num_ranks} ranks"
    )
    for layer in trace.layers:
        idx = np.concatenate([entry.topk_idx for entry in trace.entries if entry.layer == layer])
        load = np.bincount(idx.ravel(), minlength=trace.num_experts)
        rank_of_choice = placement.expert_rank_E[idx]
        rank_load = np.bincount(rank_of_choice.ravel(), minlength=num_ranks)
        reached = (rank_of_choice[:, :, None] == np.arange(num_ranks)).any(1).sum(1)
        uneven = [f"{loads.max() / loads.mean():.2f}" for loads in (load, rank_load)]
        table.add_row(str(layer), str(len(idx)), *uneven, f"{reached.mean():.2f}")
    table.add_row("uniform", "", "", "", f"{uniform_ranks(placement, trace.num_topk):.2f}")
    return table


def uniform_ranks(placement: Placement, num_topk: int) -> float:
    """Return how many ranks a token reaches in the mean when every choice of distinct experts is equally likely."""
    E = placement.num_experts
    missed = sum(math.comb(E - int(own), num_topk) for own in placement.experts_per_rank_R) / math.comb(E, num_topk)
    return placement.num_ranks - missed


def make_deterministic(seed: int) -> None:
    """One thread, one order of additions, one seed."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(seed)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("routing.npz"), show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=1500, show_default=True, help="Training steps.")
@click.option("--minutes", type=float, help="Stop training after so long; the result then depends on the machine.")
@click.option(
    "--tokens", type=click.IntRange(min=1), default=49152, show_default=True, help="Tokens to record, at least."
)
@click.option("--experts", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--topk", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out: Path, steps: int, minutes: float | None, tokens: int, experts: int, topk: int, seed: int) -> None:
    """Train a byte-level MoE language model and write the routing of held-out text to OUT."""
    console = Console()
    make_deterministic(seed)
    sizes = Sizes(num_experts=experts, num_topk=topk)
    corpus = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    model = Model(sizes)
    console.print(
        f"{corpus.num_files} files, {len(corpus.learned)} bytes to learn from, {len(corpus.held_out)} held out; "
        f"{sum(p.numel() for p in model.parameters())} parameters"
    )
    before = bits_per_byte(model, held_out_batches(corpus, sizes, tokens))
    made = train(model, corpus, sizes, steps=steps, minutes=minutes, console=console)
    after = bits_per_byte(model, held_out_batches(corpus, sizes, tokens))
    console.print(f"held-out text: {before:.3f} bits per byte before training, {after:.3f} after")
    record(model, held_out_batches(corpus, sizes, tokens), out, describe(sizes, steps=made, bits=after))
    console.print(skew_table(RoutingTrace.load(out), num_ranks=8), f"wrote {out}, {out.stat().st_size} bytes")


def describe(sizes: Sizes, *, steps: int, bits: float) -> str:
    """Return what the trace says about itself."""
    return (
        f"byte-level MoE language model, top-{sizes.num_topk} of {sizes.num_experts} experts, sigmoid gating with "
        f"load-balancing bias, {steps} steps of {sizes.batch_tokens} tokens on the standard library of Python "
        f"{platform.python_version()}; routing of held-out files at {bits:.2f} bits per byte"
    )


if __name__ == "__main__":
    main()
