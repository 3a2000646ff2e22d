"""Train a byte-level Mixture-of-Experts language model on the sources of Python's standard library.

Experts live on all ranks, everything else is data parallel. The loss is the same curve for any number of ranks::

    python examples/train_bytes.py --ranks 4 --minutes 5 --picture curve.png
    torchrun --nproc-per-node 4 examples/train_bytes.py --steps 300 --checkpoint runs/one
    python examples/train_bytes.py --ranks 2 --steps 600 --checkpoint runs/one --resume
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import click
import torch
import torch.distributed as dist
from byte_model import Sizes
from byte_training import History, Plan, rank_main, train
from rich.console import Console
from timeline import load_figure

from anyep.cli.machine_facts import available_cores, cpu_model
from anyep.errors import Unavailable
from anyep.testing.processes import RankFailed, run_processes

_REACH = 10
"""Steps before and after one that its smoothed loss is a mean of."""
_HOURS_S = 24 * 3600.0
_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


def positive(name: str, default: int, text: str) -> object:
    """Return a click option for a size."""
    return click.option(name, type=click.IntRange(1), default=default, show_default=True, help=text)


@click.command()
@positive("--ranks", 4, "Processes to start; under torchrun its own number counts.")
@positive("--steps", 1000, "Of the whole training, those before a resumption included.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Stop then, whatever the steps.")
@positive("--hidden", Sizes.hidden, "Channels of a token.")
@positive("--layers", Sizes.layers, "The first is dense.")
@positive("--experts", Sizes.experts, "Of a layer, on all ranks together.")
@positive("--topk", Sizes.topk, "Experts of a token.")
@positive("--width", Sizes.width, "Of an expert.")
@positive("--context", Sizes.context, "Bytes of a sequence.")
@positive("--batch", Sizes.batch, "Sequences of a step, of all ranks together.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--row-by-row", is_flag=True, help="Experts compute each row alone: slow, the same bits on any ranks.")
@click.option("--text", type=_FOLDER, help="Learn the .py files below another folder.")
@positive("--evaluate-every", 100, "Steps.")
@click.option("--checkpoint", type=_FOLDER, help="Write checkpoints there; the last at the end.")
@click.option("--save-every", type=click.IntRange(1), help="Steps.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint, on any number of ranks.")
@click.option("--picture", type=_FILE, help="Draw the loss.")
@click.option("--json", "record", type=_FILE, help="Write the loss, machine and versions.")
def main(ranks: int, picture: Path | None, record: Path | None, **options: object) -> None:
    """Train, tell the bits a byte of held-out files takes, and draw the loss. Exit code 1: a rank failed."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    num_ranks = int(os.environ["WORLD_SIZE"]) if launched else ranks
    plan = make_plan(num_ranks, options)
    for path in (picture, record):
        if path is not None and not path.parent.is_dir():
            raise click.UsageError(f"{path} cannot be written: there is no folder {path.parent}")
    if picture is not None:
        try:
            load_figure()
        except Unavailable as error:
            raise click.ClickException(str(error)) from error
    if launched:
        history = train_launched(plan)
        if history is None:
            return
    else:
        history = train_here(num_ranks, plan)
    finish(history, plan, num_ranks, picture, record)


def make_plan(num_ranks: int, options: dict[str, object]) -> Plan:
    """Return what to do; click.UsageError for sizes that do not go together."""
    sizes = Sizes(**{name: options.pop(name) for name in asdict(Sizes()) if name in options})
    if sizes.batch % num_ranks:
        raise click.UsageError(f"--batch {sizes.batch} must be a multiple of the {num_ranks} ranks")
    if sizes.topk > sizes.experts:
        raise click.UsageError(f"--topk {sizes.topk} must be at most --experts {sizes.experts}")
    if sizes.hidden % (2 * sizes.heads):
        raise click.UsageError(f"--hidden {sizes.hidden} must be a multiple of {2 * sizes.heads}: heads turn pairs")
    plan = Plan(sizes=sizes, **options)
    if plan.checkpoint is None and (plan.resume or plan.save_every):
        raise click.UsageError("--resume and --save-every need --checkpoint, the folder of the checkpoints")
    return plan


def train_here(num_ranks: int, plan: Plan) -> History:
    """Start rank processes on this host; return rank 0's history. click.ClickException if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        limit_s = _HOURS_S if plan.minutes is None else 60 * plan.minutes + 300
        try:
            return run_processes(num_ranks, rank_main, num_ranks, meeting, plan, timeout_s=limit_s)[0]
        except RankFailed as error:
            first = next(outcome for outcome in error.outcomes if outcome.is_root or outcome.how == "stuck")
            detail = first.text if first.error == "ValueError" else str(error)
            raise click.ClickException(detail) from error


def train_launched(plan: Plan) -> History | None:
    """Be one of torchrun's processes; return the history on rank 0 alone."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    try:
        history = train(dist.group.WORLD, plan)
        return history if dist.get_rank() == 0 else None
    finally:
        dist.destroy_process_group()


def finish(history: History, plan: Plan, num_ranks: int, picture: Path | None, record: Path | None) -> None:
    """Tell the result; write it and draw it where that was asked for."""
    console = Console()
    held_out = f"{history.held_out[-1][1]:.3f} bits a byte of held-out files" if history.held_out else "not evaluated"
    seconds = history.seconds[-1] if history.seconds else 0.0
    console.print(f"{held_out} after {history.steps} steps on {num_ranks} ranks, {seconds:.0f} s")
    if record is not None:
        lines = [
            f" {json.dumps(name)}: {json.dumps(value)}" for name, value in describe(history, plan, num_ranks).items()
        ]
        record.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        console.print(f"the loss of every step is in {record}")
    if picture is not None:
        draw(history, num_ranks, picture)
        console.print(f"the loss is drawn in {picture}")


def describe(history: History, plan: Plan, num_ranks: int) -> dict[str, object]:
    """Return everything that was measured, with what it was measured on."""
    return {
        "ranks": num_ranks,
        "sizes": asdict(plan.sizes),
        "learning_rate": plan.learning_rate,
        "machine": {"cpu": cpu_model(), "cores": available_cores()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "platform": sys.platform},
        **{
            name: [round(number, 5) for number in values] if name in ("bits", "seconds", "load") else values
            for name, values in asdict(history).items()
        },
    }


def smoothed(bits: list[float]) -> list[float]:
    """Return for each step the mean of it and up to 10 neighbours on either side, as many as it has on both."""
    reaches = [min(_REACH, step, len(bits) - 1 - step) for step in range(len(bits))]
    return [fmean(bits[step - reach : step + reach + 1]) for step, reach in enumerate(reaches)]


def draw(history: History, num_ranks: int, path: Path) -> None:
    """Draw the loss of every step, smoothed, and of the held-out files."""
    figure = load_figure()(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = range(1, history.steps + 1)
    axes.plot(steps, history.bits, color="#4c72b0", alpha=0.25, linewidth=0.8, label="batch of a step")
    axes.plot(steps, smoothed(history.bits), color="#4c72b0", label="mean of 21 steps")
    axes.plot(*zip(*history.held_out, strict=True), "o-", color="#dd8452", markersize=3, label="held-out files")
    axes.set(xlabel="steps", ylabel="bits a byte", title=f"{num_ranks} ranks, {history.seconds[-1]:.0f} s")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
