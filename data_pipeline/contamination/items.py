"""What is looked for: items of declared benchmarks, and of the user's own JSON lines."""

import dataclasses
from collections.abc import Iterator

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import expand, file_digest, read_jsonl
from ctllm_jax.evaluate.declarations import load_benchmark, load_task
from ctllm_jax.evaluate.texts import item_texts
from data_pipeline.documents import InputFile, single_files


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Which items are looked for, and from what on a text counts as having seen one.

    data: folder of the benchmarks' files as published; tasks: declared tasks that are read from it, as in `ctllm eval`.
    items: globs of JSON lines, each with `field` (a text, or several) and, if it has one, `id`.
    ngram: [units] that an item and a text must share in a row: Chinese characters, or words of scripts that part them.
    min_coverage: [share] of an item's units in shared n-grams from which on it was seen; 0: one n-gram is enough.
    """

    data: str
    tasks: tuple[str, ...]
    items: tuple[str, ...]
    field: str  # key of an item's text in these lines
    ngram: int
    min_coverage: float

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"ngram must be at least 1, not {self.ngram}")
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"min_coverage must lie in 0..1, not {self.min_coverage}")
        if self.tasks and not self.data:
            raise ValueError("data: name the folder that holds the tasks' files")

    @property
    def wanted(self) -> bool:
        """Whether anything is looked for."""
        return bool(self.tasks or self.items)


@dataclasses.dataclass(frozen=True)
class Item:
    """An item of a task (or of a file, by its name)."""

    task: str
    id: str
    text: str


def read_items(config: BenchmarkConfig) -> tuple[list[Item], list[str]]:
    """All items, and hashes of what they were read from.

    Raises:
      UserError: a task's or the user's files are missing or not what they should be, or hold nothing.
    """
    found, marks = [], []
    for name in config.tasks:
        benchmark = load_benchmark(load_task(name), config.data)
        marks.append(benchmark.protocol)
        found += [Item(benchmark.task.name, identifier, text) for identifier, text in item_texts(benchmark)]
    for file in single_files(expand(config.items)):
        marks += [file.name, file_digest(file.path)]
        found += _own(file, config.field)
    if not found:
        raise UserError("benchmarks: no items to look for; name tasks or items")
    return found, marks


def _own(file: InputFile, field: str) -> Iterator[Item]:
    for number, row in enumerate(read_jsonl(file.path), 1):
        texts = row.get(field)
        texts = texts if isinstance(texts, list) else [texts]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{file.path}: entry {number}: no text under {field!r} (it has: {', '.join(row)})")
        yield Item(file.name, str(row.get("id", number)), "\n".join(texts))
