"""What happened to the corpus: a JSON-able summary of the shards' counts, and the page that shows it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ctllm_jax.common import html
from ctllm_jax.common.files import read_json
from data_pipeline.documents import SUBSETS, UNKNOWN, InputFile
from data_pipeline.filters.stage import EXAMPLES
from data_pipeline.shards import STEPS, Layout

_DUPLICATES = tuple(f"duplicate_{step}" for step in STEPS)
_COUNTED = (
    "read",
    "well_formed",
    "passed_rules",
    "passed_language",
    *_DUPLICATES,
    "similar_lines",
    "kept",
    "characters",
    "bytes",
)
_SIZES = ("characters", "bytes", "similar_lines")
FUNNEL = ("read", "well-formed", "rules", "language", "unique id", "exact dedup", "near dedup")


def collect(files: list[InputFile], layout: Layout) -> dict[str, Any]:
    """Adds up the counts of all shards.

    Returns a dict with
      subsets: {subset: {read, well_formed, passed_rules, passed_language, duplicate_id, duplicate_exact,
        duplicate_near, similar_lines (sentences dropped), kept (documents), characters, bytes (of kept text,
        UTF-8), malformed: {reason: n},
        rules: {rule: n}, masked: {kind: n, in documents that passed the filters},
        funnel: [[stage, documents left], ...]}}; 'unknown': no source can be told;
      totals: the same over all subsets;
      examples: {rule: up to 3 rejected {id, excerpt, value, threshold, ...}};
      files, empty_files, damaged_files.
    """
    subsets: dict[str, dict[str, Any]] = {}
    examples: dict[str, list] = {}
    empty, damaged = [], []
    for file in files:
        counts, outcome = read_json(layout.counts(file.index)), read_json(layout.outcome(file.index))
        if counts["damage"]:
            damaged.append({"file": file.path, "damage": counts["damage"], "records": counts["records"]})
        elif not counts["records"]:
            empty.append(file.path)
        for part in (counts, outcome):
            for subset, values in part["subsets"].items():
                _add(subsets.setdefault(subset, _zero()), values)
            for rule, found in part["examples"].items():
                kept = examples.setdefault(rule, [])
                kept.extend(found[: EXAMPLES - len(kept)])
    totals = _zero()
    for values in subsets.values():
        _add(totals, values)
    order = [name for name in (*SUBSETS, UNKNOWN) if name in subsets]
    return {
        "map_cc": layout.map_cc.name,
        "totals": _finished(totals),
        "subsets": {name: _finished(subsets[name]) for name in order},
        "examples": dict(sorted(examples.items())),
        "files": len(files),
        "empty_files": empty,
        "damaged_files": damaged,
    }


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's result: `collect` without the examples."""
    return {key: value for key, value in found.items() if key != "examples"}


def page(found: Mapping[str, Any]) -> str:
    """The report as one HTML page."""
    totals = found["totals"]
    lead = f"{totals['read']:,} records in {found['files']:,} files; {totals['kept']:,} documents kept"
    duplicates = sum(totals[name] for name in _DUPLICATES)
    cards = html.cards(
        {
            "records read": totals["read"],
            "documents kept": totals["kept"],
            "characters kept": totals["characters"],
            "rejected by filters": totals["well_formed"] - totals["passed_language"],
            "duplicates": duplicates,
            "malformed records": totals["read"] - totals["well_formed"],
        }
    )
    sections = [
        ("Overview", cards + _file_notes(found)),
        ("Funnel", _funnel(found)),
        ("Why documents were rejected", _reasons(found)),
        ("Examples", _examples(found)),
    ]
    return html.page("Corpus", lead, sections)


def _zero() -> dict[str, Any]:
    return {name: 0 for name in _COUNTED} | {name: Counter() for name in ("malformed", "rules", "masked")}


def _add(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            target[name].update(value)
        else:
            target[name] += value


def _finished(values: dict[str, Any]) -> dict[str, Any]:
    """Sorted by frequency, with the funnel: documents left after each stage."""
    left = [values["read"], values["well_formed"], values["passed_rules"], values["passed_language"]]
    for name in _DUPLICATES:
        left.append(left[-1] - values[name])
    if left[-1] != values["kept"]:
        raise AssertionError(f"documents lost: {left[-1]} should be left, {values['kept']} are")
    ordered = {
        name: dict(sorted(values[name].items(), key=lambda item: (-item[1], item[0])))
        for name in ("malformed", "rules", "masked")
    }
    return values | ordered | {"funnel": [list(step) for step in zip(FUNNEL, left, strict=True)]}


def _file_notes(found: Mapping[str, Any]) -> str:
    notes = [html.paragraph(f"{e['file']} is damaged: {e['damage']}", "bad") for e in found["damaged_files"]]
    notes += [html.paragraph(f"{path} holds no record", "soft") for path in found["empty_files"]]
    return "".join(notes)


def _funnel(found: Mapping[str, Any]) -> str:
    rows = [
        [name, *(count for _, count in values["funnel"]), *(values[size] for size in _SIZES)]
        for name, values in {**found["subsets"], "all": found["totals"]}.items()
    ]
    masked = ", ".join(f"{count:,} {kind}" for kind, count in found["totals"]["masked"].items())
    note = html.paragraph(f"Masked in documents that passed the filters: {masked}.") if masked else ""
    return (
        html.paragraph("Documents left after each stage, then what is kept.", "soft")
        + note
        + html.table(["subset", *FUNNEL, "characters", "bytes", "similar lines dropped"], rows)
    )


def _reasons(found: Mapping[str, Any]) -> str:
    totals = found["totals"]
    reasons = {**totals["malformed"], **totals["rules"]}
    reasons |= {name: totals[name] for name in _DUPLICATES if totals[name]}
    note = html.paragraph("A document that breaks several rules counts for each of them.", "soft")
    bars = dict(sorted(reasons.items(), key=lambda item: -item[1]))
    return note + html.bar_chart("Rejections by reason", bars)


def _examples(found: Mapping[str, Any]) -> str:
    parts = []
    for rule, examples in found["examples"].items():
        shown = "".join(
            html.paragraph(_because(example), "soft") + html.quote(example["excerpt"]) for example in examples
        )
        parts.append(html.details(rule, shown))
    return "".join(parts) or html.paragraph("Nothing was rejected.")


def _because(example: Mapping[str, Any]) -> str:
    if example.get("kind") == "id":
        return f"{example['id']} was there before, with another text or the same"
    if "duplicate_of" in example:
        return f"{example['id']} repeats {example['duplicate_of']} (similarity {example['similarity']:.2f})"
    if "threshold" in example:
        return f"{example['id']}: {example['value']} ({example['bound']} {example['threshold']})"
    return f"{example['id']}: {example['value']}"
