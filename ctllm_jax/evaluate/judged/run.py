"""`ctllm judge`: answers of a model, graded from 1 to 10 by other models; of two models, compared.

Writes {workdir}/replies/<request>.json, each judgement as it came; then judgements.jsonl, a line for each with what was
read from it, and scores.json. Each turn of a question is graded by itself. Two models are compared in both orders.
"""

import dataclasses
from collections.abc import Mapping

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, file_digest, read_json, read_jsonl, write_json, write_jsonl
from ctllm_jax.common.manifest import fingerprint, open_stage, read_result
from ctllm_jax.evaluate.judged import prompts
from ctllm_jax.evaluate.judged.client import Endpoint, JudgeConfig
from ctllm_jax.evaluate.judged.collect import BudgetConfig, CallConfig, Collector, JudgeRequest
from ctllm_jax.evaluate.judged.marks import compared, graded
from ctllm_jax.evaluate.judged.text import comparison_text, grades_text
from ctllm_jax.evaluate.judged.verdict import read_mark, read_preference


@dataclasses.dataclass(frozen=True)
class JudgingConfig:
    """What `ctllm judge` reads."""

    answers: tuple[str, ...]  # folder of `ctllm answer`, or JSON lines; two of them are compared
    judges: dict[str, JudgeConfig]  # by the names that the scores have them under
    samples: int  # [judgements] of each answer by each judge
    draws: int  # [draws] of the bootstrap
    calls: CallConfig  # how endpoints are asked
    budget: BudgetConfig  # what may be spent

    def __post_init__(self):
        if self.samples < 1 or self.draws < 1:
            raise ValueError("samples and draws are at least 1")


@dataclasses.dataclass(frozen=True)
class AnswerSet:
    """Answers of one model.

    Attributes:
      model: its name.
      identity: of the folder or file.
      rows: lines of answers.jsonl, by id.
    """

    model: str
    identity: str
    rows: dict[str, dict]


def read_answers(location: str) -> AnswerSet:
    """The answers of a finished folder of `ctllm answer`, or of a JSON-lines file from elsewhere.

    A line needs `id`, `category`, `turns` and `answers` (texts, one a turn); `references`, `notes` and `aspects` may be
    there.

    Raises:
      UserError: no such folder or file, or a line that is not so.
    """
    path = as_path(location)
    if path.is_dir():
        mark, result = read_result(location, "answer")
        name, path = result["model"], path / "answers.jsonl"
    else:
        name, mark = path.stem, file_digest(path) if path.is_file() else ""
    rows: dict[str, dict] = {}
    for number, row in enumerate(read_jsonl(path), 1):
        texts = [row.get("turns"), row.get("answers"), row.get("references") or row.get("turns")]
        sound = all(isinstance(own, list) and all(isinstance(text, str) for text in own) for own in texts)
        if not sound or not {"id", "category"} <= set(row) or len({len(own) for own in texts}) > 1 or not texts[0]:
            raise UserError(
                f"{path}: line {number}: needs id, category, turns, and as many answers (and references) as turns"
            )
        if str(row["id"]) in rows:
            raise UserError(f"{path}: line {number}: the id {row['id']!r} is there twice")
        rows[str(row["id"])] = {**row, "id": str(row["id"])}
    if not rows:
        raise UserError(f"{path}: it holds no answer")
    return AnswerSet(name, mark, rows)


