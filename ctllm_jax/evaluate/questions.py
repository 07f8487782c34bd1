"""Declared choice tasks: reading and rendering them. No JAX here: `data_pipeline` makes SeqIO tasks of them.

A task is data: a JSON declaration beside a JSON-lines file of questions.

Question: {"id", "question", "choices": [text, ...], "answer": index or letter, "language"}, and any other
text fields that the templates name. Templates are `str.format` strings over the question's text fields and

    {options}  one line "A. text" for each choice
    {letter}   the choice's letter      (choice template only)
    {choice}   the choice's text        (choice template only)

A prompt is description + shots + question, blank lines between them; each shot is its question, the delimiter
and its right choice. The delimiter opens the continuation that is scored, and is not counted in its length
(as in lm-eval-harness, whose acc, acc_norm and acc_bytes are `sum`, `characters` and `bytes` here).
"""

import dataclasses
import hashlib
import pathlib
import string

from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json, read_jsonl
from ctllm_jax.common.manifest import fingerprint

LETTERS = string.ascii_uppercase
PROTOCOL_VERSION = 1  # of what this file does with a task; part of every protocol hash


@dataclasses.dataclass(frozen=True)
class ChoiceTask:
    """A task's declaration."""

    name: str
    file: str  # questions; relative to the declaration
    description: str  # opens every prompt
    prompt: str  # template of a question
    delimiter: str
    choice: str  # template of a choice
    shots: int  # solved examples: the first of shots_file
    shots_file: str | None


@dataclasses.dataclass(frozen=True)
class Question:
    """One checked question."""

    id: str
    fields: dict[str, str]  # what the templates may name
    choices: tuple[str, ...]
    answer: int
    language: str


@dataclasses.dataclass(frozen=True)
class LoadedTask:
    """A declaration with its questions and examples; `protocol` hashes everything that decides the
    requests."""

    task: ChoiceTask
    questions: list[Question]
    examples: list[Question]
    protocol: str


def load_task(path: str) -> LoadedTask:
    """Reads and checks a task; UserError names the file and entry at fault."""
    task = build(ChoiceTask, read_json(path), str(path))
    folder = pathlib.Path(path).parent
    questions = _read_questions(folder / task.file)
    if not questions:
        raise UserError(f"{folder / task.file}: holds no questions")
    if task.shots and not task.shots_file:
        raise UserError(f"{path}: {task.shots} shots, but no shots_file to take them from")
    examples = _read_questions(folder / task.shots_file)[: task.shots] if task.shots_file else []
    if len(examples) < task.shots:
        raise UserError(f"{path}: {task.shots} shots, but {task.shots_file} holds {len(examples)}")
    digests = [
        hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (task.file, task.shots_file) if name
    ]
    return LoadedTask(task, questions, examples, fingerprint([PROTOCOL_VERSION, dataclasses.asdict(task), digests]))


def _read_questions(file: pathlib.Path) -> list[Question]:
    questions = []
    for number, row in enumerate(read_jsonl(file), 1):
        choices, answer = row.get("choices"), row.get("answer")
        if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
            answer = LETTERS.index(answer)
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise UserError(f"{file}: entry {number}: choices must be a list of 2 to {len(LETTERS)} texts")
        if not all(isinstance(text, str) and text for text in choices):
            raise UserError(f"{file}: entry {number}: a choice is no text, or empty")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise UserError(f"{file}: entry {number}: answer {row.get('answer')!r} names none of its choices")
        fields = {name: value for name, value in row.items() if isinstance(value, str)}
        fields["options"] = "\n".join(f"{LETTERS[i]}. {text}" for i, text in enumerate(choices))
        identifier = str(row.get("id", number - 1))
        questions.append(Question(identifier, fields, tuple(choices), answer, str(row.get("language", ""))))
    if len({question.id for question in questions}) < len(questions):
        raise UserError(f"{file}: two questions have the same id")
    return questions


def render(loaded: LoadedTask, question: Question) -> tuple[str, list[str]]:
    """(prompt, the choice texts) of a question; the continuations are delimiter + choice text."""
    task = loaded.task
    shots = [
        _fill(task.prompt, shot.fields) + task.delimiter + _choices(task, shot)[shot.answer] for shot in loaded.examples
    ]
    parts = ([task.description] if task.description else []) + shots + [_fill(task.prompt, question.fields)]
    return "\n\n".join(parts), _choices(task, question)


def _choices(task: ChoiceTask, question: Question) -> list[str]:
    return [
        _fill(task.choice, {**question.fields, "letter": LETTERS[i], "choice": text})
        for i, text in enumerate(question.choices)
    ]


def _fill(template: str, fields: dict[str, str]) -> str:
    try:
        return template.format_map(fields)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"template {template!r}: {error}; fields: {', '.join(sorted(fields))}") from None
