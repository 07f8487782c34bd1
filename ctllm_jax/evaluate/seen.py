"""Scores with and without the items that training data held, as `ctllm contamination` found them."""

import os
from collections.abc import Mapping, Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, read_jsonl
from ctllm_jax.common.manifest import read_result
from ctllm_jax.evaluate.declarations import CHAT
from ctllm_jax.evaluate.summary import item_score, mean


def read_seen(folder: str | os.PathLike) -> dict[str, set[str]]:
    """{task: ids of its items that the training data held}, of every task that was looked for.

    Raises:
      UserError: no finished folder of `ctllm contamination`.
    """
    found: dict[str, set[str]] = {task: set() for task in read_result(folder, "contamination")[1]["tasks"]}
    for hit in read_jsonl(as_path(folder) / "hits.jsonl"):
        found[hit["task"]].add(hit["item"])
    return found


def scores_apart(evaluation: str | os.PathLike, seen: Mapping[str, set[str]]) -> dict[str, dict]:
    """{benchmark: {"all", "clean", "seen": {mean, stderr, n} over items, or None where there are none}}.

    Averages weigh items alike (micro), under the benchmark's own metric: subsets may be without a seen item.

    Raises:
      UserError: the evaluation is not finished, or has other items than those that were looked for.
    """
    parts, result = {}, read_result(evaluation, "eval")[1]
    for name, about in result["benchmarks"].items():
        task = name.removesuffix(CHAT)  # the same items, asked otherwise
        if task not in seen or "scores" not in about:
            continue
        paths = sorted((as_path(evaluation) / "parts" / name).glob("*.jsonl"))
        entries = [entry for path in paths for entry in read_jsonl(path)]
        strangers = seen[task] - {entry["id"] for entry in entries}
        if strangers and result["limit"] is None:
            raise UserError(
                f"{evaluation}: {name} has no item {min(strangers)!r}, which the training data holds; was it "
                "looked for in other files?"
            )
        kind, metric = about["kind"], about["headline"]
        parts[name] = {
            part: _mean(kind, metric, [entry for entry in entries if (entry["id"] in seen[task]) in wanted])
            for part, wanted in (("all", (False, True)), ("clean", (False,)), ("seen", (True,)))
        }
    return parts


def _mean(kind: str, metric: str, entries: Sequence[dict]) -> dict | None:
    points = [entry["points"] for entry in entries] if entries and "points" in entries[0] else None
    return mean([item_score(kind, metric, entry) for entry in entries], points) if entries else None


def markdown(models: Sequence[tuple[str, Mapping[str, dict]]]) -> str:
    """A table of the scores of (model, its `scores_apart`), in per cent over items."""
    lines = [["model", "benchmark", "items", "seen", "all", "clean", "seen"], ["---", "---", *["---:"] * 5]]
    for model, parts in models:
        for name, own in parts.items():
            counts = [f"{own[part]['n'] if own[part] else 0:,}" for part in ("all", "seen")]
            lines.append([model, name, *counts, *map(_cell, own.values())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _cell(score: Mapping | None) -> str:
    if score is None:
        return "-"
    error = "" if score["stderr"] is None else f" ± {100 * score['stderr']:.2f}"
    return f"{100 * score['mean']:.2f}{error}"
