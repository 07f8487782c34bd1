"""The picture of `ctllm table`: a panel for each benchmark, chance as a dashed line."""

import io
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ctllm_jax.common.files import write_atomic

ACROSS = 4  # panels side by side, at most
OURS, OTHERS = "#c8102e", "#8a8f98"


def draw(
    path: str | os.PathLike, rows: Sequence[Any], columns: Sequence[str], chance: Mapping[str, float], curves: bool
) -> None:
    """Writes a PNG of a table's scores.

    Without matplotlib (the extra `plots`) nothing is written, which standard error says.

    Args:
      path: the file.
      rows, columns, chance: as `leaderboard` has them; scores in per cent.
      curves: scores over tokens, one line for ours and one for what was reported, whose axis is logarithmic when it
        has both; otherwise a mark for each model.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        print(f"table: {path} is not drawn: pip install 'ctllm-jax[plots]'", file=sys.stderr)
        return
    across = min(ACROSS, len(columns))
    down = math.ceil(len(columns) / across)
    high = 2.4 if curves else 0.9 + 0.22 * len(rows)
    figure = Figure(figsize=(3.1 * across + (0 if curves else 1.2), high * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False, sharey=not curves)
    for panel in panels.flat[len(columns) :]:
        panel.set_visible(False)
    for panel, column in zip(panels.flat, columns, strict=False):
        panel.set_title(column, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.25)
        (_curve if curves else _marks)(panel, rows, column, chance.get(column))
        if curves:
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    if curves:
        handles: dict[str, Any] = {}
        for panel in panels.flat:
            own, labels = panel.get_legend_handles_labels()
            handles |= dict(zip(labels, own, strict=True))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=130)
    write_atomic(path, held.getvalue())


def _marks(panel: Any, rows: Sequence[Any], column: str, chance: float | None) -> None:
    """Models from top to bottom, scores from left to right."""
    for height, row in enumerate(reversed(rows)):
        if column in row.scores:
            score, error = row.scores[column]
            panel.errorbar(score, height, xerr=error, fmt="o", ms=4, color=OURS if row.ours else OTHERS)
    panel.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    if chance is not None:
        panel.axvline(chance, ls="--", lw=1, color="black")
    panel.set_xlabel("per cent", fontsize=7)


def _curve(panel: Any, rows: Sequence[Any], column: str, chance: float | None) -> None:
    """Scores over the tokens that a model had seen."""
    for ours in (False, True):
        points = [(row.tokens, *row.scores[column]) for row in rows if row.ours == ours and column in row.scores]
        points = [point for point in points if point[0] is not None]
        if points:
            tokens, scores, errors = zip(*points, strict=True)
            errors = [error or 0.0 for error in errors] if ours else None
            panel.errorbar(
                tokens, scores, yerr=errors, fmt="o-", ms=3, lw=1.2, color=OURS if ours else OTHERS,
                label="ours" if ours else "CT-LLM",
            )  # fmt: skip
    if chance is not None:
        panel.axhline(chance, ls="--", lw=1, color="black", label="chance")
    if {row.ours for row in rows if column in row.scores and row.tokens} == {True, False}:
        panel.set_xscale("log")
    panel.set_xlabel("tokens", fontsize=7)
    panel.set_ylabel("per cent", fontsize=7)
