"""Declared benchmarks: what a task is, from its published files to its averages. No JAX here.

A task is a TOML file, of those in `tasks/` (named without suffix) or the user's own (a path). Templates are
`str.format` strings over a row's fields, with `!t` for text without white space at its ends; `{subset}` and `{title}`
name the subset, `{option}` the option at hand. What reaches the model is

    prefix + solved examples, `between` them, `close` after them + question + delimiter + continuation

and a solved example is its question, the delimiter and its target. Every newline stands in the declaration: nothing is
added in between.
"""

import dataclasses
import functools
import pathlib
import string
import tomllib
from collections.abc import Mapping
from typing import Any

from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.manifest import fingerprint
from ctllm_jax.evaluate.extract import COUNTED, EXTRACTORS, MATCHES
from ctllm_jax.evaluate.published import Files, MissingFiles, read_published
from ctllm_jax.evaluate.rows import PREPARE

TASKS = pathlib.Path(__file__).parent / "tasks"
PROTOCOL_VERSION = 1  # of what the code does with a declaration; part of every protocol hash
CHAT = "_chat"  # what the name of a task ends with that is asked in conversation

# How the options of a choice task are scored, or that there are none:
# - ppl: the whole text's negative log-likelihood over its tokens, the smallest wins (OpenCompass)
# - ll: the continuation's log-likelihood, its context tokenised alone (OpenCompass)
# - lm_eval: the continuation's log-likelihood, in several normalisations (lm-eval-harness)
# - stance: as lm_eval, and no option is right: what the options say is averaged by their probabilities
# - word: a single continuation, right if greedy decoding gives it (lm-eval-harness)
# - rolling: whole documents, every token once (lm-eval-harness)
# - generate: text goes on from the prompt; an answer is extracted
KINDS = ("ppl", "ll", "lm_eval", "stance", "word", "rolling", "generate")


@dataclasses.dataclass(frozen=True)
class Shots:
    """Solved examples."""

    count: int
    split: str | None = None  # its first rows are the examples; None: `examples`
    examples: tuple[dict[str, str], ...] = ()
    question: str | None = None  # where an example is worded otherwise than the question at hand
    target: str = "{option}"  # what follows the delimiter of an example
    between: str = "\n\n"
    close: str = "\n\n"
    bare: str = ""  # stands in place of all of them where none fits
    drop: bool = True  # where a written answer's prompt is too long, examples go before its beginning does


