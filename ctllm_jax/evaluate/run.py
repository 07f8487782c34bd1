"""`ctllm eval`: a model against held-out data, benchmarks and prompts.

Writes {workdir}/scores.json, samples.jsonl and parts/perplexity.json (a part's result, keyed by a fingerprint).
Benchmarks are logged in blocks, parts/<benchmark>/<subset>-<number>.jsonl, one line per item. What an interrupted run
finished is not done again.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json, read_jsonl, write_json, write_jsonl
from ctllm_jax.common.manifest import Stage, fingerprint, open_stage
from ctllm_jax.compiled import keep_compiled
from ctllm_jax.data.chat import own_template
from ctllm_jax.data.store import open_store
from ctllm_jax.evaluate.benchmark import blocks, evaluate_block, summary
from ctllm_jax.evaluate.declarations import Benchmark, Item, in_conversation, load_benchmark, load_task
from ctllm_jax.evaluate.devices import on_each_device, spread
from ctllm_jax.evaluate.jail import isolated
from ctllm_jax.evaluate.perplexity import PerplexityConfig, perplexity
from ctllm_jax.evaluate.published import MissingFiles
from ctllm_jax.evaluate.table import table
from ctllm_jax.loading import LoadedModel, load_model
from ctllm_jax.samples import sample
from ctllm_jax.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What `ctllm eval` reads."""

    model: str  # run directory or Hugging Face folder
    step: int | None  # [steps] checkpoint of a run; None is the newest
    dtype: str | None  # compute dtype; None is the model's own
    tensor: int  # [devices] over which heads and widths of a copy of the model are split
    perplexity: PerplexityConfig  # skipped where its store is empty
    benchmarks: tuple[str, ...]  # declared tasks: names of shipped ones (ceval_ppl) or paths of TOML files
    data: str  # folder of the benchmarks' published files, a folder in it for each
    partly: bool  # go on without the files that are missing; the scores name what was left out
    unsafe_programs: bool  # run programs that the model writes even where they cannot be isolated
    limit: int | None  # [items] most items of each of a benchmark's subsets, for a trial; None takes all
    bos: bool  # open benchmarks' prompts with the beginning-of-document id
    prompts: tuple[str, ...]  # continued in samples.jsonl
    chat: bool  # prompts and generate tasks (then NAME_chat) as a user's message in the model's chat template
    sampling: SamplingConfig  # of generated answers and samples
    batch_tokens: int  # [tokens] most tokens of a scoring batch; speed and memory only


def run(config: EvalConfig, workdir: str) -> dict:
    """Evaluates, or takes up an evaluation that was cut short. Returns the scores."""
    benchmarks, missing = _benchmarks(config)
    names = [benchmark.task.name for benchmark in benchmarks]
    if len(set(names)) < len(names):
        raise UserError(f"two benchmarks have the same name: {sorted(names)}")
    isolate = _isolation(benchmarks, config.unsafe_programs)
    store = open_store(config.perplexity.store) if config.perplexity.store else None
    if not (benchmarks or store or config.prompts):
        raise UserError("eval: nothing to do; give config.benchmarks, config.perplexity.store or config.prompts")
    keep_compiled()
    model = load_model(config.model, config.step, config.dtype, config.tensor)
    if any(benchmark.chat for benchmark in benchmarks):
        own_template(model.tokenizer)  # a model without one is told before anything is worked out
    settings = {**dataclasses.asdict(config), "model": None, "step": None}
    settings |= {"benchmarks": None, "data": None, "partly": None, "unsafe_programs": None}
    settings["perplexity"]["store"] = None
    inputs = {
        "model": model.digest,
        "store": store.fingerprint if store else None,
        "benchmarks": {benchmark.task.name: benchmark.protocol for benchmark in benchmarks},
    }
    stage = open_stage("eval", 6, workdir, settings, inputs)
    if stage.done:
        print(table(stage.result))
        return stage.result

    models = on_each_device(model)
    result: dict = {"model": model.name, "digest": model.digest, "step": model.step, "tokens": model.tokens}
    result |= {"limit": config.limit, "perplexity": None, "benchmarks": {}, "missing": missing}
    if store:
        result["perplexity"] = _part(
            stage, "perplexity", lambda: perplexity(models, store, config.perplexity, config.batch_tokens)
        )
    _run_blocks(stage, models, benchmarks, config, isolate)
    for benchmark in benchmarks:
        result["benchmarks"][benchmark.task.name] = summary(benchmark, _log(stage, benchmark, config.limit))
    if config.prompts:
        samples = sample(model, config.prompts, config.chat, config.sampling)
        write_jsonl(stage.folder / "samples.jsonl", samples)
    write_json(stage.folder / "scores.json", result)
    print(table(result))
    return stage.finish(result)


