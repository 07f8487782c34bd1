"""Averages with standard errors: a mean's as lm-eval-harness computes it, groups of subsets in both ways in use.

The macro average weighs subsets equally (OpenCompass; what CT-LLM reports), the micro average weighs questions (the
default of lm-eval-harness, whose pooled formula gives its error).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

BOOTSTRAP = 100_000  # draws of lm-eval-harness
_CHUNK = 1_000  # draws of one seed


def item_score(kind: str, metric: str, entry: Mapping) -> float:
    """How right an item is, 0 to 1, by its log entry (see `benchmark`), under one of its task's metrics.

    Of a stance: what it says, -1 to 1.
    """
    if kind == "stance":
        return float(entry["stance"][metric])
    if kind == "generate":
        return float(entry["right"][metric])
    if kind == "word":
        return float(entry["is_greedy"][0])
    return float(entry["gold"] is not None and entry["picked"][metric] == entry["gold"])


def mean(values: Sequence[float], points: Sequence[float] | None = None) -> dict:
    """{mean, stderr: the sample deviation over the root of n, None for a single value, n}.

    With `points`, what each value counts for, also {points: their sum}; the error is that of a weighted mean, the same
    where all count alike.
    """
    array = np.asarray(values, np.float64)
    n = len(array)
    if points is None:
        stderr = float(array.std(ddof=1) / math.sqrt(n)) if n > 1 else None
        return {"mean": float(array.mean()), "stderr": stderr, "n": n}
    weights = np.asarray(points, np.float64)
    middle = float(np.average(array, weights=weights))
    off = np.square(weights * (array - middle)).sum()
    stderr = float(math.sqrt(off * n / (n - 1)) / weights.sum()) if n > 1 else None
    return {"mean": middle, "stderr": stderr, "n": n, "points": float(weights.sum())}


def average(subsets: Sequence[dict]) -> dict:
    """{macro, micro: {mean, stderr}, n} of subsets' `mean`s."""
    weighted = "points" in subsets[0]
    sizes = np.array([entry["points" if weighted else "n"] for entry in subsets], np.float64)
    means = np.array([entry["mean"] for entry in subsets])
    errors = [entry["stderr"] for entry in subsets]
    macro_error = micro_error = None
    if None not in errors:
        squares = np.square(errors)
        macro_error = float(np.sqrt(squares.sum()) / len(errors))
        if weighted:
            micro_error = float(np.sqrt((np.square(sizes) * squares).sum()) / sizes.sum())
        else:
            pooled = float(np.sum((sizes - 1) * squares * sizes) / (sizes.sum() - len(sizes)))
            micro_error = math.sqrt(pooled / sizes.sum())
    return {
        "macro": {"mean": float(means.mean()), "stderr": macro_error},
        "micro": {"mean": float((means * sizes).sum() / sizes.sum()), "stderr": micro_error},
        "n": sum(entry["n"] for entry in subsets),
    }


def summarise(
    values: Mapping[str, Sequence[float]],
    groups: Mapping[str, Sequence[str]],
    points: Mapping[str, Sequence[float]] | None = None,
) -> dict:
    """`average` over all subsets, of each group, and each subset's `mean`.

    Args:
      values: of each subset's questions.
      groups: subsets of each group.
      points: what each question counts for; None where all count alike.
    """
    subsets = {name: mean(own, points and points[name]) for name, own in values.items()}
    return {
        **average(list(subsets.values())),
        "groups": {name: average([subsets[subset] for subset in own]) for name, own in groups.items()},
        "subsets": subsets,
    }


def mean_f1(entries: Sequence[Mapping], metric: str, options: int) -> float:
    """The mean of the options' F1, as lm-eval-harness scores CB; 0 of one that is neither right nor picked anywhere."""
    found = []
    for option in range(options):
        picked = [entry["picked"][metric] == option for entry in entries]
        right = [entry["gold"] == option for entry in entries]
        both = sum(one and other for one, other in zip(picked, right, strict=True))
        found.append(2 * both / (sum(picked) + sum(right)) if both else 0.0)
    return sum(found) / options


def perplexity(logprobs: Sequence[float], draws: int = BOOTSTRAP) -> dict:
    """{mean: exp of minus the mean log-likelihood, stderr, n}, the error by lm-eval-harness's bootstrap.

    It draws with Python's generator seeded with 0, 1, ...; numpy's legacy one gives the same numbers from these seeds.
    """
    array = np.asarray(logprobs, np.float64)
    found = []
    for seed in range(draws // _CHUNK):
        uniform = np.random.RandomState([seed]).random_sample((_CHUNK, len(array)))
        found.append(np.exp(-array[(uniform * len(array)).astype(np.int64)].mean(axis=1)))
    stderr = float(np.concatenate(found).std(ddof=1)) if len(array) > 1 else None
    return {"mean": float(np.exp(-array.mean())), "stderr": stderr, "n": len(array)}
