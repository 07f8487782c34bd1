"""What many marks come to: means with intervals, how judges agree, what length has to do with it, wins and losses.

Intervals are percentile bootstraps at 95 %: questions are drawn with replacement within each category, all marks of a
question together, for the turns, samples and judges of one question are not independent.

A mark is {id, category, turn, judge, sample, value: None where there is none, form, characters, cut}.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import stats

Rows = Sequence[dict]


def means(rows: Rows, draws: int) -> dict:
    """{mean: over all values, macro: of the categories' means, interval and macro_interval, n: values, categories:
    {name: {mean, interval, n}}}; None where there is no value."""
    grouped: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        questions = grouped.setdefault(row["category"], {})
        if row["value"] is not None:
            questions.setdefault(row["id"], []).append(row["value"])
    random = np.random.default_rng(0)
    categories, sums, counts = {}, [], []
    for name, questions in grouped.items():
        if not questions:
            categories[name] = {"mean": None, "interval": None, "n": 0}
            continue
        totals = np.array([(sum(values), len(values)) for values in questions.values()], np.float64)
        drawn = totals[random.integers(0, len(totals), (draws, len(totals)))].sum(axis=1)
        total, n = totals.sum(axis=0)
        categories[name] = {"mean": float(total / n), "interval": _interval(drawn[:, 0] / drawn[:, 1]), "n": int(n)}
        sums.append(drawn[:, 0])
        counts.append(drawn[:, 1])
    found = [entry for entry in categories.values() if entry["n"]]
    n = sum(entry["n"] for entry in found)
    if not n:
        return dict.fromkeys(("mean", "interval", "macro", "macro_interval")) | {"n": 0, "categories": categories}
    sums, counts = np.array(sums), np.array(counts)
    return {
        "mean": sum(entry["mean"] * entry["n"] for entry in found) / n,
        "interval": _interval(sums.sum(axis=0) / counts.sum(axis=0)),
        "macro": sum(entry["mean"] for entry in found) / len(found),
        "macro_interval": _interval((sums / counts).mean(axis=0)),
        "n": n,
        "categories": categories,
    }


def _interval(drawn: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.percentile(drawn, (2.5, 97.5))]


def summary(rows: Rows, draws: int) -> dict:
    """`means`, and {turns: mean of each, forms: how many marks were found in which form, or are without one for which
    reason, without: how many that is, cut: judgements that met their token limit, length_correlation: Spearman's, of an
    answer's characters and its mean mark}."""
    turns = collections.defaultdict(list)
    for row in rows:
        if row["value"] is not None:
            turns[str(row["turn"])].append(row["value"])
    lengths = {(row["id"], row["turn"]): row["characters"] for row in rows}
    marks = _by_answer(rows)
    return {
        **means(rows, draws),
        "turns": {turn: sum(values) / len(values) for turn, values in sorted(turns.items())},
        "forms": dict(collections.Counter(row["form"] for row in rows)),
        "without": sum(row["value"] is None for row in rows),
        "cut": sum(row["cut"] for row in rows),
        "length_correlation": _correlation(
            stats.spearmanr, [lengths[answer] for answer in marks], list(marks.values())
        ),
    }


def _by_answer(rows: Rows) -> dict[tuple, float]:
    """Mean mark of each answer (question and turn) that has one."""
    values = collections.defaultdict(list)
    for row in rows:
        if row["value"] is not None:
            values[row["id"], row["turn"]].append(row["value"])
    return {answer: sum(own) / len(own) for answer, own in values.items()}


def _correlation(measure: Callable, one: Sequence[float], other: Sequence[float]) -> float | None:
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(measure(one, other).statistic)


def agreement(rows: Rows) -> dict:
    """Of each two judges, "ONE, OTHER": {n: answers with marks of both, pearson, spearman, difference: mean absolute,
    within_one: share that differs by a point at most}."""
    judges = dict.fromkeys(row["judge"] for row in rows)
    marks = {judge: _by_answer([row for row in rows if row["judge"] == judge]) for judge in judges}
    found = {}
    for one, other in itertools.combinations(judges, 2):
        shared = [answer for answer in marks[one] if answer in marks[other]]
        if not shared:
            continue
        a, b = ([marks[judge][answer] for answer in shared] for judge in (one, other))
        apart = np.abs(np.subtract(a, b))
        found[f"{one}, {other}"] = {
            "n": len(shared),
            "pearson": _correlation(stats.pearsonr, a, b),
            "spearman": _correlation(stats.spearmanr, a, b),
            "difference": float(apart.mean()),
            "within_one": float((apart <= 1).mean()),
        }
    return found


def repeatability(rows: Rows) -> dict | None:
    """Of answers that one judge marked several times: {n, deviation: mean standard deviation of the marks, same: share
    that got the same mark each time}; None where there are none."""
    values = collections.defaultdict(list)
    for row in rows:
        if row["value"] is not None:
            values[row["judge"], row["id"], row["turn"]].append(row["value"])
    several = [own for own in values.values() if len(own) > 1]
    if not several:
        return None
    return {
        "n": len(several),
        "deviation": float(np.mean([np.std(own, ddof=1) for own in several])),
        "same": float(np.mean([len(set(own)) == 1 for own in several])),
    }


def graded(rows: Rows, draws: int) -> dict:
    """All of the above: of each judge, and of all of them where there are several."""
    judges = dict.fromkeys(row["judge"] for row in rows)
    own = {judge: summary([row for row in rows if row["judge"] == judge], draws) for judge in judges}
    return {
        "all": summary(rows, draws),
        "judges": own,
        "agreement": agreement(rows),
        "repeatability": repeatability(rows),
    }


def compared(rows: Rows, draws: int) -> dict:
    """Wins of the first model. Each row is one comparison in both orders: {id, category, judge, sample, forward and
    backward: A, B, C or None as the judge said, characters: of both}.

    A model wins where both orders say so; all else is a tie; without a verdict in either order it is no comparison.

    Returns:
      {wins, ties, losses, without, win_rate: `means` with ties as half a win, consistent: share of comparisons whose
      verdict is the same in both orders, first: share of the verdicts for one side that fell to the answer shown first,
      longer: share of wins and losses that fell to the longer answer}
    """
    full = [row for row in rows if row["forward"] and row["backward"]]
    points = [_points(row["forward"], row["backward"]) for row in full]
    decided = [(row, point) for row, point in zip(full, points, strict=True) if point != 0.5]
    sided = [row[order] for row in full for order in ("forward", "backward") if row[order] != "C"]
    uneven = [(row, point) for row, point in decided if row["characters"][0] != row["characters"][1]]
    values = [{**row, "value": point} for row, point in zip(full, points, strict=True)]
    return {
        "wins": points.count(1.0),
        "ties": points.count(0.5),
        "losses": points.count(0.0),
        "without": len(rows) - len(full),
        "win_rate": means(values, draws),
        "consistent": _share(row["backward"] == SWAPPED[row["forward"]] for row in full),
        "first": _share(side == "A" for side in sided),
        "longer": _share((row["characters"][0] > row["characters"][1]) == (point == 1.0) for row, point in uneven),
    }


SWAPPED = {"A": "B", "B": "A", "C": "C"}


def _points(forward: str, backward: str) -> float:
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((forward, backward), 0.5)


def _share(hits: Iterable[bool]) -> float | None:
    hits = list(hits)
    return sum(hits) / len(hits) if hits else None
