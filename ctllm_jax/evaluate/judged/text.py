"""Judges' scores as text for the terminal."""

from collections.abc import Mapping


def grades_text(scores: Mapping) -> str:
    """Marks by category, of all judges and of each; then what puts them in doubt."""
    columns = {"all judges": scores["all"], **scores["judges"]} if len(scores["judges"]) > 1 else scores["judges"]
    names = list(scores["all"]["categories"])
    lines = [f"{scores['models'][0]}: {scores['questions']} questions, marks from 1 to 10 [95 % interval]"]
    for column, own in columns.items():
        lines += ["", f"{column} ({own['n']} marks)"]
        lines += [f"  {name:<24} {_mean(own['categories'][name])}" for name in names]
        lines += [f"  {'mean over categories':<24} {_mean({'mean': own['macro'], 'interval': own['macro_interval']})}"]
        lines += [f"  {'mean over marks':<24} {_mean(own)}"]
        if len(own["turns"]) > 1:
            lines += [f"  {'turn ' + turn:<24} {mean:.2f}" for turn, mean in own["turns"].items()]
        forms = ", ".join(f"{form} {count}" for form, count in own["forms"].items())
        lines += [f"  without a mark: {own['without']}; judgements cut: {own['cut']}; read: {forms}"]
        lines += [f"  Spearman correlation of length and mark: {_number(own['length_correlation'])}"]
    for pair, entry in scores["agreement"].items():
        lines += [
            "",
            f"{pair}: {entry['n']} answers, Pearson {_number(entry['pearson'])}, Spearman "
            f"{_number(entry['spearman'])}, apart by {entry['difference']:.2f}, "
            f"within a point {entry['within_one']:.0%}",
        ]
    if repeated := scores["repeatability"]:
        lines += ["", f"asked again: deviation {repeated['deviation']:.2f}, the same mark {repeated['same']:.0%}"]
    return "\n".join(lines)


def comparison_text(scores: Mapping) -> str:
    """Wins by category, and how the order and the lengths weighed."""
    one, other = scores["models"]
    rate = scores["win_rate"]
    lines = [
        f"{one} against {other}: {scores['wins']} wins, {scores['ties']} ties, {scores['losses']} losses, "
        f"{scores['without']} without a verdict",
        "win rate, ties as half a win [95 % interval]",
    ]
    lines += [f"  {name:<24} {_mean(entry)}" for name, entry in rate["categories"].items()]
    lines += [f"  {'all comparisons':<24} {_mean(rate)}"]
    lines += [
        f"same verdict in both orders {_number(scores['consistent'])}, for the answer shown first "
        f"{_number(scores['first'])}, for the longer answer {_number(scores['longer'])}"
    ]
    return "\n".join(lines)


def _mean(entry: Mapping) -> str:
    if entry["mean"] is None:
        return "-"
    return f"{entry['mean']:.2f}  [{entry['interval'][0]:.2f}, {entry['interval'][1]:.2f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
