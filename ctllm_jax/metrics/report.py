"""`ctllm report`: one page with the curves of training runs, from what they have written so far."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from ctllm_jax.common.files import as_path, write_atomic
from ctllm_jax.metrics.card import cards, keep_what_was_filled_in
from ctllm_jax.metrics.report_page import page
from ctllm_jax.metrics.run_record import RunRecord, read_run


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What `ctllm report` shows."""

    runs: tuple[str, ...]  # run directories
    smooth: float  # [share] of a training curve that the mean around a point reaches over to both sides (0: none)
    card: bool  # MODEL_CARD.md and DATA_CARD.md as well, of one run
    scores: tuple[str, ...]  # finished folders of `ctllm eval` for the model card

    def __post_init__(self):
        if not self.runs:
            raise ValueError("give at least one run directory: ctllm report RUN [RUN ...]")
        if not 0 <= self.smooth <= 1:
            raise ValueError(f"smooth {self.smooth} is not a share of a curve, from 0 to 1")
        if self.card and len(self.runs) > 1:
            raise ValueError("a card is of one run: ctllm report RUN --card")
        if self.scores and not self.card:
            raise ValueError("scores are for a card: add --card")


def run(config: ReportConfig, workdir: str | None) -> dict:
    """Writes report.html, and cards if asked for, into `workdir` or the first run's folder; returns {"report": path}.

    Raises:
      UserError: a folder is no run, or an evaluation is not finished.
    """
    runs = read_runs(config.runs)
    path = as_path(workdir or config.runs[0]) / "report.html"
    written = {path: page(runs, config.smooth)}
    if config.card:
        for name, text in cards(config.runs[0], config.scores).items():
            keep_what_was_filled_in(path.with_name(name), text)
            written[path.with_name(name)] = text
    for file, text in written.items():
        write_atomic(file, text)
        print(f"report: {file}")
    return {"report": str(path)}


def read_runs(folders: Sequence[str | os.PathLike]) -> list[RunRecord]:
    """What is in several run directories, under names that differ; UserError where one is none."""
    return [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[str | os.PathLike]) -> list[str]:
    """The folders' own names, or whole paths where two are called the same."""
    names = [pathlib.Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
