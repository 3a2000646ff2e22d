"""The picture of a sweep: time over size, a line for each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from anyep.cli.bench.crossover import LABELS, SweepRow
from anyep.cli.bench.sweep import AUTOMATIC
from anyep.errors import Unavailable


def load_figure() -> Any:
    """Return matplotlib without a display. Unavailable, with what to install, where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unavailable(
            "a picture needs matplotlib, which is not installed: install the extra anyep[pictures], "
            "or leave out --picture"
        ) from error
    return Figure


def draw(rows: list[SweepRow], path: Path) -> None:
    """Draw medians over tokens, with the middle half of all rounds behind them."""
    figure = load_figure()(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ranks, workload = rows[0].ranks, rows[0].workload
    tokens = [row.workload.tokens for row in rows]
    for name, label in LABELS.items():
        quartiles = np.array([np.percentile(row.ways[name].us, [25, 50, 75]) for row in rows]) / 1e3
        (line,) = axes.plot(tokens, quartiles[:, 1], "o-" if name == AUTOMATIC else "s--", label=label)
        axes.fill_between(tokens, quartiles[:, 0], quartiles[:, 2], color=line.get_color(), alpha=0.15)
    axes.set_xscale("symlog" if 0 in tokens else "log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(n) for n in tokens])
    axes.set(xlabel="tokens of each rank", ylabel="dispatch + combine, ms")
    experts = f"top-{workload.topk} of {workload.experts}"
    axes.set_title(f"{ranks} ranks x {workload.hidden}, {experts}, {workload.wire} wire, routing {workload.routing}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