def _benchmarks(config: EvalConfig) -> tuple[list[Benchmark], list[str]]:
    """What the config names, and the names of those of which no file is there, if that is allowed."""
    found, missing = [], []
    for name in config.benchmarks:
        task = load_task(name)
        try:
            benchmark = load_benchmark(task, config.data, config.partly)
            found.append(in_conversation(benchmark) if config.chat and task.kind == "generate" else benchmark)
        except MissingFiles as error:
            if not config.partly:
                raise
            print(f"{task.name}: left out ({error})", file=sys.stderr)
            missing.append(task.name)
    return found, missing


def _part(stage: Stage, name: str, work: Callable[[], dict]) -> dict:
    """A part's result: read where an interrupted run of this very stage left it, else worked out and kept."""
    path = stage.folder / "parts" / f"{name}.json"
    key = fingerprint([stage.fingerprint, name])
    if path.exists() and (kept := read_json(path))["key"] == key:
        return kept["result"]
    result = work()
    write_json(path, {"key": key, "result": result})
    return result


def _isolation(benchmarks: list[Benchmark], unsafe: bool) -> bool:
    """Whether programs are isolated; UserError where they cannot be and nobody insists."""
    coded = [benchmark.task.name for benchmark in benchmarks if benchmark.task.match == "program"]
    trouble = isolated() if coded else None
    if trouble and not unsafe:
        raise UserError(
            f"{', '.join(coded)}: programs that the model writes cannot be isolated here ({trouble}). Run where Linux "
            "allows user namespaces, or set config.unsafe_programs=True on a machine that may be harmed"
        )
    return trouble is None


def _run_blocks(
    stage: Stage, models: Sequence[LoadedModel], benchmarks: list[Benchmark], config: EvalConfig, isolate: bool
) -> None:
    """Writes the logs of the blocks that are missing, each worked on by one device."""

    def missing() -> Iterator[tuple[pathlib.Path, Benchmark, str, list[Item]]]:
        for benchmark in benchmarks:
            for name, subset, items in blocks(benchmark, config.limit):
                if not (path := _block_path(stage, benchmark, name)).exists():
                    yield path, benchmark, subset, items

    def work(model: LoadedModel, block: tuple[pathlib.Path, Benchmark, str, list[Item]]) -> None:
        path, benchmark, subset, items = block
        write_jsonl(path, evaluate_block(model, benchmark, subset, items, config.bos, config.batch_tokens, isolate))

    for _ in spread(models, work, missing()):
        pass


def _log(stage: Stage, benchmark: Benchmark, limit: int | None) -> dict[str, list[dict]]:
    """A benchmark's log by subset. The stage's folder is this evaluation's alone, so a block's log that is there is the
    one wanted."""
    log: dict[str, list[dict]] = {}
    for name, subset, _ in blocks(benchmark, limit):
        log.setdefault(subset, []).extend(read_jsonl(_block_path(stage, benchmark, name)))
    return log


def _block_path(stage: Stage, benchmark: Benchmark, name: str) -> pathlib.Path:
    return stage.folder / "parts" / benchmark.task.name / f"{name}.jsonl"
