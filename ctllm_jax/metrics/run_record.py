"""What a run directory holds so far, read for a report: finished, cut short, or still being written."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json, read_jsonl
from ctllm_jax.metrics.definitions import KINDS
from ctllm_jax.metrics.log import read_metrics
from ctllm_jax.mirror import fetched

_LIVE = 120.0  # seconds since the last line within which an unfinished run is called at work


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run has written so far.

    Attributes:
      name: what it is called on the page.
      state: finished, at work, or not finished, in words.
      about: run.json; empty before the run has got so far.
      settings: {path: value} of its config, flat.
      entries: {kind: lines of metrics.jsonl}.
      samples: {"step", "prompt", "text"} of the in-loop evaluation.
    """

    name: str
    state: str
    about: Mapping[str, Any]
    settings: Mapping[str, Any]
    entries: Mapping[str, Sequence[Mapping]]
    samples: Sequence[Mapping]


def read_run(folder: str | os.PathLike, name: str) -> RunRecord:
    """What is in a run directory; UserError where it is none."""
    root = fetched(folder)
    if not (root / "stage.json").exists():
        raise UserError(f"{folder}: no run directory (stage.json is missing)")
    stage = read_json(root / "stage.json")
    if stage.get("stage") != "train":
        raise UserError(f"{folder}: a folder of `ctllm {stage.get('stage')}`, not of `ctllm train`")
    about = read_json(root / "run.json") if (root / "run.json").exists() else {}
    entries = {kind: read_metrics(root, kind) if (root / "metrics.jsonl").exists() else [] for kind in KINDS}
    samples = read_jsonl(root / "samples.jsonl") if (root / "samples.jsonl").exists() else []
    settings = _flat({**about["config"], "model": about["model"]} if about else stage["settings"])
    return RunRecord(name, _state(root, entries), about, settings, entries, samples)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """{path: value} of nested mappings."""
    if isinstance(value, Mapping) and value:
        return {key: leaf for name in value for key, leaf in _flat(value[name], f"{path}.{name}".strip(".")).items()}
    return {path: value}


def _state(root: pathlib.Path, entries: Mapping[str, Sequence[Mapping]]) -> str:
    if (root / "manifest.json").exists():
        return "finished"
    last = max((lines[-1]["time"] for lines in entries.values() if lines), default=None)
    if last is None:
        return "has logged nothing yet"
    ago = max(time.time() - last, 0.0)
    return f"{'at work' if ago < _LIVE else 'not finished'}, last line {_duration(ago)} ago"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
