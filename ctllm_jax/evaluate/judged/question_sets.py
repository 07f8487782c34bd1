"""Open questions for `ctllm answer`: the set that ships with the project, and the forms in which others circulate."""

import dataclasses
import pathlib
from collections.abc import Callable

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import expand
from ctllm_jax.evaluate.published import Files, read_published

SHIPPED = pathlib.Path(__file__).with_name("sets")
# Temperatures that MT-bench (FastChat) samples its categories with; the others are answered at 0.7.
MT_BENCH = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
MT_BENCH |= dict.fromkeys(("math", "coding", "reasoning", "extraction"), 0.0)


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, and what a judge should know.

    Attributes:
      id: unique in its set.
      category: scores are reported for each.
      turns: the user's messages, one at least; the model answers each before it sees the next.
      references: an answer to each turn, empty where there is none, or none at all; for the judge alone.
      notes: what to mark up and down, for the judge alone; may be empty.
      temperature: that the protocol samples with; None leaves it to the config.
      aspects: whether the judge marks several aspects first (AlignBench).
    """

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()
    notes: str = ""
    temperature: float | None = None
    aspects: bool = False

    def __post_init__(self):
        if not self.id or not self.category or not self.turns:
            raise ValueError("a question needs an id, a category and a turn")
        if not all(isinstance(text, str) for text in (*self.turns, *self.references)):
            raise ValueError(f"question {self.id}: turns and references are texts")
        if not all(text.strip() for text in self.turns):
            raise ValueError(f"question {self.id}: a turn is empty")
        if len(self.references) not in (0, len(self.turns)):
            raise ValueError(f"question {self.id}: {len(self.references)} references for {len(self.turns)} turns")


def _own(row: dict, place: str) -> Question:
    return Question(
        str(row["id"]), row["category"], tuple(row["turns"]), tuple(row.get("references", ())), row.get("notes", "")
    )


def _mt_bench(row: dict, place: str) -> Question:
    temperature = MT_BENCH.get(row["category"].removeprefix("zh_"), 0.7)
    references = tuple(row.get("reference") or ())
    return Question(str(row["question_id"]), row["category"], tuple(row["turns"]), references, temperature=temperature)


def _align_bench(row: dict, place: str) -> Question:
    references = (row["reference"],) if row.get("reference") else ()
    return Question(str(row["question_id"]), row["category"], (row["question"],), references, aspects=True)


def _chc_bench(row: dict, place: str) -> Question:
    return Question(place, row["category"], (row["query"],))


def _cvalues(row: dict, place: str) -> Question:
    return Question(str(row["id_"]), row["domain_en"], (row["prompt"],))


FILES = Files(folder="", about="open questions", splits={})

# Fields by which a form is known, most telling first.
FORMS: tuple[tuple[set[str], Callable[[dict, str], Question]], ...] = (
    ({"id", "category", "turns"}, _own),
    ({"question_id", "category", "turns"}, _mt_bench),
    ({"question_id", "category", "question"}, _align_bench),
    ({"category", "query"}, _chc_bench),
    ({"id_", "prompt", "domain_en"}, _cvalues),
)


def read_questions(name: str) -> list[Question]:
    """The questions of a set.

    Args:
      name: of a set that ships with the project, or files (JSON lines, JSON, Parquet, gzipped or not), a path or a
        pattern. A row is one question in our form (`id`, `category`, `turns`, and perhaps `references`, `notes`),
        MT-bench's (`question_id`, `category`, `turns`), AlignBench's (`question_id`, `category`, `question`,
        `reference`), CHC-Bench's (`category`, `query`; it has no ids, so the file's name and the row's number serve) or
        that of CValues' responsibility prompts (`id_`, `prompt`, `domain_en`).

    Raises:
      UserError: no such set; a line that is no question, named with its file; an id that is there twice.
    """
    shipped = SHIPPED / f"{name}.jsonl"
    found: dict[str, Question] = {}
    for file in [str(shipped)] if shipped.is_file() else expand([name]):
        path = pathlib.Path(file)
        rows, _ = read_published(path.parent, (path.name.removesuffix(".gz"),), FILES)
        for number, row in enumerate(rows, 1):
            where = f"{file}: question {number}"
            read = next((reader for fields, reader in FORMS if fields <= set(row)), None)
            if read is None:
                raise UserError(f"{where}: of no known form; its fields are {', '.join(sorted(row))}")
            try:
                question = read(row, f"{path.stem}-{number}")
            except (AttributeError, TypeError, ValueError) as error:
                raise UserError(f"{where}: {error}") from None
            if question.id in found:
                raise UserError(f"{where}: the id {question.id!r} is there twice")
            found[question.id] = question
    if not found:
        raise UserError(f"{name}: there is no question")
    return list(found.values())
