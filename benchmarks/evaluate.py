"""Multiple choice by log-likelihood beside lm-eval-harness: the same model, the same prompts, one core.

    python benchmarks/evaluate.py --data BENCHMARKS [--task cmmlu_lm_eval] [--items 120] [--rounds 3]

The model has 6.8 M parameters, as drawn: what it answers does not matter, that both say the same of it does.
benchmarks/README.md says what is counted, and how.
"""

import argparse
import contextlib
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
from common import Cost, environment, finish, least, made, middle, peer, pin, table, take_turns
from train_step import config_of

from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.evaluate import engine
from ctllm_jax.evaluate.benchmark import evaluate_block
from ctllm_jax.evaluate.declarations import Benchmark, Item, load_benchmark, load_task
from ctllm_jax.evaluate.prompts import head, option_prompts
from ctllm_jax.hf_export import export
from ctllm_jax.loading import LoadedModel, load_model
from ctllm_jax.model import count_params, init_params

HERE = pathlib.Path(__file__).resolve().parent
PEERS = (
    "torch==2.15.0",
    "transformers==5.23.0",
    "lm_eval[hf]==0.4.13",
    "sentencepiece==0.2.3",
    "protobuf==7.36.2",
    "numpy==2.4.6",
)
BATCHES = (8, 32)  # rows that the peer takes at once: each is a contestant of its own
BATCH_TOKENS = 4096  # of ours: the default of configs/eval.py

Subset = tuple[str, list[Item]]


def main() -> None:
    """Scores the same items by turns and prints what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of benchmarks, as `ctllm eval --config.data` takes it")
    parser.add_argument("--task", default="cmmlu_lm_eval", help="a declared task of kind lm_eval")
    parser.add_argument("--items", type=int, default=120, help="about so many, from as few subsets as have them")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pin()
    benchmark = load_benchmark(load_task(options.task), options.data)
    subsets = chosen(benchmark, options.items)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        model = drawn_model(scratch)
        requests = scratch / "requests.jsonl"
        write_requests(requests, benchmark, subsets)
        finish(compare(model, benchmark, subsets, scratch / "model", requests, options.rounds))


def chosen(benchmark: Benchmark, count: int) -> list[Subset]:
    """Whole subsets, in their order, until there are `count` items; the last one is cut."""
    subsets: list[Subset] = []
    for name, items in benchmark.items.items():
        subsets.append((name, items[: count - sum(len(own) for _, own in subsets)]))
        if sum(len(own) for _, own in subsets) >= count:
            break
    return subsets


def drawn_model(scratch: pathlib.Path) -> LoadedModel:
    """A model as drawn, with a tokenizer of the sample, read back from the export that the peer reads."""
    corpus = made(scratch / "corpus", "corpus", {"input": (f"{HERE.parent}/sample/documents/*.jsonl",)})
    trained = {"corpus": corpus, "vocab_size": 4096, "character_coverage": 0.99}
    tokenizer = made(scratch / "tokenizer", "tokenizer", trained)
    store = made(scratch / "store", "tokenize", {"corpus": corpus, "tokenizer": tokenizer, "sequence_length": 256})
    shape = dict(num_layers=6, d_model=256, num_heads=4, num_kv_heads=4, head_dim=64, d_ff=688, max_length=2048)
    config = config_of(store, **{f"model.{name}": value for name, value in shape.items()}).model
    export(config, init_params(config, jax.random.key(0)), load_tokenizer(tokenizer), scratch / "model", "float32")
    return load_model(str(scratch / "model"))


def write_requests(file: pathlib.Path, benchmark: Benchmark, subsets: Sequence[Subset]) -> None:
    """(context, continuation) of every option, item by item."""
    task = benchmark.task
    with open(file, "w", encoding="utf-8") as out:
        for subset, items in subsets:
            opening = head(benchmark, subset, task.shots.count if task.shots else 0)
            for item in items:
                pairs = [(own.context, own.delimiter + own.continuation) for own in option_prompts(task, item, opening)]
                print(json.dumps(pairs, ensure_ascii=False), file=out)


class Ours:
    """Scores all items and keeps what was said of them."""

    def __init__(self, model: LoadedModel, benchmark: Benchmark, subsets: Sequence[Subset]):
        self._work = model, benchmark, subsets
        self.logprobs: list[list[float]] = []

    def __call__(self) -> Cost:
        model, benchmark, subsets = self._work
        wall, cpu, found = time.perf_counter(), time.process_time(), []
        for subset, items in subsets:
            entries = evaluate_block(model, benchmark, subset, items, bos=True, batch_tokens=BATCH_TOKENS)
            found += [entry["logprobs"] for entry in entries]
        self.logprobs = found
        return Cost(time.process_time() - cpu, time.perf_counter() - wall)


def compare(
    model: LoadedModel,
    benchmark: Benchmark,
    subsets: Sequence[Subset],
    folder: pathlib.Path,
    requests: pathlib.Path,
    rounds: int,
) -> dict:
    """Prints the table; returns its figures."""
    count = sum(len(items) for _, items in subsets)
    ours = Ours(model, benchmark, subsets)
    with contextlib.ExitStack() as stack:
        command = [environment("evaluate", PEERS), HERE / "lm_eval_scores.py", folder, requests]
        peers = {f"lm_eval, {batch} rows": stack.enter_context(peer([*command, batch])) for batch in BATCHES}
        contestants = {"ctllm-jax": ours, **peers}
        first = {name: contestant() for name, contestant in contestants.items()}
        costs = take_turns(contestants, rounds)
    compiled = engine._prefill._cache_size() + engine._continue._cache_size()
    speed = {name: count / least(own) for name, own in costs.items()}
    versions = next(iter(peers.values())).about
    table(
        f"{benchmark.task.name}: {count} items of {len(subsets)} subsets, {len(ours.logprobs[0])} options each, "
        f"{count_params(model.config):,} parameters; "
        f"jax {jax.__version__}, lm_eval {versions['lm_eval']}, transformers {versions['transformers']}, "
        f"torch {versions['torch']}",
        ("", "items/CPU s", "median", "first turn, CPU s", "x the slowest"),
        [
            (
                name,
                speed[name],
                count / middle(costs[name]),
                first[name].cpu,
                speed[name] / min(speed.values()),
            )
            for name in contestants
        ],
    )
    own = np.array(ours.logprobs)
    distance = max(float(np.abs(own - np.array(other.found["logprobs"])).max()) for other in peers.values())
    same = min(float(np.mean(own.argmax(1) == np.array(other.found["logprobs"]).argmax(1))) for other in peers.values())
    best = max(peers, key=speed.get)
    print(f"{compiled} shapes compiled; log-probabilities agree within {distance:.1e}, answers in {100 * same:.1f} %")
    return {
        "evaluate_to_lm_eval_ratio": speed["ctllm-jax"] / speed[best],
        "evaluate_items_per_cpu_second": speed,
        "evaluate_shapes": compiled,
        "evaluate_distance": distance,
        "evaluate_same_answers": same,
    }


if __name__ == "__main__":
    main()
