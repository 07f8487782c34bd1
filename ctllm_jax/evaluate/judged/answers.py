"""`ctllm answer`: a model's answers to open questions, for `ctllm judge` or for people to read.

Writes {workdir}/answers.jsonl, a line a question with all that a judge needs: the question as `Question` has it,
`answers` (one a turn), `finished` (whether each ended by itself) and `overlong` (the conversation left no room in the
context; its answer is empty). Questions are answered in blocks, parts/<number>.jsonl: what an
interrupted run finished is not done again.
"""

import dataclasses
from collections.abc import Sequence

from ctllm_jax.common.files import read_jsonl, write_jsonl
from ctllm_jax.common.manifest import fingerprint, open_stage
from ctllm_jax.data.chat import own_template
from ctllm_jax.evaluate.judged.question_sets import Question, read_questions
from ctllm_jax.loading import LoadedModel, load_model
from ctllm_jax.samples import sample
from ctllm_jax.sampling import SamplingConfig

BLOCK = 64  # questions answered between two writes


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
    """What `ctllm answer` reads."""

    model: str  # run directory or Hugging Face folder, of a model with a chat template
    step: int | None  # [steps] checkpoint of a run; None is the newest
    dtype: str | None  # compute dtype; None is the model's own
    tensor: int  # [devices] over which heads and widths of a copy of the model are split
    questions: str  # a shipped set (bafang), or files: see `question_sets.read_questions`
    system: str  # system message before each conversation; empty is none
    sampling: SamplingConfig  # its temperature holds for questions whose protocol sets none


def run(config: AnswerConfig, workdir: str) -> dict:
    """Answers the questions, or goes on where it was cut short. Returns counts."""
    questions = read_questions(config.questions)
    model = load_model(config.model, config.step, config.dtype, config.tensor)
    settings = {**dataclasses.asdict(config), "model": None, "step": None, "questions": None}
    inputs = {"model": model.digest, "questions": fingerprint([dataclasses.asdict(q) for q in questions])}
    stage = open_stage("answer", 1, workdir, settings, inputs)
    if stage.done:
        return stage.result
    answered: dict[str, dict] = {}
    for number, (temperature, block) in enumerate(_blocks(questions, config.sampling.temperature)):
        path = stage.folder / "parts" / f"{number:04d}.jsonl"
        if not path.exists():
            sampling = dataclasses.replace(config.sampling, temperature=temperature, seed=config.sampling.seed + number)
            write_jsonl(path, answer(model, block, config.system, sampling))
        answered |= {row["id"]: row for row in read_jsonl(path)}
    rows = [answered[question.id] for question in questions]
    write_jsonl(stage.folder / "answers.jsonl", rows)
    turns = sum(len(row["answers"]) for row in rows)
    counts = {"cut": turns - sum(sum(row["finished"]) for row in rows), "overlong": sum(r["overlong"] for r in rows)}
    print(f"answer: {len(rows)} questions, {turns} answers; {counts['cut']} did not end by themselves")
    return stage.finish({"model": model.name, "digest": model.digest, "questions": len(rows), "turns": turns, **counts})


def _blocks(questions: Sequence[Question], temperature: float) -> list[tuple[float, list[Question]]]:
    """Questions of one temperature, at most BLOCK together, in an order that the questions alone decide."""
    groups: dict[float, list[Question]] = {}
    for question in questions:
        own = temperature if question.temperature is None else question.temperature
        groups.setdefault(own, []).append(question)
    return [
        (own, group[start : start + BLOCK]) for own, group in groups.items() for start in range(0, len(group), BLOCK)
    ]


def answer(model: LoadedModel, questions: Sequence[Question], system: str, sampling: SamplingConfig) -> list[dict]:
    """A line of answers.jsonl for each question.

    Raises:
      UserError: the model has no chat template.
    """
    template = own_template(model.tokenizer)
    opening = [{"role": "system", "content": system}] if system else []
    talks = [list(opening) for _ in questions]
    rows = [{**dataclasses.asdict(q), "answers": [], "finished": [], "overlong": False} for q in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [i for i, question in enumerate(questions) if turn < len(question.turns)]
        for i in asked:
            talks[i].append({"role": "user", "content": questions[i].turns[turn]})
        fits = [i for i in asked if len(template.render_prompt(talks[i])) < model.config.max_length]
        found = dict(zip(fits, sample(model, [talks[i] for i in fits], True, sampling), strict=True))
        for i in asked:
            text = found[i]["text"].strip() if i in found else ""
            rows[i]["answers"].append(text)
            rows[i]["finished"].append(i in found and found[i]["finished"])
            rows[i]["overlong"] |= i not in found
            talks[i].append({"role": "assistant", "content": text})
    return rows
