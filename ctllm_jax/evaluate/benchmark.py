"""Evaluates a declared task: options by log-likelihood, documents, answers that a model writes.

A task's items are worked on in blocks. A block's log, one entry an item, is a pure function of the block, so a run that
was cut short goes on with the blocks that are missing and ends in the same bytes.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ctllm_jax.common.errors import UserError
from ctllm_jax.evaluate.declarations import Benchmark, Item, Task, fill
from ctllm_jax.evaluate.declarations import options as templates
from ctllm_jax.evaluate.encoding import encode_open, encode_options, end_ids
from ctllm_jax.evaluate.engine import Score, score_groups
from ctllm_jax.evaluate.extract import UNDECIDED, agreement, extracted, failed
from ctllm_jax.evaluate.jail import Limits, run_programs
from ctllm_jax.evaluate.scoring import rolling
from ctllm_jax.evaluate.summary import item_score, mean, mean_f1, perplexity, summarise
from ctllm_jax.generate import generate
from ctllm_jax.loading import LoadedModel

BLOCK = {"generate": 64}  # items of a block, where not DEFAULT_BLOCK
DEFAULT_BLOCK = 512
_SPACE = re.compile(r"\s+")  # ends a word, in lm-eval-harness: a text that ends in white space has an empty one more
WALL_FACTOR = 10  # a program may take this times its CPU seconds: a busy machine decides nothing

# What decides between options: (score, text, score of the text alone) -> the larger wins.
NORMS: dict[str, Callable[[Score, str, Score | None], float]] = {
    "ppl": lambda score, text, alone: score.whole_logprob / score.length,
    "sum": lambda score, text, alone: score.sum_logprob,
    "tokens": lambda score, text, alone: score.sum_logprob / max(1, score.tokens),
    "characters": lambda score, text, alone: score.sum_logprob / max(1, len(text)),
    "bytes": lambda score, text, alone: score.sum_logprob / max(1, len(text.encode())),
    "mutual": lambda score, text, alone: score.sum_logprob - alone.sum_logprob,
}
HEADLINE = {"ppl": "ppl", "ll": "sum", "lm_eval": "sum", "stance": "sum", "word": "greedy"}  # the protocol's own


def blocks(benchmark: Benchmark, limit: int | None) -> Iterator[tuple[str, str, list[Item]]]:
    """(name, subset, items) of each block, of at most `limit` items of each subset."""
    size = BLOCK.get(benchmark.task.kind, DEFAULT_BLOCK)
    for subset, items in benchmark.items.items():
        items = items[:limit]
        for start in range(0, len(items), size):
            yield f"{subset or 'all'}-{start // size:04d}", subset, items[start : start + size]


def evaluate_block(
    model: LoadedModel,
    benchmark: Benchmark,
    subset: str,
    items: list[Item],
    bos: bool,
    batch_tokens: int,
    isolate: bool = True,
) -> list[dict]:
    """The log entries of a block's items; `isolate` as in `jail.run_programs`."""
    if benchmark.task.kind == "rolling":
        return _documents(model, benchmark.task, items, batch_tokens)
    if benchmark.task.kind == "generate":
        log = _written(model, benchmark, subset, items, bos, isolate)
    else:
        log = _chosen(model, benchmark, subset, items, bos, batch_tokens)
    if benchmark.task.points:
        log = [entry | {"points": item.points} for item, entry in zip(items, log, strict=True)]
    return log


