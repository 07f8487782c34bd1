"""`ctllm eval`: a model against held-out data, benchmarks and prompts.

Writes {workdir}/scores.json, samples.jsonl and of benchmarks, block by block, a line an item:
parts/<benchmark>/<subset>-<number>.jsonl. All of that is made from what the model answered, which a folder of its own
keeps (`cache`): what it answered before, in a run that was killed, for other benchmarks, is not asked again.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_jsonl, write_json, write_jsonl
from ctllm_jax.common.manifest import Stage, open_stage
from ctllm_jax.compiled import keep_compiled
from ctllm_jax.data.chat import own_template
from ctllm_jax.data.store import open_store
from ctllm_jax.evaluate.benchmark import Block, answer, ask, blocks, entries, summary
from ctllm_jax.evaluate.cache import Cache, Claim, model_mark
from ctllm_jax.evaluate.declarations import Benchmark, in_conversation, load_benchmark, load_task
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
    sampling: SamplingConfig  # how prompts are continued; answers to benchmarks are greedy
    batch_tokens: int  # [tokens] most tokens of a scoring batch; speed and memory only
    cache: str  # folder of answers that evaluations share; "" keeps them in the workdir's own, cache/


def run(config: EvalConfig, workdir: str) -> dict:
    """Evaluates, or takes up an evaluation that was cut short or asked for something else. Returns the scores."""
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
    settings = {"dtype": config.dtype, "bos": config.bos, "chat": config.chat}
    asked = {
        "limit": config.limit,
        "benchmarks": {benchmark.task.name: benchmark.protocol for benchmark in benchmarks},
        "missing": missing,
        "perplexity": {**dataclasses.asdict(config.perplexity), "store": store.fingerprint} if store else None,
        "prompts": config.prompts,
        "sampling": dataclasses.asdict(config.sampling) if config.prompts else None,
    }
    stage = open_stage("eval", 7, workdir, settings, {"model": model.digest}, asked=asked)
    if stage.done:
        print(table(stage.result))
        return stage.result

    cache = Cache(config.cache or stage.folder / "cache", model_mark(model))
    models = on_each_device(model)
    result: dict = {"model": model.name, "digest": model.digest, "step": model.step, "tokens": model.tokens}
    result |= {"limit": config.limit, "perplexity": None, "benchmarks": {}, "missing": missing}
    if store:
        result["perplexity"] = cache.remember(
            ["perplexity", asked["perplexity"]],
            lambda: perplexity(models, store, config.perplexity, config.batch_tokens),
        )
    logs = _run_blocks(stage, cache, models, benchmarks, config, isolate)
    for benchmark in benchmarks:
        result["benchmarks"][benchmark.task.name] = summary(benchmark, _log(stage, benchmark, config.limit))
    if config.prompts:
        about = ["samples", config.prompts, config.chat, asked["sampling"]]
        samples = cache.remember(about, lambda: sample(model, config.prompts, config.chat, config.sampling))
        write_jsonl(stage.folder / "samples.jsonl", samples)
        logs.add(stage.folder / "samples.jsonl")
    _remove_others(stage, logs)
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
    stage: Stage,
    cache: Cache,
    models: Sequence[LoadedModel],
    benchmarks: list[Benchmark],
    config: EvalConfig,
    isolate: bool,
) -> set[pathlib.Path]:
    """Writes the log of each block, for which a device answers what the cache lacks. Returns the logs' paths."""
    counts = {benchmark.task.name: [0, 0] for benchmark in benchmarks}  # requests, and those of them that are answered
    paths = set()

    def jobs() -> Iterator[tuple[pathlib.Path, Block, Claim]]:
        for benchmark in benchmarks:
            count = counts[benchmark.task.name]
            for name, subset, items in blocks(benchmark, config.limit):
                block = ask(models[0], benchmark, subset, items, config.bos)
                claim = cache.claim(block.groups)
                count[0], count[1] = count[0] + claim.asked, count[1] + claim.missing
                paths.add(path := _block_path(stage, benchmark, name))
                yield path, block, claim

    def work(model: LoadedModel, job: tuple[pathlib.Path, Block, Claim]) -> None:
        path, block, claim = job
        known = claim.asked - claim.missing
        label = f"{block.label} ({known:,} of {claim.asked:,} answered before)" if known else block.label
        cache.answer(claim, lambda groups: answer(model, block, groups, config.batch_tokens, label))
        write_jsonl(path, entries(model, block, cache.answers(block.groups), isolate))

    for _ in spread(models, work, jobs()):
        pass
    for name, (asked, missing) in counts.items():
        print(f"{name}: {asked:,} requests, {asked - missing:,} of them answered before", file=sys.stderr)
    return paths


def _remove_others(stage: Stage, logs: set[pathlib.Path]) -> None:
    """Deletes logs of what the folder was asked for before and no longer is."""
    for path in {*stage.folder.glob("samples.jsonl"), *stage.folder.glob("parts/*/*.jsonl")} - logs:
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()


def _log(stage: Stage, benchmark: Benchmark, limit: int | None) -> dict[str, list[dict]]:
    """A benchmark's log by subset."""
    log: dict[str, list[dict]] = {}
    for name, subset, _ in blocks(benchmark, limit):
        log.setdefault(subset, []).extend(read_jsonl(_block_path(stage, benchmark, name)))
    return log


def _block_path(stage: Stage, benchmark: Benchmark, name: str) -> pathlib.Path:
    return stage.folder / "parts" / benchmark.task.name / f"{name}.jsonl"
