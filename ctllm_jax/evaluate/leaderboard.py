"""`ctllm table EVALUATION ...`: scores of `ctllm eval` as the paper's tables, beside the scores that CT-LLM published.

Reported scores lie in reported/*.tsv (arXiv 2404.04167 and its project page), a column for each benchmark under the
name of our task in the same protocol, groups of subsets as TASK/GROUP; all in per cent. Ours are macro averages, as
CT-LLM's are, with standard errors. Columns are the benchmarks that one of the evaluations has.
"""

import csv
import dataclasses
import pathlib
from collections.abc import Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, write_atomic, write_json
from ctllm_jax.common.manifest import read_result
from ctllm_jax.evaluate import seen
from ctllm_jax.evaluate.figure import draw

REPORTED = pathlib.Path(__file__).with_name("reported")
TABLES = ("base", "aligned", "checkpoints")  # of the paper; "" for none


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """What `ctllm table` reads."""

    evaluations: tuple[str, ...]  # finished folders of `ctllm eval`
    reported: str  # which of CT-LLM's tables stands beside them, one of TABLES; "" for none
    contamination: str  # folder of `ctllm contamination`: scores without what the training data held, too; "" for none

    def __post_init__(self):
        if not self.evaluations:
            raise ValueError("give at least one folder of `ctllm eval`: ctllm table EVALUATION ...")
        if self.reported not in ("", *TABLES):
            raise ValueError(f"reported {self.reported!r} is unknown; there are: {', '.join(TABLES)}, or ''")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      tokens: that the model had been trained on; None where that is not known.
      scores: {column: (per cent, standard error or None)}.
      ours: whether it comes from an evaluation; the others were reported.
      limit: most items of a subset that were asked; None for all, or where the score was reported.
    """

    name: str
    tokens: float | None
    scores: dict[str, tuple[float, float | None]]
    ours: bool
    limit: int | None = None


def run(config: TableConfig, workdir: str | None) -> dict:
    """Prints the table as markdown; with a folder also writes table.md, table.tex, table.json and table.png there.

    Raises:
      UserError: a folder is not finished, none of the evaluations has a benchmark with a score, or the contamination
        is that of other items.
    """
    results = [read_result(folder, "eval")[1] for folder in config.evaluations]
    reported = read_reported(config.reported) if config.reported else []
    ours = [our_row(result, {column for row in reported for column in row.scores}) for result in results]
    if config.reported == "checkpoints":
        ours.sort(key=lambda row: row.tokens or 0)
    columns = _columns(reported, ours)
    if not columns:
        raise UserError("table: none of the evaluations has a benchmark with a score; run them with config.benchmarks")
    levels = [chances(result) for result in results]
    chance = {column: level[column] for level in levels for column in columns if level.get(column) is not None}
    rows = [row for row in (*reported, *ours) if row.ours or any(column in row.scores for column in columns)]
    text, apart = markdown(rows, columns, chance), []
    if config.contamination:
        held = seen.read_seen(config.contamination)
        apart = [
            (row["model"], seen.scores_apart(folder, held))
            for row, folder in zip(results, config.evaluations, strict=True)
        ]
        text += f"\nItems that the training data held (over items, all alike):\n\n{seen.markdown(apart)}"
    if workdir:
        folder = as_path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "table.md", text)
        write_atomic(folder / "table.tex", latex(rows, columns, chance))
        write_json(
            folder / "table.json", {"rows": [dataclasses.asdict(row) for row in rows], "chance": chance, "seen": apart}
        )
        draw(folder / "table.png", rows, columns, chance, curves=config.reported == "checkpoints")
    print(text, end="")
    return {"rows": len(rows), "columns": columns}


def read_reported(name: str) -> list[Row]:
    """The rows of one of CT-LLM's tables."""
    with open(REPORTED / f"{name}.tsv", encoding="utf-8", newline="") as file:
        found = []
        for line in csv.DictReader(file, delimiter="\t"):
            model, tokens = line.pop("model"), line.pop("tokens")
            scores = {column: (float(score), None) for column, score in line.items() if score}
            found.append(Row(model, float(tokens) if tokens else None, scores, ours=False))
    return found


