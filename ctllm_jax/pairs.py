"""`ctllm pairs`: preference pairs of a model's own answers, ranked by judges or by a function.

Several answers to each prompt are sampled, each that ended by itself gets a mark, and the best and the worst of a
prompt become a pair. Writes {workdir}/answers.jsonl (every prompt with its answers), marks.jsonl (a mark or null for
each answer), pairs.jsonl (for `ctllm tokenize`) and rejected.jsonl (records that are no prompts). Answers and judges'
replies are kept as they come, so an interrupted run goes on.

Sampling needs an accelerator, judging a network: without judges and reward the answers alone are made, and `earlier`
names the folder that has them. Without judges and reward its marks are taken, too, so that another margin is tried out
without asking anyone again.
"""

import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Callable, Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, expand, file_digest, read_json, read_jsonl, write_jsonl
from ctllm_jax.common.manifest import Stage, fingerprint, open_stage, read_result
from ctllm_jax.common.progress import Progress
from ctllm_jax.data.chat import ROLES
from ctllm_jax.data.conversations import read_prompts
from ctllm_jax.evaluate.judged import prompts
from ctllm_jax.evaluate.judged.client import Endpoint, JudgeConfig
from ctllm_jax.evaluate.judged.collect import BudgetConfig, CallConfig, Collector, JudgeRequest
from ctllm_jax.evaluate.judged.run import decides, judge_request
from ctllm_jax.evaluate.judged.verdict import read_mark
from ctllm_jax.loading import LoadedModel, load_model
from ctllm_jax.samples import Encoder, sample_kept
from ctllm_jax.sampling import SamplingConfig

Reward = Callable[[list[dict], str, str | None], float]  # (prompt, answer, the record's own answer or None) -> mark
Marks = list[list[float | None]]  # of each prompt's answers


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """What `ctllm pairs` reads."""

    model: str  # run directory or Hugging Face folder with a chat template: the policy
    step: int | None  # [steps] checkpoint of a run; None is the newest
    dtype: str | None  # compute dtype; None is the model's own
    tensor: int  # [devices] over which heads and widths of a copy of the model are split
    input: tuple[str, ...]  # conversations or preference records, for their prompts
    answers: int  # [answers] sampled for each prompt
    slots: int  # [answers] decoded together; speed and memory only
    sampling: SamplingConfig  # how answers are drawn
    earlier: str | None  # folder of an earlier `ctllm pairs`, whose answers are taken instead of model and input
    judges: dict[str, JudgeConfig]  # by name; those without a model are not asked
    samples: int  # [judgements] of each answer by each judge; the mark is their mean
    references: bool  # show judges the record's own answer, where there is one
    calls: CallConfig  # how endpoints are asked
    budget: BudgetConfig  # what may be spent
    reward: str | None  # FILE.py:FUNCTION, called as `Reward` says, instead of judges
    margin: float  # [marks] least difference between the marks of a pair

    def __post_init__(self):
        if bool(self.earlier) == bool(self.model or self.input):
            raise ValueError("give model and input, or earlier, a folder that has answers")
        if not self.earlier and not (self.model and self.input):
            raise ValueError("model and input go together: who answers, and what is asked")
        if self.answers < 2 or self.slots < 1 or self.samples < 1:
            raise ValueError("answers are at least 2, slots and samples at least 1")
        if not self.earlier and self.sampling.temperature == 0:
            raise ValueError("sampling.temperature 0 gives the same answer each time")
        if self.reward and self.asked:
            raise ValueError("give judges or reward, not both")
        if not self.margin >= 0:
            raise ValueError(f"margin {self.margin} must not be negative")

    @property
    def asked(self) -> dict[str, JudgeConfig]:
        """The judges that are asked."""
        return {name: judge for name, judge in self.judges.items() if judge.model}


