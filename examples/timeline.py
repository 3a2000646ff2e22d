"""A picture of who did what when: one lane a rank, computation and calls above, what travelled below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyep.errors import Unavailable

COLOURS = {"attention": "#4c72b0", "expert": "#55a868", "dispatch": "#dd8452", "combine": "#c44e52"}
_HATCHES = {0: "", 1: "///"}


@dataclass(frozen=True, kw_only=True)
class Span:
    """Something that a rank did for one micro-batch, in seconds of a clock that all ranks share.

    ``in_flight``: not a call, but all the time from where an exchange was posted to where its result was there.
    """

    kind: str
    batch: int
    begin: float
    end: float
    in_flight: bool = False


def load_figure() -> Any:
    """Return matplotlib's figure, which needs no display. Unavailable, with what to install, where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unavailable("a picture needs matplotlib, which is not installed: install anyep[pictures]") from error
    return Figure


def draw(timelines: Mapping[str, Sequence[Sequence[Span]]], path: Path) -> None:
    """Draw one panel for each named timeline, which holds every rank's spans. Unavailable without matplotlib."""
    figure_class = load_figure()
    from matplotlib.patches import Patch

    num_ranks = max(len(ranks) for ranks in timelines.values())
    size = (12, 1.2 + len(timelines) * (0.6 + 0.6 * num_ranks))
    figure = figure_class(figsize=size, layout="constrained")
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, ranks) in zip(panels, timelines.items(), strict=True):
        _draw_panel(panel, ranks)
        panel.set_title(name, loc="left")
    panels[-1].set_xlabel("ms")
    kinds = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    batches = [
        Patch(facecolor="white", edgecolor="black", hatch=hatch, label=f"micro-batch {batch}")
        for batch, hatch in _HATCHES.items()
    ]
    below = Patch(facecolor="gray", alpha=0.5, edgecolor="black", linewidth=0.3, label="under way (below)")
    figure.legend(handles=[*kinds, *batches, below], loc="outside upper right", ncols=7)
    figure.savefig(path, dpi=130)


def _draw_panel(panel: Any, ranks: Sequence[Sequence[Span]]) -> None:
    """Calls take the upper part of a rank's lane, what is in flight the lower."""
    start = min(span.begin for spans in ranks for span in spans)
    for rank, spans in enumerate(ranks):
        for span in spans:
            below, height = (rank + 0.12, 0.16) if span.in_flight else (rank - 0.4, 0.48)
            panel.broken_barh(
                [(1e3 * (span.begin - start), 1e3 * (span.end - span.begin))],
                (below, height),
                facecolor=COLOURS[span.kind],
                alpha=0.5 if span.in_flight else 1.0,
                hatch=_HATCHES[span.batch],
                edgecolor="black",
                linewidth=0.3,
            )
    panel.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
    panel.invert_yaxis()