def _chosen(
    model: LoadedModel, benchmark: Benchmark, subset: str, items: list[Item], bos: bool, batch_tokens: int
) -> list[dict]:
    task = benchmark.task
    encoded = encode_options(model, benchmark, subset, items, bos)
    groups = [[*own.requests, *own.alone] for own in encoded]
    scores = score_groups(model, groups, batch_tokens, f"{task.name} {subset}".strip())
    log = []
    for item, own, found in zip(items, encoded, scores, strict=True):
        options, alone = found[: len(own.requests)], found[len(own.requests) :] or [None] * len(own.requests)
        texts = [fill(template, item.fields) for template in templates(task, item.fields)]
        names = [name for name in NORMS if name != "mutual" or task.mutual]
        values = {name: [NORMS[name](*part) for part in zip(options, texts, alone, strict=True)] for name in names}
        log.append(
            {
                "id": item.id,
                "gold": item.gold,
                "options": texts,
                "logprobs": [score.sum_logprob for score in options],
                "tokens": [score.tokens for score in options],
                "whole_logprobs": [score.whole_logprob for score in options],
                "lengths": [score.length for score in options],
                "is_greedy": [score.is_greedy for score in options],
                "picked": {name: int(np.argmax(own)) for name, own in values.items()},
                "margins": {name: _margin(own) for name, own in values.items()},
                "shots": own.shots,
                "cut": max(score.cut for score in options),
            }
        )
        if task.kind == "stance":
            log[-1]["stance"] = _stance(task, item, values["sum"])
    return log


def _stance(task: Task, item: Item, logprobs: list[float]) -> dict[str, float]:
    """What the options say, by their probabilities among themselves, towards each of the task's directions."""
    weights = np.exp(np.array(logprobs) - max(logprobs))
    said = float(np.average(task.values, weights=weights))
    return {metric: said * float(fill(factor, item.fields)) for metric, factor in task.directions.items()}


def _margin(values: list[float]) -> float | None:
    """By how much the best is ahead of the next; None of a single one."""
    if len(values) < 2:
        return None
    best, second = sorted(values, reverse=True)[:2]
    return best - second


def _documents(model: LoadedModel, task: Task, items: list[Item], batch_tokens: int) -> list[dict]:
    texts = [fill(task.question, item.fields) for item in items]
    scores = rolling(model, model.tokenizer.encode_batch(texts), model.tokenizer.opening_id, batch_tokens)
    return [
        {
            "id": item.id,
            "logprob": score.sum_logprob,
            "tokens": score.tokens,
            "bytes": len(text.encode()),
            "words": len(_SPACE.split(text)),
        }
        for item, text, score in zip(items, texts, scores, strict=True)
    ]


def _written(
    model: LoadedModel, benchmark: Benchmark, subset: str, items: list[Item], bos: bool, isolate: bool
) -> list[dict]:
    task, stops = benchmark.task, end_ids(model, benchmark)
    encoded = encode_open(model, benchmark, subset, items, bos)
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    outputs = generate(model, [ids for _, ids, _, _ in encoded], max_tokens=task.max_tokens, **greedy, stop_ids=stops)
    log = []
    for item, (prompt, _, shots, cut), ids in zip(items, encoded, outputs, strict=True):
        whole = text = model.tokenizer.decode([token for token in ids if token not in stops])
        for stop in task.stop:
            text = text.split(stop)[0]
        answers = {metric: extracted(name, text, item.answers) for metric, name in task.extract.items()}
        log.append(
            {
                "id": item.id,
                "prompt": prompt,
                "text": text,
                "finished": not stops.isdisjoint(ids) or text != whole,
                "extracted": answers,
                "accepted": item.answers,
                # Nothing is an answer, too, where it is an accepted one.
                "failed": {name: failed(answer) and answer not in item.answers for name, answer in answers.items()},
                "shots": shots,
                "cut": cut,
            }
        )
    for metric in task.extract:
        answers = [entry["extracted"][metric] for entry in log]
        for entry, right in zip(log, judged(task, metric, items, answers, isolate), strict=True):
            entry.setdefault("right", {})[metric] = right
    return log


def judged(task: Task, metric: str, items: list[Item], answers: list[str], isolate: bool) -> list[float]:
    """How right the extracted answer of each item is under a metric, 0 to 1."""
    match = task.matches.get(metric, task.match)
    if match != "program":
        return [agreement(match, answer, item.answers) for item, answer in zip(items, answers, strict=True)]
    programs = [
        fill(task.program, {**item.fields, "answer": answer}) for item, answer in zip(items, answers, strict=True)
    ]
    limits = Limits(cpu_seconds=task.seconds, wall_seconds=WALL_FACTOR * task.seconds)
    return [float(passed) for passed in run_programs(programs, limits, isolate)]