def our_row(result: dict, reported: set[str]) -> Row:
    """An evaluation's line: each benchmark's macro average, and the groups that were reported too."""
    scores = {}
    for name, found in result["benchmarks"].items():
        if "scores" not in found:  # documents, which have no right answer
            continue
        score = found["scores"][found["headline"]]
        own = {name: score, **{f"{name}/{group}": entry for group, entry in score["groups"].items()}}
        for column, entry in own.items():
            if column == name or column in reported:
                error = entry["macro"]["stderr"]
                scores[column] = (100 * entry["macro"]["mean"], None if error is None else 100 * error)
    return Row(result["model"], result["tokens"], scores, ours=True, limit=result["limit"])


def chances(result: dict) -> dict[str, float | None]:
    """{column: per cent that guessing gets}, None where nobody can guess."""
    levels = {}
    for name, found in result["benchmarks"].items():
        level = None if found.get("chance") is None else 100 * found["chance"]
        groups = found["scores"][found["headline"]]["groups"] if "scores" in found else {}
        levels |= {name: level, **{f"{name}/{group}": level for group in groups}}
    return levels


def _columns(reported: Sequence[Row], ours: Sequence[Row]) -> list[str]:
    """What ours have, in the order of what was reported, then of the evaluations."""
    held = dict.fromkeys(column for row in ours for column in row.scores)
    known = dict.fromkeys(column for row in reported for column in row.scores)
    return [column for column in known if column in held] + [column for column in held if column not in known]


# ---- As text


def markdown(rows: Sequence[Row], columns: Sequence[str], chance: dict[str, float]) -> str:
    """A table in markdown, with its notes."""
    lines = [["model", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[_name(row), *(_cell(row, column, " ± ") for column in columns)] for row in rows]
    if chance:
        lines.append(["chance", *(f"{chance[column]:.2f}" if column in chance else "-" for column in columns)])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return table + "\n\n" + "\n".join(_notes(rows)) + "\n"


def latex(rows: Sequence[Row], columns: Sequence[str], chance: dict[str, float]) -> str:
    """A tabular in LaTeX (booktabs): reported models, a rule, ours."""
    lines = [
        f"% {' '.join(_notes(rows))}",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        _line(["model", *map(_escaped, columns)]),
        r"\midrule",
    ]
    for ours in (False, True):
        own = [row for row in rows if row.ours == ours]
        lines += [_line([_escaped(_name(row)), *(_cell(row, column, r" $\pm$ ") for column in columns)]) for row in own]
        lines += [r"\midrule"] * bool(own and not ours)
    if chance:
        levels = [f"{chance[column]:.2f}" if column in chance else "-" for column in columns]
        lines += [r"\midrule", _line(["chance", *levels])]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _name(row: Row) -> str:
    tokens = f", {_amount(row.tokens)} tokens" if row.ours and row.tokens else ""
    return f"{row.name}{tokens}{'*' if row.ours and row.limit is not None else ''}"


def _amount(tokens: float) -> str:
    """A number of tokens in three figures: 4.1M, 13.3B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"


def _cell(row: Row, column: str, between: str) -> str:
    if column not in row.scores:
        return "-"
    score, error = row.scores[column]
    return f"{score:.2f}" if error is None else f"{score:.2f}{between}{error:.2f}"


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = ["Per cent; macro averages, ours ± a standard error."]
    if not all(row.ours for row in rows):
        notes.append("The others' scores are those that CT-LLM reported (arXiv 2404.04167).")
    limits: dict[int, list[str]] = {}
    for row in rows:
        if row.limit is not None:
            limits.setdefault(row.limit, []).append(row.name)
    return notes + [f"* At most {limit} items of a subset: {', '.join(names)}." for limit, names in limits.items()]


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escaped(text: str) -> str:
    for character in ("\\", "&", "%", "$", "#", "_", "{", "}"):
        text = text.replace(character, r"\textbackslash " if character == "\\" else f"\\{character}")
    return text
