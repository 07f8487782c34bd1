"""From declared texts to requests of ids, with what each protocol does to prompts that are too long.

OpenCompass drops solved examples from the last on until a prompt fits, and an option starts with as many as the one
before was left with; what still does not fit loses its beginning. lm-eval-harness cuts the beginning at once. Both are
counted.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.chat import ChatTemplate, own_template
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.evaluate.cache import named
from ctllm_jax.evaluate.declarations import Benchmark, Item, Task
from ctllm_jax.evaluate.engine import Request
from ctllm_jax.evaluate.prompts import Prompt, head, open_prompt, option_prompts, turns
from ctllm_jax.evaluate.scoring import encode_pairs, fitted
from ctllm_jax.loading import LoadedModel


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An item's requests.

    Attributes:
      prompts: the text of each option.
      requests: one an option.
      alone: each continuation after the opening id, of tasks that are scored by mutual information too.
      shots: solved examples that the last option was left with.
    """

    prompts: list[Prompt]
    requests: list[Request]
    alone: list[Request]
    shots: int


@dataclasses.dataclass(frozen=True)
class Opening:
    """A request for the likeliest ids after these, one by one: `max_tokens` at most, up to the first stop id."""

    ids: Sequence[int]
    max_tokens: int
    stop_ids: frozenset[int]

    @functools.cached_property
    def name(self) -> bytes:
        """Names what decides the ids that follow (see `cache`)."""
        return named("go on", self.max_tokens, sorted(self.stop_ids), ids=self.ids)

    def kept(self, answer: list[int]) -> list[int]:
        """They are kept as they are."""
        return answer

    def restored(self, kept: list[int]) -> list[int]:
        """The ids that were kept."""
        return kept


class OpenPrompt(NamedTuple):
    """How an item of a generate task is asked.

    Attributes:
      prompt: the text, or the messages of a conversation (`prompts.turns`).
      shots: solved examples that it was left with.
      cut: ids that did not fit and were left out, from the beginning.
    """

    prompt: str | list[dict]
    ids: list[int]
    shots: int
    cut: int


def opening_ids(model: LoadedModel, bos: bool) -> list[int]:
    """What a text begins with: the beginning-of-document id, or the end's where there is none."""
    return [model.tokenizer.opening_id] if bos else []


def encode_options(
    model: LoadedModel, benchmark: Benchmark, subset: str, items: list[Item], bos: bool
) -> list[Encoded]:
    """Requests of the options of a subset's items.

    Raises:
      UserError: an option adds no token to its context.
    """
    task = benchmark.task
    shots = task.shots.count if task.shots else 0
    prompts = [option_prompts(task, item, head(benchmark, subset, shots)) for item in items]
    if task.kind in ("ppl", "ll"):
        return _encode_whole(model, benchmark, items, prompts, bos)
    flat = [(prompt.context, prompt.delimiter + prompt.continuation) for own in prompts for prompt in own]
    pairs = iter(encode_pairs(model.tokenizer, flat, bos))
    alone = iter(encode_pairs(model.tokenizer, [("", text) for _, text in flat], bos) if task.mutual else [])
    return [
        Encoded(
            own,
            [fitted(model, *next(pairs), f"{task.name} {item.id}") for _ in own],
            [fitted(model, *next(alone), f"{task.name} {item.id}") for _ in own if task.mutual],
            shots,
        )
        for item, own in zip(items, prompts, strict=True)
    ]