def run(config: PairsConfig, workdir: str) -> dict:
    """Samples, ranks and pairs, or goes on where it was cut short. Returns counts."""
    reward = _load_reward(config.reward) if config.reward else None
    settings = {"margin": config.margin, "ranking": _ranking(config)}
    if config.earlier:
        mark, result = read_result(config.earlier, "pairs")
        stage = open_stage("pairs", 1, workdir, settings, {"earlier": mark})
        if not stage.done:
            rows = _earlier(config.earlier, "answers.jsonl")
            write_jsonl(stage.folder / "answers.jsonl", rows)  # so that this folder can be `earlier` to another
            _finish(stage, config, reward, rows, result["rejected"])
        return _print_result(stage)
    model, files = load_model(config.model, config.step, config.dtype, config.tensor), expand(config.input)
    settings |= {"dtype": config.dtype, "answers": config.answers, "sampling": dataclasses.asdict(config.sampling)}
    inputs = {"model": model.digest, "input": [file_digest(file) for file in files]}
    stage = open_stage("pairs", 1, workdir, settings, inputs)
    if not stage.done:
        rows, rejected = _answers(stage.folder, model, config, files)
        write_jsonl(stage.folder / "rejected.jsonl", rejected)
        _finish(stage, config, reward, rows, len(rejected))
    return _print_result(stage)


def _ranking(config: PairsConfig) -> dict:
    """What decides the marks."""
    if config.reward:
        file, _, name = config.reward.rpartition(":")
        return {"reward": name, "file": file_digest(file)}
    if not config.asked:
        return {}
    judges = {name: decides(judge) for name, judge in config.asked.items()}
    shown = {"references": config.references, "prompts": fingerprint(prompts.TEXTS)}
    return {"judges": judges, "samples": config.samples, **shown}


# ---- Answers


def _answers(
    folder: pathlib.Path, model: LoadedModel, config: PairsConfig, files: Sequence[str]
) -> tuple[list[dict], list[dict]]:
    """(prompts, each with its `answers` {text, tokens, finished}; what is no prompt), also written."""
    encoder, (records, rejected) = Encoder(model, chat=True), read_prompts(files)
    encoded, usable = {}, []
    for record in records:
        try:
            ids = encoder.encode(record["prompt"])
        except UserError as error:
            rejected.append({"id": record["id"], "reason": str(error)})
            continue
        first = len(usable) * config.answers
        encoded |= dict.fromkeys(range(first, first + config.answers), ids)
        usable.append(record)
    if not usable:
        why = f"; the first record: {rejected[0]['reason']}" if rejected else ""
        raise UserError(f"pairs: no prompt in {', '.join(files[:3])}{why}")
    path = folder / "answers.jsonl"
    if not path.exists():
        sampling = (encoder.stop_ids, config.sampling, config.slots)
        found = sample_kept(folder / "partial.jsonl", model, encoded, *sampling)
        grouped = [[found[first + i] for i in range(config.answers)] for first in range(0, len(found), config.answers)]
        write_jsonl(path, [{**record, "answers": own} for record, own in zip(usable, grouped, strict=True)])
    (folder / "partial.jsonl").unlink(missing_ok=True)
    return read_jsonl(path), rejected


# ---- Marks


def _candidate(answer: dict) -> bool:
    """Whether an answer may be in a pair: one that was cut off, or says nothing, teaches no end."""
    return answer["finished"] and bool(answer["text"].strip())


def _marks(folder: pathlib.Path, config: PairsConfig, reward: Reward | None, rows: list[dict]) -> Marks | None:
    """By judges or reward, or of the earlier folder; None where there are none of these."""
    if reward:
        return _rewarded(reward, rows)
    if config.asked:
        return _judged(folder, config, rows)
    return [row["marks"] for row in _earlier(config.earlier, "marks.jsonl")] if config.earlier else None


def _earlier(folder: str, name: str) -> list[dict]:
    path = as_path(folder) / name
    if not path.exists():
        raise UserError(
            f"{folder} has no {name}: give judges or a reward, or as earlier the folder that has both files"
        )
    return read_jsonl(path)


def _rewarded(reward: Reward, rows: list[dict]) -> Marks:
    def mark(row: dict, answer: dict) -> float | None:
        value = float(reward(row["prompt"], answer["text"], row["reference"])) if _candidate(answer) else math.nan
        return value if math.isfinite(value) else None

    found = []
    with Progress("pairs: reward", len(rows), "prompts") as progress:
        for row in rows:
            found.append([mark(row, answer) for answer in row["answers"]])
            progress.add()
    return found