# ---- Results


def summary(benchmark: Benchmark, log: dict[str, list[dict]]) -> dict:
    """A task's result from its log, by subset."""
    task = benchmark.task
    entries = [entry for own in log.values() for entry in own]
    if not entries:
        raise UserError(f"{task.name}: no questions")
    result = {"source": task.source, "kind": task.kind, "protocol": benchmark.protocol, "questions": len(entries)}
    result["missing"] = list(benchmark.missing)
    if task.kind == "rolling":
        return result | _rolling_figures(entries)
    count = task.shots.count if task.shots else 0
    result |= {
        "fewer_shots": sum(entry["shots"] < count for entry in entries),
        "cut": sum(entry["cut"] > 0 for entry in entries),
    }
    if task.kind == "generate":
        return result | {
            "chance": None,
            "headline": next(iter(task.extract)),
            "failed": {metric: sum(entry["failed"][metric] for entry in entries) for metric in task.extract},
            "unfinished": sum(not entry["finished"] for entry in entries),
            "scores": _scores(task, log, task.extract),
            **({"decided": decided} if (decided := _decided(task, log)) else {}),
        }
    if task.kind == "word":
        found = perplexity([entry["logprobs"][0] for entry in entries])
        scores = _scores(task, log, ["greedy"])
        return result | {"chance": None, "headline": "greedy", "scores": scores, "perplexity": found}
    if task.kind == "stance":
        leanings = _scores(task, log, task.directions)
        return result | {"headline": next(iter(task.directions)), "leanings": leanings}
    return result | {
        **({"f1": mean_f1(entries, HEADLINE[task.kind], len(task.options))} if task.f1 else {}),
        "chance": mean([1 / len(entry["options"]) for entry in entries])["mean"],
        "headline": HEADLINE[task.kind],
        "strays": sum(entry["gold"] is None for entry in entries),
        "close": sum(entry["margins"][HEADLINE[task.kind]] < 1e-4 for entry in entries),
        "scores": _scores(task, log, entries[0]["picked"]),
    }


def _decided(task: Task, log: dict[str, list[dict]]) -> dict:
    """Of each metric whose answers may be no decision: `outcomes`, how often each answer came, and `scores` of the
    items that are decided, None where none is."""
    found = {}
    for metric, extractor in task.extract.items():
        if extractor not in UNDECIDED:
            continue
        decided = {
            subset: kept
            for subset, own in log.items()
            if (kept := [entry for entry in own if entry["extracted"][metric] not in UNDECIDED[extractor]])
        }
        answers = Counter(entry["extracted"][metric] for own in log.values() for entry in own)
        scores = _scores(task, decided, [metric])[metric] if decided else None
        found[metric] = {"outcomes": dict(sorted(answers.items())), "scores": scores}
    return found


def _scores(task: Task, log: dict[str, list[dict]], metrics: Iterable[str]) -> dict:
    groups = {name: [subset for subset in own if subset in log] for name, own in task.groups.items()}
    points = {subset: [entry["points"] for entry in own] for subset, own in log.items()} if task.points else None
    return {
        name: summarise(
            {subset: [item_score(task.kind, name, entry) for entry in own] for subset, own in log.items()},
            {name: own for name, own in groups.items() if own},
            points,
        )
        for name in metrics
    }


def _rolling_figures(entries: list[dict]) -> dict:
    logprob, size = sum(entry["logprob"] for entry in entries), sum(entry["bytes"] for entry in entries)
    words = sum(entry["words"] for entry in entries)
    per_word = -logprob / words
    return {
        "bytes": size,
        "bits_per_byte": -logprob / size / math.log(2),
        "byte_perplexity": math.exp(-logprob / size),
        # Texts that are not divided into words have few, and their perplexity has no number.
        "word_perplexity": math.exp(per_word) if per_word < 700 else None,
    }