def _encode_whole(
    model: LoadedModel, benchmark: Benchmark, items: list[Item], prompts: list[list[Prompt]], bos: bool
) -> list[Encoded]:
    task, limit = benchmark.task, model.config.max_length
    opening = opening_ids(model, bos)
    texts = list(dict.fromkeys(text for own in prompts for prompt in own for text in _texts(task, prompt)))
    known = dict(zip(texts, model.tokenizer.encode_batch(texts), strict=True))

    def ids(text: str) -> list[int]:
        return opening + (known[text] if text in known else model.tokenizer.encode(text))

    encoded = []
    for item, own in zip(items, prompts, strict=True):
        shots = task.shots.count if task.shots else 0
        kept, requests = [], []
        for number, prompt in enumerate(own):
            while True:
                if shots < (task.shots.count if task.shots else 0):
                    prompt = option_prompts(task, item, head(benchmark, item.subset, shots))[number]
                whole, before = (ids(text) for text in _texts(task, prompt))
                if len(whole) <= limit or not shots:
                    break
                shots -= 1
            cut = max(0, len(whole) - limit)
            if len(whole) < 2:
                raise UserError(f"{task.name} {item.id}: option {number} has no text")
            kept.append(prompt)
            requests.append(Request(whole[cut:], min(max(1, len(before) - cut), len(whole) - cut), cut))
        encoded.append(Encoded(kept, requests, [], shots))
    return encoded


def _texts(task: Task, prompt: Prompt) -> tuple[str, str]:
    """(the whole text, what of it comes before the continuation)."""
    if task.kind == "ll":
        return prompt.text, prompt.text.replace(prompt.continuation, "")
    return prompt.text, prompt.context + prompt.delimiter


@functools.lru_cache(maxsize=1)
def _template(tokenizer: Tokenizer) -> ChatTemplate:
    """The model's own template, made once for all blocks: it reads a tokenizer's file again."""
    return own_template(tokenizer)


def end_ids(model: LoadedModel, benchmark: Benchmark) -> set[int]:
    """Ids after which a written answer ends."""
    template_ends = _template(model.tokenizer).end_ids if benchmark.chat else ()
    return {model.tokenizer.eos_id, *template_ends}


def encode_open(
    model: LoadedModel, benchmark: Benchmark, subset: str, items: list[Item], bos: bool
) -> list[OpenPrompt]:
    """Prompts of the items of a generate task.

    A benchmark asked in conversation is rendered by the model's own chat template; `bos` does not count there, a
    template opens as it was learned.

    Raises:
      UserError: the answers do not fit the model, it has no chat template, or that refuses an item.
    """
    task = benchmark.task
    limit = model.config.max_length - task.max_tokens
    if limit < 1:
        raise UserError(f"{task.name}: {task.max_tokens} new tokens do not fit {model.name}")
    count = task.shots.count if task.shots else 0
    least = 0 if task.shots and task.shots.drop else count
    ask, encode = _turns(model, benchmark) if benchmark.chat else _plain(model, benchmark, subset, bos)
    prompts = [ask(item, count) for item in items]
    found = []
    for item, prompt, ids in zip(items, prompts, encode(prompts), strict=True):
        shots = count
        while len(ids) > limit and shots > least:
            shots -= 1
            prompt = ask(item, shots)
            [ids] = encode([prompt])
        cut = max(0, len(ids) - limit)
        found.append(OpenPrompt(prompt, ids[cut:], shots, cut))
    return found


def _plain(model: LoadedModel, benchmark: Benchmark, subset: str, bos: bool) -> tuple[Callable, Callable]:
    """How an item is asked with a number of examples, and how such prompts are encoded."""
    opening = opening_ids(model, bos)
    return (
        lambda item, shots: open_prompt(benchmark.task, item, head(benchmark, subset, shots)),
        lambda prompts: [[*opening, *ids] for ids in model.tokenizer.encode_batch(prompts)],
    )


def _turns(model: LoadedModel, benchmark: Benchmark) -> tuple[Callable, Callable]:
    """The same in conversation."""
    template = _template(model.tokenizer)

    def encode(talks: list[list[dict]]) -> list[list[int]]:
        try:
            return [template.render_prompt(talk) for talk in talks]
        except UserError as error:
            raise UserError(f"{benchmark.task.name}: {error}") from None

    return lambda item, shots: turns(benchmark, item, shots), encode