@dataclasses.dataclass(frozen=True)
class Task:
    """A declaration."""

    name: str  # says the mode too: ceval_ppl
    source: str  # whose protocol
    kind: str  # one of KINDS
    files: Files
    split: str
    question: str = ""
    delimiter: str = ""
    continuation: str = "{option}"
    options: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()  # of the options; 0, 1, ... if none are named
    offered: str = ""  # template of how many of the options a row has, from the first on; all of them if not given
    gold: str = ""  # template of the right label; of generate: field or template of the accepted answers
    values: tuple[float, ...] = ()  # of stance: what each option says, from -1 to 1
    directions: dict[str, str] = dataclasses.field(default_factory=dict)  # of stance: metric: template of a factor
    strays: bool = False  # rows whose gold is no label count as wrong; otherwise they are an error
    prefix: str = ""
    shots: Shots | None = None
    prepare: str | None = None  # of rows.PREPARE
    where: dict[str, str] = dataclasses.field(default_factory=dict)  # only rows whose field is this; may name {subset}
    rows: tuple[int, ...] = ()  # only these of the file: first, and the one after the last
    rename: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)  # other values for a field's
    subsets: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # category: "name title", ...
    averages: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # further groups of subsets
    points: str = ""  # template of what a row counts for in averages; all rows alike if not given
    f1: bool = False  # also the mean of the options' F1 (lm_eval)
    mutual: bool = False  # also by log-likelihood less that without the question (lm_eval)
    max_tokens: int = 0  # of generate
    stop: tuple[str, ...] = ()  # texts that end an answer
    extract: dict[str, str] = dataclasses.field(default_factory=dict)  # metric: extractor
    match: str = "equal"  # how an extracted answer is held to the accepted ones: of extract.MATCHES, or "program"
    matches: dict[str, str] = dataclasses.field(default_factory=dict)  # metric: match, where it has its own
    program: str = ""  # what is run to judge a "program"; `{answer}` is the extracted one
    seconds: int = 0  # of CPU time that it may take
    home: str = ""  # the declaration's own folder, which `load_task` fills in; no part of the protocol

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is unknown; there are: {', '.join(KINDS)}")
        if self.prepare is not None and self.prepare not in PREPARE:
            raise ValueError(f"prepare {self.prepare!r} is unknown; there are: {', '.join(PREPARE)}")
        if self.kind in ("ppl", "ll", "lm_eval", "stance") and len(self.options) < 2:
            raise ValueError(f"a task of kind {self.kind} needs at least two options")
        if self.labels and len(self.labels) != len(self.options):
            raise ValueError(f"{len(self.labels)} labels for {len(self.options)} options")
        if {bool(self.values), bool(self.directions)} != {self.kind == "stance"}:
            raise ValueError("values and directions belong to tasks of kind stance, which need both")
        if self.values and len(self.values) != len(self.options):
            raise ValueError(f"{len(self.values)} values for {len(self.options)} options")
        if self.kind == "generate" and not (self.max_tokens and self.extract):
            raise ValueError("a task of kind generate needs max_tokens and extract")
        if unknown := set(self.extract.values()) - {*EXTRACTORS, *COUNTED}:
            known = ", ".join(sorted({*EXTRACTORS, *COUNTED}))
            raise ValueError(f"extractor {min(unknown)!r} is unknown; there are: {known}")
        for match in (self.match, *self.matches.values()):
            if match not in (*MATCHES, "program"):
                raise ValueError(f"match {match!r} is unknown; there are: {', '.join(MATCHES)}, program")
        if surplus := set(self.matches) - set(self.extract):
            raise ValueError(f"matches: {min(surplus)!r} is not a metric of extract")
        if (self.match == "program") != bool(self.program and self.seconds):
            raise ValueError("match, program and seconds go together: a program is run, or none of them is given")
        for split in (self.split, self.shots.split if self.shots else None):
            if split is not None and split not in self.files.splits:
                raise ValueError(f"split {split!r} has no files")

    @property
    def names(self) -> tuple[str, ...]:
        """The options' labels."""
        return self.labels or tuple(str(number) for number in range(len(self.options)))

    @property
    def titles(self) -> dict[str, str]:
        """Subset names with their titles; one without a title is called by its name."""
        parts = [entry.partition(" ") for entries in self.subsets.values() for entry in entries]
        return {name: title or name.replace("_", " ") for name, _, title in parts} or {"": ""}

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names of averages with their subsets: the categories and the further ones."""
        categories = {name: [entry.partition(" ")[0] for entry in entries] for name, entries in self.subsets.items()}
        return categories | {name: list(subsets) for name, subsets in self.averages.items()}


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      id: subset and number of the row.
      fields: what templates may name.
      gold: index of the right option; None for a stray, or where the task has no options.
      answers: accepted answers of a generate task.
      points: what it counts for in averages.
    """

    id: str
    subset: str
    fields: dict[str, Any]
    gold: int | None
    answers: tuple[str, ...]
    points: float = 1.0


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A declaration with its rows; `protocol` hashes everything that decides the requests.

    Attributes:
      missing: subsets whose files are not there, if that is allowed; they are in neither `items` nor `examples`.
      chat: whether a generate task is asked in the model's chat template (`prompts.turns`), see `in_conversation`.
    """

    task: Task
    items: dict[str, list[Item]]
    examples: dict[str, list[Item]]
    protocol: str
    missing: tuple[str, ...] = ()
    chat: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.items.values()))


def shipped() -> list[str]:
    """Names of the tasks that come with the code."""
    return sorted(file.stem for file in TASKS.glob("[!_]*.toml"))


def load_task(name: str) -> Task:
    """A declaration by its name, or by the path of the user's own.

    A file may name another under `base`, whose keys and tables it goes on from.

    Raises:
      UserError: no such task, or a fault in it.
    """
    path = pathlib.Path(name) if name.endswith(".toml") else TASKS / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"task {name!r}: no such file; shipped tasks: {', '.join(shipped())}")
    return build(Task, {"name": path.stem, **_read(path), "home": str(path.parent)}, str(path))


def _read(path: pathlib.Path) -> dict:
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if "base" not in own:
        return own
    base = _read(path.with_name(f"{own.pop('base')}.toml"))
    return base | {
        key: {**base[key], **value} if isinstance(base.get(key), dict) else value for key, value in own.items()
    }


def load_benchmark(task: Task, data: str, partly: bool = False) -> Benchmark:
    """Reads a task's files from the user's folder of benchmarks.

    Args:
      task: which.
      data: the folder; each benchmark has its own in it.
      partly: whether subsets may be missing, as long as one is there.

    Raises:
      MissingFiles: the message says what belongs where.
      UserError: a row does not fit the declaration.
    """
    beside = task.files.folder.startswith("./")
    folder = pathlib.Path(task.home if beside else data) / task.files.folder
    digests: list[str] = []

    @functools.cache
    def read(names: tuple[str, ...]) -> list[dict]:
        found, digest = read_published(folder, names, task.files)
        digests.append(digest)
        return [row for published in found for row in _prepared(task, published, folder)]

    def items(split: str, subset: str, title: str, keep: slice) -> list[Item]:
        names = tuple(name.format(subset=subset) for name in task.files.splits[split])
        wanted = {key: value.format(subset=subset) for key, value in task.where.items()}
        rows = [row for row in read(names) if all(str(row.get(key)) == value for key, value in wanted.items())]
        return [_item(task, row, subset, title, number) for number, row in enumerate(rows[keep])]

    found, examples, missing = {}, {}, {}
    for subset, title in task.titles.items():
        try:
            own = items(task.split, subset, title, slice(*task.rows) if task.rows else slice(None))
            examples[subset] = _examples(task, subset, title, items)
        except MissingFiles as error:
            missing[subset] = error
            continue
        if not own:
            raise UserError(f"{task.name}: no questions in {folder}{subset and f' of {subset}'}")
        found[subset] = own
    if missing and not (partly and found):
        raise next(iter(missing.values()))
    protocol = fingerprint([PROTOCOL_VERSION, dataclasses.asdict(task) | {"home": ""}, digests])
    return Benchmark(task, found, examples, protocol, tuple(missing))


def in_conversation(benchmark: Benchmark) -> Benchmark:
    """A generate task for models that converse, under a name and a protocol of its own: scores of the two are never
    taken for each other."""
    task, protocol = benchmark.task, fingerprint([benchmark.protocol, "chat", PROTOCOL_VERSION])
    source = f"{task.source}; asked in the model's chat template, examples as turns"
    task = dataclasses.replace(task, name=task.name + CHAT, source=source)
    return dataclasses.replace(benchmark, task=task, protocol=protocol, chat=True)


def _examples(task: Task, subset: str, title: str, items) -> list[Item]:
    if task.shots is None:
        return []
    if task.shots.split is None:
        rows = task.shots.examples[: task.shots.count]
        return [Item(str(n), subset, {"title": title, **row}, None, ()) for n, row in enumerate(rows)]
    found = items(task.shots.split, subset, title, slice(task.shots.count))
    if len(found) < task.shots.count:
        raise UserError(f"{task.name}: {task.shots.count} examples wanted, {subset or 'the file'} has {len(found)}")
    return found


def _prepared(task: Task, row: dict, folder: pathlib.Path) -> list[dict]:
    try:
        rows = PREPARE[task.prepare](row) if task.prepare else [row]
        return [
            row | {name: values[str(row[name])] for name, values in task.rename.items() if str(row[name]) in values}
            for row in rows
        ]
    except (AttributeError, LookupError, SyntaxError, TypeError, ValueError) as error:  # of `ast.literal_eval`, too
        raise UserError(
            f"{task.name}: a row in {folder} lacks what the task needs ({type(error).__name__}: {error}): "
            f"{str(row)[:200]}"
        ) from None


def _item(task: Task, row: Mapping[str, Any], subset: str, title: str, number: int) -> Item:
    fields = {**row, "subset": subset, "title": title}
    name = f"{subset}/{number}" if subset else str(number)
    points = _number(task.points, fields) if task.points else 1.0
    if task.kind == "generate":
        answers = fields.get(task.gold, None)
        answers = [fill(task.gold, fields)] if answers is None else answers
        answers = answers if isinstance(answers, list) else [answers]
        return Item(name, subset, fields, None, tuple(str(answer) for answer in answers), points)
    if not task.gold:
        return Item(name, subset, fields, None, (), points)
    label, names = fill(task.gold, fields), task.names[: len(options(task, fields))]
    if label not in names and not task.strays:
        raise UserError(f"{task.name}, {name}: answer {label!r} is none of {', '.join(names)}")
    return Item(name, subset, fields, names.index(label) if label in names else None, (), points)


def options(task: Task, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Templates of the options that a row has."""
    return task.options[: int(_number(task.offered, fields))] if task.offered else task.options


def _number(template: str, fields: Mapping[str, Any]) -> float:
    text = fill(template, fields)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"template {template!r}: {text!r} is not a number") from None


class _Formatter(string.Formatter):
    def convert_field(self, value: Any, conversion: str | None) -> Any:
        return str(value).strip() if conversion == "t" else super().convert_field(value, conversion)


_FORMATTER = _Formatter()


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """A template with fields; UserError naming those that there are."""
    try:
        return _FORMATTER.vformat(template, (), fields)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"template {template!r}: {type(error).__name__}: {error}; fields: {', '.join(sorted(fields))}"
        ) from None
