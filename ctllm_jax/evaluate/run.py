"""`ctllm eval`: a model against held-out data, tasks and prompts.

Writes {workdir}/scores.json, samples.jsonl, and for each part parts/<part>.json (its result, keyed by a
fingerprint) with, for tasks, parts/<part>.jsonl (one line per question). A part that an interrupted run
finished is not done again.
"""

import dataclasses
from collections.abc import Callable

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json, write_json
from ctllm_jax.common.manifest import Stage, fingerprint, open_stage
from ctllm_jax.data.store import open_store
from ctllm_jax.evaluate.choice import evaluate_choice
from ctllm_jax.evaluate.perplexity import PerplexityConfig, perplexity
from ctllm_jax.evaluate.questions import LoadedTask, load_task
from ctllm_jax.generate import SamplingConfig, sample, write_samples
from ctllm_jax.loading import load_model


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What `ctllm eval` reads."""

    model: str  # run directory or Hugging Face folder
    step: int | None  # checkpoint of a run; None is the newest
    dtype: str | None  # compute dtype; None is the model's own
    perplexity: PerplexityConfig  # skipped where its store is empty
    tasks: tuple[str, ...]  # declarations of multiple-choice tasks (JSON files)
    bos: bool  # open task prompts with the beginning-of-document id
    prompts: tuple[str, ...]  # continued in samples.jsonl
    chat: bool  # wrap the prompts as a user's message in the chat template
    sampling: SamplingConfig
    batch_tokens: int  # most tokens of a scoring batch; speed and memory only


def run(config: EvalConfig, workdir: str) -> dict:
    """Evaluates, or takes up an evaluation that was cut short. Returns the scores."""
    tasks = [load_task(path) for path in config.tasks]
    names = [loaded.task.name for loaded in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"two tasks have the same name: {sorted(names)}")
    store = open_store(config.perplexity.store) if config.perplexity.store else None
    if not (tasks or store or config.prompts):
        raise UserError("eval: nothing to do; give config.tasks, config.perplexity.store or config.prompts")
    model = load_model(config.model, config.step, config.dtype)
    settings = {**dataclasses.asdict(config), "model": None, "step": None, "tasks": None}
    settings["perplexity"]["store"] = None
    inputs = {
        "model": model.digest,
        "store": store.fingerprint if store else None,
        "tasks": {loaded.task.name: loaded.protocol for loaded in tasks},
    }
    stage = open_stage("eval", 1, workdir, settings, inputs)
    if stage.done:
        print(table(stage.result))
        return stage.result

    result: dict = {"model": model.name, "digest": model.digest, "perplexity": None, "tasks": {}}
    if store:
        result["perplexity"] = _part(
            stage, "perplexity", lambda: perplexity(model, store, config.perplexity, config.batch_tokens)
        )
    for loaded in tasks:
        result["tasks"][loaded.task.name] = _part(
            stage, f"task-{loaded.task.name}", lambda loaded=loaded: _run_task(stage, model, loaded, config)
        )
    if config.prompts:
        samples = sample(model, config.prompts, config.chat, config.sampling)
        write_samples(stage.folder / "samples.jsonl", samples)
    write_json(stage.folder / "scores.json", result)
    print(table(result))
    return stage.finish(result)


def _part(stage: Stage, name: str, work: Callable[[], dict]) -> dict:
    """A part's result: read where an interrupted run of this very stage left it, else worked out and kept."""
    path = stage.folder / "parts" / f"{name}.json"
    key = fingerprint([stage.fingerprint, name])
    if path.exists() and (kept := read_json(path))["key"] == key:
        return kept["result"]
    result = work()
    write_json(path, {"key": key, "result": result})
    return result


def _run_task(stage: Stage, model, loaded: LoadedTask, config: EvalConfig) -> dict:
    result, log = evaluate_choice(model, loaded, config.bos, config.batch_tokens)
    write_samples(stage.folder / "parts" / f"task-{loaded.task.name}.jsonl", log)
    return result


def table(result: dict) -> str:
    """The scores as text, for people."""
    lines = [f"model {result['model']} ({result['digest']})"]
    if result["perplexity"]:
        columns = (
            "tokens",
            "nats_per_token",
            "stderr",
            "perplexity",
            "bits_per_byte",
            "unigram_bits_per_byte",
        )
        lines += [
            "",
            _row("held-out", [name.replace("unigram_bits_per_byte", "unigram") for name in columns]),
        ]
        for source, figures in result["perplexity"].items():
            lines.append(_row(source, [_number(figures[name]) for name in columns]))
    if result["tasks"]:
        lines += [
            "",
            _row("task", ["questions", "sum", "+-", "characters", "bytes", "tokens", "macro (sum)", "cut"]),
        ]
        for name, task in result["tasks"].items():
            micro = {norm: entry["micro"] for norm, entry in task["accuracy"].items()}
            shown = [task["questions"], micro["sum"]["mean"], micro["sum"]["stderr"]]
            shown += [micro[norm]["mean"] for norm in ("characters", "bytes", "tokens")]
            shown += [task["accuracy"]["sum"]["macro"]["mean"], task["cut"]]
            lines.append(_row(name, [_number(value) for value in shown]))
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<20}" + "".join(f"{cell:>15}" for cell in cells)


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
