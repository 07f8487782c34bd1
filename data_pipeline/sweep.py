"""`ctllm sweep`: what other thresholds would keep of a corpus, counted on the stored signals; no text is read.

Shares are of the well-formed documents of a subset, before deduplication: `alone`, if this bound were the only one, and
`together`, with all other rules as they are. A document's other failures are known from the run, so they are not judged
anew.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json
from ctllm_jax.common.manifest import stage_fingerprint
from data_pipeline.filters.measures import family, names
from data_pipeline.filters.rules import limits_of
from data_pipeline.signals import read_columns, signal_files

FACTORS = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
BOUNDS = ("min", "above", "max")
Asked = tuple[str, str, tuple[float, ...]]  # measure, bound, thresholds to try


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """rules: 'MEASURE.BOUND=VALUE,VALUE' each; none: every limit of the corpus, at 0.5 to 2 times its threshold.
    json: a JSON object a line instead of a table."""

    rules: tuple[str, ...]
    json: bool


@dataclasses.dataclass(frozen=True)
class Rule:
    """A bound of a measure, the thresholds to try, and the limits that the corpus was made with."""

    measure: str
    bound: str
    thresholds: tuple[float, ...]
    limits: Mapping[str, float]

    def passes_others(self, values: np.ndarray) -> np.ndarray:
        """Which values the measure's other bounds let pass."""
        good = np.ones(len(values), bool)
        for bound, limit in self.limits.items():
            if bound != self.bound:
                good &= _passes(values, bound, limit)
        return good


def _passes(values: np.ndarray, bound: str, threshold: float) -> np.ndarray:
    """Which values a bound lets pass; a document without the value is not judged by it."""
    good = {"min": np.greater_equal, "above": np.greater, "max": np.less_equal}[bound](values, threshold)
    return good | np.isnan(values)


def run(config: SweepConfig, workdir: str) -> dict:
    """Prints the shares that each threshold would keep in the corpus `workdir`; writes nothing.

    Returns {subset: {documents, rules: [{measure, bound, now, thresholds: [{threshold, alone, together}]}]}}.

    Raises:
      UserError: no finished corpus, or a rule that is not written as it should be or that no subset has.
    """
    stage_fingerprint(workdir, "corpus")
    filters = read_json(pathlib.Path(workdir, "stage.json"))["settings"]["filters"]
    asked = [_parsed(rule) for rule in config.rules]
    found = {}
    for subset, files in signal_files(workdir).items():
        if rules := _rules(subset, limits_of(filters, subset), asked):
            found[subset] = _count(files, rules)
    if missing := {name for name, _, _ in asked} - {r["measure"] for s in found.values() for r in s["rules"]}:
        raise UserError(f"rules: no subset of {workdir} has a measure {min(missing)!r}")
    for line in _lines(found, config.json):
        print(line)
    return found


def _parsed(rule: str) -> Asked:
    name, _, values = rule.partition("=")
    measure, _, bound = name.partition(".")
    try:
        thresholds = tuple(float(value) for value in values.split(","))
    except ValueError:
        thresholds = ()
    if bound not in BOUNDS or not thresholds or not all(map(math.isfinite, thresholds)):
        raise UserError(f"rules: {rule!r} is not written as MEASURE.BOUND=VALUE,VALUE (bounds: {', '.join(BOUNDS)})")
    return measure, bound, thresholds


def _rules(subset: str, limits: Mapping[str, Mapping[str, float]], asked: Sequence[Asked]) -> list[Rule]:
    """What is asked of a subset, as far as it has the measure; where nothing is, all its limits."""
    if asked:
        measured = {*names(family(subset)), *limits}
        return [Rule(m, bound, tried, limits.get(m, {})) for m, bound, tried in asked if m in measured]
    return [
        Rule(measure, bound, _around(threshold), own)
        for measure, own in limits.items()
        for bound, threshold in own.items()
    ]


def _around(threshold: float) -> tuple[float, ...]:
    return tuple(sorted({round(threshold * factor, 9) for factor in FACTORS}))


def _count(files: Sequence[pathlib.Path], rules: Sequence[Rule]) -> dict:
    """Counts all rules in one pass over the files."""
    documents = 0
    alone, together = (np.zeros((len(rules), max(len(r.thresholds) for r in rules)), np.int64) for _ in range(2))
    wanted = list(dict.fromkeys(["failed", *(rule.measure for rule in rules)]))
    for values in (batch for path in files for batch in read_columns(path, wanted)):
        documents += len(values["failed"])
        failures, which = np.unique(values["failed"], return_inverse=True)
        failures = [set(filter(None, failed.split(","))) for failed in failures.tolist()]
        for i, rule in enumerate(rules):
            column = values[rule.measure]
            others = np.array([failed <= {rule.measure} for failed in failures])[which] & rule.passes_others(column)
            for j, threshold in enumerate(rule.thresholds):
                good = _passes(column, rule.bound, threshold)
                alone[i, j] += good.sum()
                together[i, j] += (good & others).sum()
    return {
        "documents": documents,
        "rules": [
            {
                "measure": rule.measure,
                "bound": rule.bound,
                "now": rule.limits.get(rule.bound),
                "thresholds": [
                    {
                        "threshold": threshold,
                        "alone": round(int(alone[i, j]) / max(documents, 1), 6),
                        "together": round(int(together[i, j]) / max(documents, 1), 6),
                    }
                    for j, threshold in enumerate(rule.thresholds)
                ],
            }
            for i, rule in enumerate(rules)
        ],
    }


def _lines(found: Mapping[str, dict], as_json: bool) -> Iterator[str]:
    for subset, entry in found.items():
        if as_json:
            yield from (
                json.dumps({"subset": subset, "documents": entry["documents"], **rule}) for rule in entry["rules"]
            )
            continue
        yield f"{subset}: {entry['documents']:,} documents; % kept by the bound alone / with all other rules"
        for rule in entry["rules"]:
            shares = "  ".join(
                f"{'*' if share['threshold'] == rule['now'] else ''}{share['threshold']:g}: "
                f"{100 * share['alone']:.2f}/{100 * share['together']:.2f}"
                for share in rule["thresholds"]
            )
            yield f"  {rule['measure']} {rule['bound']}  {shares}"
