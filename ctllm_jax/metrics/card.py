"""A model card and a data card of a run, filled from what its stages have left: `ctllm report RUN --card`.

Nothing is guessed: a figure comes from a manifest, a config or a log, what no file tells is called unknown, and what
only people know (licences, intended use) is marked `TO BE FILLED IN BY HAND`.
"""

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, read_json
from ctllm_jax.common.manifest import read_result
from ctllm_jax.evaluate.table import table
from ctllm_jax.metrics.definitions import find
from ctllm_jax.metrics.run_record import RunRecord, read_run

BY_HAND = "**TO BE FILLED IN BY HAND**"
_MADE = "Filled by `ctllm report RUN --card` from the files of the run, and by hand where it says so."


def cards(folder: str | os.PathLike, evaluations: Sequence[str]) -> dict[str, str]:
    """{file name: text} of MODEL_CARD.md and DATA_CARD.md.

    Args:
      folder: a run directory that has logged something.
      evaluations: finished folders of `ctllm eval`, for the model card.

    Raises:
      UserError: the folder is no run or has not begun, or an evaluation is not finished.
    """
    name = pathlib.Path(folder).resolve().name
    run = read_run(folder, name)
    if not run.about:
        raise UserError(f"{folder}: the run has not begun (run.json is missing), there is nothing for a card")
    scores = [read_result(evaluation, "eval")[1] for evaluation in evaluations]
    stage = read_json(as_path(folder) / "stage.json")
    return {
        "MODEL_CARD.md": _text(_model_card(run, scores)),
        "DATA_CARD.md": _text(_data_card(run, stage["inputs"]["store"])),
    }


def keep_what_was_filled_in(path: pathlib.Path, text: str) -> None:
    """UserError where the file has fewer places left to fill in than the text that would replace it."""
    if path.exists() and path.read_text(encoding="utf-8").count(BY_HAND) < text.count(BY_HAND):
        raise UserError(f"{path} has been filled in by hand; move it away, or write elsewhere with --workdir=DIR")


