"""`ctllm select`: of conversations, those whose answers a model finds neither too surprising nor too plain.

Two values of each, over the tokens of its answers and of the ends of their turns:
  perplexity  exp of the mean negative log-likelihood of a token, given all that stands before the answer
  ifd         instruction-following difficulty (arXiv 2308.12032): that mean, divided by the mean of the same tokens
              after the opening id alone. From 1 on, what was asked is of no help; near 0 it gives the answer away

Writes {workdir}/parts/<number>.jsonl, the values block by block, so that an interrupted run goes on; then scored.jsonl
(every conversation with its values), kept.jsonl (for `ctllm tokenize`) and rejected.jsonl (values and every reason).
Limits are tried out without a model: `scores` names an earlier folder, whose values are taken.
"""

import collections
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, expand, file_digest, read_jsonl, write_jsonl
from ctllm_jax.common.manifest import Stage, open_stage, read_result
from ctllm_jax.compiled import keep_compiled
from ctllm_jax.data.chat import ChatTemplate, broken_text, load_template, own_template
from ctllm_jax.data.conversations import read_conversations
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.evaluate.devices import on_each_device, spread
from ctllm_jax.evaluate.engine import Request, Score, score_groups
from ctllm_jax.loading import LoadedModel, load_model

BLOCK = 256  # conversations scored between two writes
VALUES = ("perplexity", "ifd")


@dataclasses.dataclass(frozen=True)
class Limits:
    """The least and the most that a value may be; None is no bound."""

    least: float | None  # [the value's] smaller ones are rejected; None: no bound
    most: float | None  # [the value's] larger ones are rejected; None: no bound


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """What `ctllm select` reads."""

    input: tuple[str, ...]  # conversations, as `ctllm tokenize` reads them; or none, with `scores`
    model: str  # run directory or Hugging Face folder that scores them
    step: int | None  # [steps] checkpoint of a run; None is the newest
    dtype: str | None  # compute dtype; None is the model's own
    tensor: int  # [devices] over which heads and widths of a copy of the model are split
    template: str | None  # "plain" (a line a message), or as `ctllm tokenize` has them; None is the model's own
    batch_tokens: int  # [tokens] most tokens of a batch; decides speed and memory
    scores: str | None  # folder of an earlier `ctllm select`, whose values are taken instead
    perplexity: Limits  # limits of the answers' perplexity, given their questions
    ifd: Limits  # limits of perplexity with the question over perplexity without it
    hardest: float  # [share] of the conversations within the limits that is kept: those of the highest ifd

    def __post_init__(self):
        if bool(self.scores) == bool(self.input or self.model):
            raise ValueError("give input and model, or scores, a folder of an earlier selection")
        if not self.scores and not (self.input and self.model):
            raise ValueError("input and model go together: what is scored, and what scores it")
        if not 0 < self.hardest <= 1:
            raise ValueError(f"hardest {self.hardest} is not a share: it must be above 0, and 1 at most")


def run(config: SelectConfig, workdir: str) -> dict:
    """Scores and selects, or goes on where it was cut short. Returns counts, and how the values are spread."""
    limits = {name: dataclasses.asdict(getattr(config, name)) for name in VALUES}
    settings = {"limits": limits, "hardest": config.hardest}
    if config.scores:
        mark, earlier = read_result(config.scores, "select")
        stage = open_stage("select", 1, workdir, settings, {"scores": mark})
        if not stage.done:
            counts = {name: earlier[name] for name in ("unusable", "cut")}
            _select(stage, config, _scored(config.scores), [], counts)
        return _print_result(stage)
    keep_compiled()
    model = load_model(config.model, config.step, config.dtype, config.tensor)
    files = expand(config.input)
    template = _template(config.template, model)
    settings |= {"template": template.jinja, "dtype": config.dtype}
    inputs = {"model": model.digest, "input": [file_digest(file) for file in files]}
    stage = open_stage("select", 1, workdir, settings, inputs)
    if not stage.done:
        records, unusable = read_conversations(files, template)
        if not records:
            why = f"; the first record: {unusable[0]['reason']}" if unusable else ""
            raise UserError(f"select: no conversation in {', '.join(files[:3])}{why}")
        scored, cut = _score(stage.folder, model, template, config.batch_tokens, records)
        write_jsonl(stage.folder / "scored.jsonl", scored)
        _select(stage, config, scored, unusable, {"unusable": len(unusable), "cut": cut})
    return _print_result(stage)


# ---- Scoring


class PlainTemplate(ChatTemplate):
    """For models that know no conversations: a line for each message, and the end of document after the last."""

    jinja = "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.end_ids = tokenizer, (tokenizer.eos_id,)

    def render(self, messages, learn="last"):
        given = self.render_prompt(messages[:-1])
        last = [*self.tokenizer.encode(messages[-1]["content"]), self.tokenizer.eos_id]
        return given + last, [0] * len(given) + [1] * len(last)

    def render_prompt(self, messages):
        lines = self.tokenizer.encode_batch([message["content"] + "\n" for message in messages])
        return [*self.tokenizer.start_ids, *itertools.chain.from_iterable(lines)]

    def refusal(self, messages, learn="last"):
        return broken_text(messages)


def _template(name: str | None, model: LoadedModel) -> ChatTemplate:
    if name == "plain":
        return PlainTemplate(model.tokenizer)
    return own_template(model.tokenizer) if name is None else load_template(name, model.tokenizer)


