"""What a run directory holds so far, read for a report: finished, cut short, or still being written."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
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


def follow(folder: str | os.PathLike, name: str, every: float = 2.0, patience: float = 600.0) -> Iterator[RunRecord]:
    """What is in a run directory, each time that it has logged something new, until it has finished.

    Args:
      folder: which need not be there yet.
      name: as of `read_run`.
      every: seconds between two looks.
      patience: seconds without anything new after which the run is given up.

    Raises:
      UserError: no run has begun there within the patience; the folder is something else.
    """
    root, seen, since = pathlib.Path(folder), None, time.monotonic()
    while True:
        over = (root / "manifest.json").exists()  # before its lines are read, so that none is missing in the end
        if (root / "stage.json").exists():
            run = read_run(root, name)
            held = (run.state == "finished", sum(map(len, run.entries.values())))
            if held != seen:
                seen, since = held, time.monotonic()
                yield run
            if over:
                return
        if time.monotonic() - since > patience:
            if seen is None:
                raise UserError(f"{folder}: no run has begun here in {patience:.0f} s")
            return
        time.sleep(every)


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