def _text(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


# ---- The model


def _model_card(run: RunRecord, scores: Sequence[dict]) -> Iterator[str]:
    about, config = run.about, run.about["config"]
    last = {kind: lines[-1] for kind, lines in run.entries.items() if lines}
    step = max((line["step"] for line in last.values()), default=0)
    yield from (f"# Model card: {run.name}", "", _MADE, "")
    yield from (
        "## Use",
        "",
        f"- Intended use: {BY_HAND}",
        f"- Limits and risks: {BY_HAND}",
        f"- Licence: {BY_HAND}",
        "",
    )
    yield from ("## Model", "")
    parameters = {"parameters": about["parameters"], "trained parameters": about["trained_parameters"]}
    yield from _table(("", "value"), (parameters | about["model"]).items())
    yield from ("## Training", "")
    facts = {
        "state": run.state,
        "objective": config["objective"]["name"],
        "starting point": config["init_from"] or "random parameters",
        "steps": step,
        "tokens gone through, padding included": step * about["tokens_per_step"],
        "tokens of a step": about["tokens_per_step"],
        "length asked for": config["duration"],
        "skipped steps": last.get("train", {}).get("skipped", "unknown"),
        "mesh": ", ".join(f"{axis} {size}" for axis, size in about["mesh"].items()),
        "devices": about["devices"],
        "goodput": last.get("job", {}).get("goodput", "unknown"),
        **{f"version of {package}": version for package, version in about["versions"].items()},
    }
    yield from _table(("", "value"), facts.items())
    yield from _table(("optimizer", "value"), config["optimizer"].items())
    yield from ("## On held-out data, in the run", "")
    if "eval" in last:
        measured = (
            (key, value) for key, value in last["eval"].items() if find("eval", key) and key not in ("kind", "time")
        )
        yield from _table(
            ("metric (docs/metrics.md)", "value", "unit"), ((k, v, find("eval", k).unit) for k, v in measured)
        )
    else:
        yield from ("unknown: the run has not looked at held-out data", "")
    yield from ("## Scores", "")
    if not scores:
        yield from ("unknown: no evaluation was named (`--config.scores=\"('EVALUATION',)\"`)", "")
    for result in scores:
        yield from ("```", table(result), "```", "")
    yield from ("## Data", "", "See DATA_CARD.md.")


# ---- The data


def _data_card(run: RunRecord, fingerprint: str) -> Iterator[str]:
    """fingerprint: of the store that the run was trained on."""
    folder = run.about["config"]["data"]["store"]
    yield from (f"# Data card: what {run.name} was trained on", "", _MADE, "")
    yield from ("## Sources and licences", "", f"- Where the texts come from: {BY_HAND}")
    yield from (f"- Licences and consent: {BY_HAND}", f"- Personal data: {BY_HAND}", "")
    yield from ("## Token store", "")
    store = _stage(folder, "tokenize", fingerprint)
    if isinstance(store, str):
        yield from (f"unknown: {store}",)
        return
    facts = {name: store[name] for name in ("kind", "sequence_length")} | {
        "pieces of the tokenizer": store["tokenizer"]["vocab_size"],
        "fingerprint": fingerprint,
        "rejected records": store["rejected_records"],
    }
    yield from _table(("", "value"), facts.items())
    columns = ("documents", "rows", "tokens", "learned", "bytes", "truncated", "dropped", "padding")
    entries = (
        (split, source, entry) for split, sources in store["splits"].items() for source, entry in sources.items()
    )
    rows = ((split, source, *(entry[column] for column in columns)) for split, source, entry in entries)
    yield from _table(("split", "source", *columns), rows)
    if store["kind"] != "pretrain":
        yield from ("Made from:", "", *(f"- `{pathlib.PurePath(file).name}`" for file in store["made_from"]))
        return
    wanted = read_json(as_path(folder) / "stage.json")["inputs"]["data"]
    corpus = next(iter(store["made_from"]), "")
    yield from _corpus(corpus, wanted)


def _corpus(folder: str, fingerprint: str) -> Iterator[str]:
    yield from ("## Corpus", "")
    found = _stage(folder, "corpus", fingerprint)
    if isinstance(found, str):
        yield f"unknown: {found}"
        return
    stage = read_json(as_path(folder) / "stage.json")
    yield from ("Input files:", "")
    files = (
        (name if len(rest) == 1 else f"{name} and {len(rest) - 1:,} more", subset or "as its records say", BY_HAND)
        for name, subset, *rest in _files(stage["inputs"])
    )
    yield from _table(("file", "subset", "origin and licence"), files)
    yield from ("Documents left after each step, and the bytes of what is kept:", "")
    funnel = [step for step, _ in found["totals"]["funnel"]]
    counted = {**found["subsets"], "all": found["totals"]}
    rows = ((name, *(left for _, left in values["funnel"]), values["bytes"]) for name, values in counted.items())
    yield from _table(("subset", *funnel, "bytes"), rows)
    yield from ("Why documents were left out (one may fail several rules):", "")
    yield from _table(("rule", "documents"), {**found["totals"]["malformed"], **found["totals"]["rules"]}.items())
    yield from ("Limits of the filters:", "")
    yield from _table(("family", "measure", "limit"), _limits(stage["settings"]["filters"]["rules"]))
    yield from ("Deduplication:", "")
    yield from _table(("", "value"), stage["settings"]["dedup"].items())
    seen = found["benchmarks"]
    yield "Benchmarks: " + (
        "none were looked for" if seen is None else f"documents that hold their items are left out: {seen}"
    )
    damaged = [f"{entry['file']}: {entry['damage']}" for entry in found["damaged_files"]]
    yield from ("", "Damaged files: " + ("; ".join(damaged) or "none"))


def _files(inputs: Sequence) -> Iterator[Sequence]:
    """The input files among what a corpus was made from: lists; fingerprints of earlier corpora are text."""
    return (entry for entry in inputs if isinstance(entry, list))


def _limits(rules: Mapping[str, Mapping]) -> Iterator[tuple[str, str, str]]:
    for family, measures in sorted(rules.items()):
        for measure, bounds in sorted(measures.items()):
            yield family, measure, ", ".join(f"{name} {value:,}" for name, value in bounds.items() if value is not None)


def _stage(folder: str, name: str, fingerprint: str) -> dict | str:
    """The result of a finished stage, or why it cannot be told."""
    try:
        found, result = read_result(folder, name)
    except UserError as error:
        return str(error)
    return result if found == fingerprint else f"{folder} has been made anew since (it is another `{name}` now)"


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(_cell(value) for value in row) + " |"
    yield ""


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return str(value).replace("|", "\\|").replace("\n", " ") or "-"