def run(config: JudgingConfig, workdir: str) -> dict:
    """Gets the judgements, or goes on where it was cut short, and reads them. Returns the scores."""
    if not 0 < len(config.answers) < 3:
        raise UserError("judge: give config.answers, one folder of `ctllm answer` to grade it, two to compare them")
    if not config.judges:
        raise UserError("judge: config.judges is empty")
    sets = [read_answers(location) for location in config.answers]
    settings = {
        "judges": {name: decides(judge) for name, judge in config.judges.items()},
        "samples": config.samples,
        "draws": config.draws,
        "prompts": fingerprint(prompts.TEXTS),
    }
    inputs = {"answers": [own.identity for own in sets]}
    stage = open_stage("judge", 1, workdir, settings, inputs)
    text = grades_text if len(sets) == 1 else comparison_text
    if stage.done:
        print(text(stage.result))
        return stage.result
    lines = _grades(config, sets[0]) if len(sets) == 1 else _comparisons(config, *sets)
    endpoints = {name: Endpoint(judge) for name, judge in config.judges.items()}
    collector = Collector(endpoints, stage.folder / "replies", config.calls, config.budget)
    collector.run([request for _, requests in lines for request in requests])
    rows = [_read(about, [read_json(collector.path(request)) for request in requests]) for about, requests in lines]
    write_jsonl(stage.folder / "judgements.jsonl", rows)
    scores = (graded if len(sets) == 1 else compared)(rows, config.draws)
    result = {"models": [own.model for own in sets], "questions": len(sets[0].rows), **scores}
    write_json(stage.folder / "scores.json", result)
    print(text(result))
    return stage.finish(result)


def decides(judge: JudgeConfig) -> dict:
    """What of a judge decides its judgements: not where it is reached, nor with whose key."""
    return {"model": judge.model, "temperature": judge.temperature, "max_tokens": judge.max_tokens}


def judge_request(
    judges: Mapping[str, JudgeConfig], judge: str, sample: int, messages: prompts.Messages
) -> JudgeRequest:
    """The request for one judgement, named after all that decides it."""
    return JudgeRequest(fingerprint([judge, decides(judges[judge]), sample, messages]), judge, messages)


# What a line of judgements.jsonl begins with, and the requests that it needs.
Requests = list[tuple[dict, list[JudgeRequest]]]


def _grades(config: JudgingConfig, answers: AnswerSet) -> Requests:
    found: Requests = []
    for row in answers.rows.values():
        for turn, text in enumerate(row["answers"]):
            messages = prompts.grade(row, turn)
            about = {"id": row["id"], "category": row["category"], "turn": turn + 1, "characters": len(text)}
            found += [
                ({**about, "judge": judge, "sample": sample}, [judge_request(config.judges, judge, sample, messages)])
                for judge in config.judges
                for sample in range(config.samples)
            ]
    return found


def _comparisons(config: JudgingConfig, one: AnswerSet, other: AnswerSet) -> Requests:
    turns = [{id: row["turns"] for id, row in own.rows.items()} for own in (one, other)]
    differing = [id for id in turns[0] | turns[1] if turns[0].get(id) != turns[1].get(id)]
    if differing:
        raise UserError(f"{len(differing)} questions are not the same in both answers, such as {differing[0]!r}")
    found: Requests = []
    for id, row in one.rows.items():
        pair = (row, other.rows[id])
        orders = [prompts.compare(*pair), prompts.compare(*pair[::-1])]
        lengths = [sum(map(len, own["answers"])) for own in pair]
        about = {"id": id, "category": row["category"], "characters": lengths}
        found += [
            (
                {**about, "judge": judge, "sample": sample},
                [judge_request(config.judges, judge, sample, order) for order in orders],
            )
            for judge in config.judges
            for sample in range(config.samples)
        ]
    return found


def _read(about: dict, replies: list[Mapping]) -> dict:
    """A line of judgements.jsonl: what was read, and from which text."""
    texts = [reply.get("text", "") for reply in replies]
    audit = {"cut": sum(reply.get("finish") == "length" for reply in replies), "texts": texts}
    audit["refused"] = [reply["refused"] for reply in replies if "refused" in reply]
    audit["judge_models"] = [reply.get("model") for reply in replies]
    if len(replies) == 2:
        return {**about, **dict(zip(("forward", "backward"), map(read_preference, texts), strict=True)), **audit}
    mark = read_mark(texts[0])
    form = "refused" if audit["refused"] else mark.form
    return {**about, "value": mark.value, "form": form, "aspects": mark.aspects, **audit}