def _judged(folder: pathlib.Path, config: PairsConfig, rows: list[dict]) -> Marks:
    """Means over judges and their samples, of the judgements that give a mark."""
    endpoints = {name: Endpoint(judge) for name, judge in config.asked.items()}
    collector = Collector(endpoints, folder / "replies", config.calls, config.budget)

    def requests(row: dict, answer: dict) -> list[JudgeRequest]:
        if not _candidate(answer):
            return []
        question = _question(row, answer["text"], config.references)
        messages = prompts.grade(question, len(question["turns"]) - 1)
        return [
            judge_request(config.asked, judge, sample, messages)
            for judge in config.asked
            for sample in range(config.samples)
        ]

    requested = [[requests(row, answer) for answer in row["answers"]] for row in rows]
    collector.run([request for row in requested for answer in row for request in answer])

    def mean(requests_of_answer: list[JudgeRequest]) -> float | None:
        values = [read_mark(read_json(collector.path(request)).get("text", "")).value for request in requests_of_answer]
        values = [value for value in values if value is not None]
        return sum(values) / len(values) if values else None

    return [[mean(answer) for answer in row] for row in requested]


def _question(row: dict, answer: str, references: bool) -> dict:
    """A prompt and an answer to it as a line of answers.jsonl of `ctllm answer`, which judges are asked about."""
    said = {role: [m["content"] for m in row["prompt"] if m["role"] == role] for role in ROLES}
    question = {"turns": said["user"], "answers": [*said["assistant"], answer]}
    if said["system"]:
        question["system"] = said["system"][0]
    if references and row["reference"]:
        question["references"] = [*[""] * len(said["assistant"]), row["reference"]]
    return question


def _load_reward(where: str) -> Reward:
    """The function that FILE.py:FUNCTION names; UserError if there is none."""
    file, colon, name = where.rpartition(":")
    if not colon or not pathlib.Path(file).is_file():
        raise UserError(f"reward {where!r}: there is no such file; give FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UserError(f"reward {where!r}: {file} has no function {name}")
    return getattr(module, name)


# ---- Pairs


def _finish(stage: Stage, config: PairsConfig, reward: Reward | None, rows: list[dict], rejected: int) -> None:
    answers = [answer for row in rows for answer in row["answers"]]
    counts = {"prompts": len(rows), "rejected": rejected, "answers": len(answers)}
    counts["cut"] = sum(not answer["finished"] for answer in answers)
    marks = _marks(stage.folder, config, reward, rows)
    if marks is not None:
        write_jsonl(
            stage.folder / "marks.jsonl",
            [{"id": row["id"], "marks": given} for row, given in zip(rows, marks, strict=True)],
        )
        found = [pair_of(row, given, config.margin) for row, given in zip(rows, marks, strict=True)]
        pairs = [pair for pair in found if isinstance(pair, dict)]
        write_jsonl(stage.folder / "pairs.jsonl", pairs)
        counts |= {"pairs": len(pairs)} | {why: found.count(why) for why in WITHOUT}
        for side in ("chosen", "rejected"):
            counts[f"{side}_characters"] = sum(len(pair[side]) for pair in pairs) / max(len(pairs), 1)
    stage.finish(counts)


WITHOUT = ("too few marks", "level")  # why a prompt gives no pair


def pair_of(row: dict, marks: list[float | None], margin: float) -> dict | str:
    """The preference record of a prompt's best and worst answer, or why there is none, one of WITHOUT.

    Of equal marks the answer sampled first counts; answers of equal marks, or closer than the margin, are level.
    """
    marked = [
        (mark, answer["text"].strip()) for mark, answer in zip(marks, row["answers"], strict=True) if mark is not None
    ]
    if len(marked) < 2:
        return "too few marks"
    (best, chosen), (worst, rejected) = max(marked, key=lambda pair: pair[0]), min(marked, key=lambda pair: pair[0])
    if best == worst or best - worst < margin or chosen == rejected:
        return "level"
    labels = {key: row[key] for key in ("id", "language", "source") if key in row}
    return {**labels, "prompt": row["prompt"], "chosen": chosen, "rejected": rejected, "marks": [best, worst]}


def _print_result(stage: Stage) -> dict:
    """The result, which is also printed."""
    counts = stage.result
    total = f"{counts['answers']:,} answers to {counts['prompts']:,} prompts"
    print(f"pairs: {total}; {counts['cut']:,} did not end by themselves")
    if "pairs" in counts:
        without = ", ".join(f"{counts[why]:,} {why}" for why in WITHOUT)
        print(f"  {counts['pairs']:,} pairs; of the other prompts: {without}")
        print(
            "  characters: "
            + ", ".join(f"{side} {counts[f'{side}_characters']:.1f}" for side in ("chosen", "rejected"))
        )
    return counts
