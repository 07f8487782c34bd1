"""`ctllm compare A B`: two evaluations on the same items, paired.

An item's difference is B's score less A's; averages are over items (micro). Where every score is 0 or 1 the test is
McNemar's, exact: of the items that one of the two has right, is the share of either beyond a fair coin's? Elsewhere it
is the paired bootstrap, which also gives every interval. Both ask one benchmark alone; `holm` is the p-value after
Holm's correction for their number.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, read_jsonl, write_json
from ctllm_jax.common.manifest import read_result
from ctllm_jax.evaluate.summary import item_score


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What `ctllm compare` reads."""

    evaluations: tuple[str, ...]  # two finished folders of `ctllm eval`
    draws: int  # [draws] of the bootstrap

    def __post_init__(self):
        if len(self.evaluations) != 2:
            raise ValueError("give two folders: ctllm compare A B")
        if self.draws < 1:
            raise ValueError("draws is at least 1")


def run(config: CompareConfig, workdir: str | None) -> dict:
    """Prints the comparison, and writes it to {workdir}/comparison.json if a folder is given. Returns it.

    Raises:
      UserError: a folder is no finished evaluation; nothing can be compared; the same protocol has other items.
    """
    results = [read_result(folder, "eval")[1] for folder in config.evaluations]
    own = [result["benchmarks"] for result in results]
    compared, left_out = {}, {}
    for name in own[0] | own[1]:
        entries = [benchmarks.get(name) for benchmarks in own]
        if None in entries:
            left_out[name] = "only one evaluation has it"
        elif entries[0]["protocol"] != entries[1]["protocol"]:
            left_out[name] = "the protocol, or the benchmark's files, are not the same"
        else:
            logs = [_log(folder, name) for folder in config.evaluations]
            if logs[0].keys() != logs[1].keys():
                raise UserError(
                    f"{name}: the items are not the same ({len(logs[0])} and {len(logs[1])}); was one limited?"
                )
            compared[name] = compare(entries[0], [[log[key] for key in logs[0]] for log in logs], config.draws)
    if not compared:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "neither has a benchmark"
        raise UserError(f"compare: nothing can be compared ({reasons})")
    for name, p in zip(compared, holm([entry["p"] for entry in compared.values()]), strict=True):
        compared[name]["holm"] = p
    result = {"models": [result["model"] for result in results], "benchmarks": compared, "left_out": left_out}
    if workdir:
        write_json(as_path(workdir) / "comparison.json", result)
    print(_text(result))
    return result


def _log(folder: str, name: str) -> dict[tuple[str, str], dict]:
    """A benchmark's log entries by block and id."""
    paths = sorted((as_path(folder) / "parts" / name).glob("*.jsonl"))
    return {(path.name, str(entry["id"])): entry for path in paths for entry in read_jsonl(path)}


def compare(about: dict, logs: Sequence[Sequence[dict]], draws: int) -> dict:
    """Scores of two logs of the same items, in the same order.

    Args:
      about: a benchmark's entry in scores.json, for `kind` and `headline`.
      logs: of A and of B.
      draws: of the bootstrap.

    Returns:
      {metric, n, a, b, difference: b - a, interval at 95 %, p, test: "McNemar" or "bootstrap", only_a, only_b: items
      that one alone has right, None outside McNemar's}
    """
    kind = about["kind"]
    if kind == "rolling":
        metric = "bits_per_byte"
        a, b = (np.array([-entry["logprob"] / np.log(2) for entry in log]) for log in logs)
        size = np.array([entry["bytes"] for entry in logs[0]], np.float64)
    else:
        metric = about["headline"]
        size = np.array([entry.get("points", 1.0) for entry in logs[0]])
        a, b = (size * [item_score(kind, metric, entry) for entry in log] for log in logs)
    random = np.random.default_rng(0)
    drawn = np.empty(draws)
    for i in range(draws):  # one at a time: a benchmark may have tens of thousands of items
        rows = random.integers(0, len(a), len(a))
        drawn[i] = (b[rows] - a[rows]).sum() / size[rows].sum()
    found = {
        "metric": metric,
        "n": len(a),
        "a": float(a.sum() / size.sum()),
        "b": float(b.sum() / size.sum()),
        "difference": float((b - a).sum() / size.sum()),
        "interval": [float(bound) for bound in np.percentile(drawn, (2.5, 97.5))],
    }
    if kind == "rolling" or not np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        p = min(1.0, 2 * min((drawn <= 0).mean(), (drawn >= 0).mean()))
        return found | {"test": "bootstrap", "p": max(float(p), 1 / draws), "only_a": None, "only_b": None}
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return found | {"test": "McNemar", "p": float(p), "only_a": only_a, "only_b": only_b}


def holm(ps: Sequence[float]) -> list[float]:
    """p-values after Holm's correction for their number, in the order given."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def _text(result: dict) -> str:
    a, b = result["models"]
    heads = f"{'n':>7}{'A':>10}{'B':>10}{'B - A':>10}  {'95 % interval':<20}{'p':>9}{'Holm':>9}"
    lines = [f"A: {a}", f"B: {b}", "", f"{'benchmark':<28}{heads}  test"]
    for name, own in result["benchmarks"].items():
        interval = f"[{own['interval'][0]:+.4f}, {own['interval'][1]:+.4f}]"
        figures = f"{own['n']:>7}{own['a']:>10.4f}{own['b']:>10.4f}{own['difference']:>+10.4f}  {interval:<20}"
        lines.append(f"{name:<28}{figures}{own['p']:>9.4f}{own['holm']:>9.4f}  {own['test']}, {own['metric']}")
    return "\n".join([*lines, *(f"{name}: left out, {reason}" for name, reason in result["left_out"].items())])
