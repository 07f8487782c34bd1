"""Evaluates a declared task: options by log-likelihood, documents, answers that a model writes.

A task's items are worked on in blocks: what a block asks (`ask`), what the model says to it (`answer`; `cache` knows
what it said before), what is logged of that (`entries`, a pure function of the two, one an item).
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ctllm_jax.common.errors import UserError
from ctllm_jax.evaluate.cache import Groups
from ctllm_jax.evaluate.declarations import Benchmark, Item, Task, fill
from ctllm_jax.evaluate.declarations import options as templates
from ctllm_jax.evaluate.encoding import Opening, encode_open, encode_options, end_ids
from ctllm_jax.evaluate.engine import Request, Score, score_groups
from ctllm_jax.evaluate.extract import UNDECIDED, agreement, extracted, failed, until_stop
from ctllm_jax.evaluate.jail import Limits, run_programs
from ctllm_jax.evaluate.scoring import joined, no_number, windows
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


@dataclasses.dataclass(frozen=True)
class Block:
    """Items of a subset as a model is asked.

    Attributes:
      groups: requests, by item (of documents each on its own: their windows begin alike by chance only).
      encoded: how each item was asked: `Encoded`, `OpenPrompt`, or (text, number of windows) of a document.
    """

    benchmark: Benchmark
    subset: str
    items: list[Item]
    groups: list[list[Request | Opening]]
    encoded: list

    @property
    def label(self) -> str:
        """What a progress line calls it."""
        return f"{self.benchmark.task.name} {self.subset}".strip()


def ask(model: LoadedModel, benchmark: Benchmark, subset: str, items: list[Item], bos: bool) -> Block:
    """The requests of items of a subset; UserError as of `encode_options` and `encode_open`."""
    task = benchmark.task
    if task.kind == "rolling":
        texts = [fill(task.question, item.fields) for item in items]
        ids, opening = model.tokenizer.encode_batch(texts), model.tokenizer.opening_id
        groups = [windows(model, own, opening) for own in ids]
        encoded = [(text, len(own)) for text, own in zip(texts, groups, strict=True)]
        groups = [[window] for own in groups for window in own]
    elif task.kind == "generate":
        encoded = encode_open(model, benchmark, subset, items, bos)
        stops = frozenset(end_ids(model, benchmark))
        groups = [[Opening(asked.ids, task.max_tokens, stops)] for asked in encoded]
    else:
        encoded = encode_options(model, benchmark, subset, items, bos)
        groups = [[*own.requests, *own.alone] for own in encoded]
    return Block(benchmark, subset, items, groups, encoded)


def answer(
    model: LoadedModel, block: Block, groups: Groups, batch_tokens: int, label: str
) -> list[list[Score]] | list[list[list[int]]]:
    """What the model says to `groups`, some requests of the block: scores, or the ids that it goes on with.

    Raises:
      UserError: a score is no number.
    """
    if block.benchmark.task.kind != "generate":
        scores = score_groups(model, groups, batch_tokens, label)
        _refuse_nan(model, block, groups, scores)
        return scores
    openings = [opening for [opening] in groups]
    limits = {"max_tokens": openings[0].max_tokens, "stop_ids": openings[0].stop_ids}  # the same for all of a task
    return [[ids] for ids in generate(model, [opening.ids for opening in openings], **limits)]


def _refuse_nan(model: LoadedModel, block: Block, groups: Groups, scores: list[list[Score]]) -> None:
    """UserError that names the first item with a log-probability that is NaN."""
    for group, own in zip(groups, scores, strict=True):
        for request, found in zip(group, own, strict=True):
            if math.isnan(found.whole_logprob):
                raise no_number(model, f"{block.label}, item {_asking(block, request)}")


def _asking(block: Block, request: Request) -> str:
    """The id of the first item that asks a request."""
    counts = [count for _, count in block.encoded] if block.benchmark.task.kind == "rolling" else [1] * len(block.items)
    owners = [item for item, count in zip(block.items, counts, strict=True) for _ in range(count)]
    names = ({one.name for one in group} for group in block.groups)
    return next(item.id for item, own in zip(owners, names, strict=True) if request.name in own)


def entries(model: LoadedModel, block: Block, answers: Groups, isolate: bool = True) -> list[dict]:
    """The log entries of a block's items, by the answers to all its groups; `isolate` as in `jail.run_programs`."""
    task = block.benchmark.task
    if task.kind == "rolling":
        return _documents(block, answers)
    log = _written(model, block, answers, isolate) if task.kind == "generate" else _chosen(block, answers)
    if task.points:
        log = [entry | {"points": item.points} for item, entry in zip(block.items, log, strict=True)]
    return log


def evaluate_block(
    model: LoadedModel,
    benchmark: Benchmark,
    subset: str,
    items: list[Item],
    bos: bool,
    batch_tokens: int,
    isolate: bool = True,
) -> list[dict]:
    """The log entries of a block's items, all of them asked now."""
    block = ask(model, benchmark, subset, items, bos)
    return entries(model, block, answer(model, block, block.groups, batch_tokens, block.label), isolate)


def _chosen(block: Block, answers: list[list[Score]]) -> list[dict]:
    task = block.benchmark.task
    log = []
    for item, own, found in zip(block.items, block.encoded, answers, strict=True):
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


def _documents(block: Block, answers: list[list[Score]]) -> list[dict]:
    found = (score for [score] in answers)
    scores = [joined([next(found) for _ in range(count)]) for _, count in block.encoded]
    return [
        {
            "id": item.id,
            "logprob": score.sum_logprob,
            "tokens": score.tokens,
            "bytes": len(text.encode()),
            "words": len(_SPACE.split(text)),
        }
        for item, (text, _), score in zip(block.items, block.encoded, scores, strict=True)
    ]


def _written(model: LoadedModel, block: Block, answers: list[list[list[int]]], isolate: bool) -> list[dict]:
    task, items, stops = block.benchmark.task, block.items, end_ids(model, block.benchmark)
    log = []
    for item, asked, [ids] in zip(items, block.encoded, answers, strict=True):
        whole = model.tokenizer.decode([token for token in ids if token not in stops])
        text = until_stop(whole, task.stop)
        found = {metric: extracted(name, text, item.answers) for metric, name in task.extract.items()}
        log.append(
            {
                "id": item.id,
                "prompt": asked.prompt,
                "text": text,
                "finished": not stops.isdisjoint(ids) or text != whole,
                "extracted": found,
                "accepted": item.answers,
                # The empty text is an answer where it is an accepted one.
                "failed": {metric: failed(own) and own not in item.answers for metric, own in found.items()},
                "shots": asked.shots,
                "cut": asked.cut,
            }
        )
    for metric in task.extract:
        own = [entry["extracted"][metric] for entry in log]
        for entry, right in zip(log, judged(task, metric, items, own, isolate), strict=True):
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