def _score(
    folder: pathlib.Path, model: LoadedModel, template: ChatTemplate, batch_tokens: int, records: list[dict]
) -> tuple[list[dict], int]:
    """(records with their values, how many have answers that the model's context cut)."""
    blocks = [records[start : start + BLOCK] for start in range(0, len(records), BLOCK)]
    paths = [folder / "parts" / f"{number:05d}.jsonl" for number in range(len(blocks))]

    def work(model: LoadedModel, number: int) -> None:
        label = f"select: block {number + 1} of {len(blocks)}"
        write_jsonl(paths[number], score_block(model, template, blocks[number], batch_tokens, label))

    for _ in spread(on_each_device(model), work, (n for n, path in enumerate(paths) if not path.exists())):
        pass
    found = [entry for path in paths for entry in read_jsonl(path)]
    scored = [{**record, "values": own["values"]} for record, own in zip(records, found, strict=True)]
    return scored, sum(own["cut"] for own in found)


def score_block(
    model: LoadedModel, template: ChatTemplate, records: Sequence[dict], batch_tokens: int, label: str
) -> list[dict]:
    """{"values": {perplexity, ifd, tokens} or None, "cut"} of each record, which has messages.

    Tokens beyond the model's context are not scored (`cut`); where no token of an answer fits there are no values.

    Raises:
      UserError: the template refuses a conversation.
    """
    encoded = [_requests(model, template, record["messages"]) for record in records]
    groups = [group for given, alone, _ in encoded for group in (given, alone)]
    scores = score_groups(model, groups, batch_tokens, label)
    return [
        {"values": _values(given, alone), "cut": cut}
        for given, alone, (_, _, cut) in zip(scores[::2], scores[1::2], encoded, strict=True)
    ]


def _requests(
    model: LoadedModel, template: ChatTemplate, messages: list[dict]
) -> tuple[list[Request], list[Request], bool]:
    """(each answer given all before it, each after the opening id alone, whether anything did not fit)."""
    opening, most = model.tokenizer.opening_id, model.config.max_length + 1
    given, alone, cut = [], [], False
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        ids, mask = template.render(messages[:number], "last")
        start, stop = mask.index(1), len(mask) - mask[::-1].index(1)
        cut |= stop > most
        if answer := ids[start : min(stop, most)]:
            given.append(Request(ids[: start + len(answer)], start, 0))
            alone.append(Request([opening, *answer], 1, 0))
    return given, alone, cut


def _values(given: list[Score], alone: list[Score]) -> dict | None:
    tokens = sum(score.tokens for score in given)
    if not tokens:
        return None
    nll, bare = (-sum(score.sum_logprob for score in scores) for scores in (given, alone))
    return {"perplexity": math.exp(min(nll / tokens, 700.0)), "ifd": nll / max(bare, 1e-9), "tokens": tokens}


# ---- Selecting


def _scored(folder: str) -> list[dict]:
    path = as_path(folder) / "scored.jsonl"
    if not path.exists():
        raise UserError(f"{folder} took its values from another folder; give that one as scores")
    return read_jsonl(path)


def reasons(values: dict | None, config: SelectConfig) -> list[str]:
    """Why a conversation of these values is not kept, as far as it can be told from it alone."""
    if values is None:
        return ["no token of an answer fits the model's context"]
    found = []
    for name in VALUES:
        limits = getattr(config, name)
        if limits.least is not None and values[name] < limits.least:
            found.append(f"{name} below {limits.least:g}")
        if limits.most is not None and values[name] > limits.most:
            found.append(f"{name} above {limits.most:g}")
    return found


def _select(stage: Stage, config: SelectConfig, scored: list[dict], unusable: list[dict], counts: dict) -> None:
    why = [reasons(record["values"], config) for record in scored]
    within = [place for place, own in enumerate(why) if not own]
    order = sorted(within, key=lambda place: scored[place]["values"]["ifd"], reverse=True)
    for place in order[math.ceil(config.hardest * len(order)) :]:
        why[place].append(f"ifd not among the highest {config.hardest:g} of those within the limits")
    kept = [record for record, own in zip(scored, why, strict=True) if not own]
    rejected = [{**record, "reasons": own} for record, own in zip(scored, why, strict=True) if own]
    write_jsonl(stage.folder / "kept.jsonl", kept)
    write_jsonl(stage.folder / "rejected.jsonl", [*rejected, *unusable])
    stage.finish(
        {
            "conversations": len(scored),
            "kept": len(kept),
            "tokens": sum(record["values"]["tokens"] for record in kept),
            **counts,
            "reasons": dict(collections.Counter(reason for own in why for reason in own)),
            "quantiles": _quantiles([record["values"] for record in scored if record["values"]]),
        }
    )


def _quantiles(values: list[dict]) -> dict[str, dict[str, float]]:
    """{value: {"0%", "1%", "5%", "10%", "25%", ...}}: where limits would have to lie."""
    shares = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
    return {
        name: {f"{share}%": float(np.percentile([own[name] for own in values], share)) for share in shares}
        for name in VALUES
        if values
    }


def _print_result(stage: Stage) -> dict:
    """The result, which is also printed."""
    result = stage.result
    print(
        f"select: {result['kept']:,} of {result['conversations']:,} conversations kept; {result['unusable']:,} records "
        f"are not conversations, {result['cut']:,} have answers beyond the model's context"
    )
    for reason, count in result["reasons"].items():
        print(f"  {count:,} {reason}")
    for name, quantiles in result["quantiles"].items():
        print(f"  {name}: " + "  ".join(f"{share} {value:.4g}" for share, value in quantiles.items()))
    return result
