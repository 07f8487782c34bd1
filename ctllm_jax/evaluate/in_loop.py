"""What a run looks at while training goes on: held-out data, a few questions, samples from fixed prompts.

Everything runs on the parameters as they lie, over the run's own mesh, in all processes; nothing of it reaches the
training. Each look has one compiled program and one shape.

Legend: B rows, L length, D model width, V vocabulary.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import here_or_shipped, read_jsonl, write_jsonl
from ctllm_jax.cross_entropy import label_logprobs
from ctllm_jax.data.batches import held_out, rows_arrays
from ctllm_jax.data.chat import own_template
from ctllm_jax.data.record import Row
from ctllm_jax.data.store import TokenStore
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.evaluate.declarations import Benchmark, load_benchmark, load_task
from ctllm_jax.evaluate.prompts import head as opening
from ctllm_jax.evaluate.prompts import option_prompts
from ctllm_jax.evaluate.scoring import encode_pairs
from ctllm_jax.generate import bucket, decodable, encode_prompt
from ctllm_jax.model import ModelConfig, head, hidden_states
from ctllm_jax.objectives import Batch, Objective
from ctllm_jax.products import head_logits
from ctllm_jax.sharding import devices_over
from ctllm_jax.step import batch_sharding, summed


@dataclasses.dataclass(frozen=True)
class InLoopConfig:
    """How often a run looks at itself, and at what."""

    every: int  # [steps] between looks; there is one before the first step and one after the last
    batches: int  # [batches] most batches of held-out data of each source at a look
    tasks: tuple[str, ...]  # declared tasks of kind lm_eval: TOML files, looked for here, then in the repository
    items: int  # [questions] most questions of each task: spread evenly over its rows, the same ones at every look
    prompts: tuple[str, ...]  # continued in samples.jsonl; a user's messages where the store holds conversations
    sample_tokens: int  # [tokens] most tokens of a continuation

    def __post_init__(self):
        if self.every < 1 or self.batches < 0:
            raise ValueError("every must be at least 1, batches must not be negative")
        if self.items < 1 or self.sample_tokens < 1:
            raise ValueError("items and sample_tokens must be at least 1; to switch them off give no tasks, no prompts")


# ---- What is asked, made ready before a run begins


@dataclasses.dataclass(frozen=True)
class Question:
    """A question: a row for each choice, in which the choice's tokens count."""

    rows: list[Row]
    answer: int


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, its ids, and how many tokens may follow them."""

    text: str
    ids: list[int]
    room: int


@dataclasses.dataclass(frozen=True)
class Probes:
    """What a run is asked at every look.

    Attributes:
      questions: by task.
      stop_ids: ids that end a continuation.
    """

    tokenizer: Tokenizer
    questions: dict[str, list[Question]]
    prompts: list[Prompt]
    stop_ids: frozenset[int]

    @property
    def chance(self) -> dict[str, float]:
        """The accuracy of guessing, by task."""
        return {
            f"chance/{name}": sum(1 / len(question.rows) for question in own) / len(own)
            for name, own in self.questions.items()
        }


def make_probes(config: InLoopConfig, store: TokenStore, max_length: int) -> Probes:
    """Reads and encodes what the config names.

    Raises:
      UserError: a task is missing or faulty, two have the same name, or something is too long for the model.
    """
    tokenizer, questions = store.tokenizer, {}
    for path in config.tasks:
        task = load_task(str(here_or_shipped(path)))
        if task.name in questions:
            raise UserError(f"eval.tasks: two tasks are called {task.name}")
        if task.kind != "lm_eval" or not task.gold:
            raise UserError(f"eval.tasks: {task.name} is of kind {task.kind}; while training only lm_eval can be asked")
        questions[task.name] = _questions(load_benchmark(task, ""), config.items, tokenizer, max_length)
    template, prompts = own_template(tokenizer) if config.prompts and store.kind != "pretrain" else None, []
    for text in config.prompts:
        ids = encode_prompt(tokenizer, text, template)
        room = min(config.sample_tokens, max_length - len(ids))
        if room < 1:
            raise UserError(
                f"eval.prompts: {text[:40]!r} has {len(ids)} tokens; the model takes {max_length}, and nothing is left "
                "for a continuation"
            )
        prompts.append(Prompt(text, ids, room))
    stops = {tokenizer.eos_id, *(template.end_ids if template else ())}
    return Probes(tokenizer, questions, prompts, frozenset(stops))


def _questions(benchmark: Benchmark, most: int, tokenizer: Tokenizer, max_length: int) -> list[Question]:
    """Evenly spread questions of a task. A context that does not fit loses its beginning, as in `ctllm eval`."""
    task, items = benchmark.task, [item for own in benchmark.items.values() for item in own if item.gold is not None]
    count, found = min(most, len(items)), []
    for number in range(count):
        item, rows = items[number * len(items) // count], []
        before = opening(benchmark, item.subset, task.shots.count if task.shots else 0)
        prompts = option_prompts(task, item, before)
        pairs = [(prompt.context, prompt.delimiter + prompt.continuation) for prompt in prompts]
        for context, own in encode_pairs(tokenizer, pairs, bos=True):
            if len(own) > max_length:
                raise UserError(
                    f"eval.tasks: {task.name}, question {item.id}: a choice of {len(own)} tokens; the model takes "
                    f"{max_length}"
                )
            context = context[max(0, len(context) + len(own) - 1 - max_length) :]
            mask = np.array([0] * len(context) + [1] * len(own), np.uint8)
            rows.append(Row(np.array([*context, *own], np.int32), [len(mask)], [], mask, 0))
        found.append(Question(rows, item.gold))
    return found


# ---- Looks


class InLoop:
    """Everything that a run looks at."""

    def __init__(self, held_out: "HeldOut", probes: Probes, model: ModelConfig, mesh: Mesh):
        self._held_out = held_out
        self._questions = Questions(probes, model, mesh) if probes.questions else None
        self._samples = Samples(probes, model, mesh) if probes.prompts else None

    def evaluate(self, params: dict, reference: dict | None) -> dict[str, float]:
        """Figures of held-out data, as `HeldOut.evaluate` gives them, and the accuracy of each task."""
        accuracies = self._questions.accuracies(params) if self._questions else {}
        return {**self._held_out.evaluate(params, reference), **accuracies}

    def sample(self, params: dict) -> list[dict]:
        """{"prompt", "text"} for each prompt."""
        return self._samples.generate(params) if self._samples else []


class HeldOut:
    """The held-out split of a run's store, scored by the run's own objective."""

    def __init__(
        self,
        config: InLoopConfig,
        store: TokenStore,
        batch_size: int,
        microbatches: int,
        mask_documents: bool,
        mesh: Mesh,
        objective: Objective,
    ):
        self._kind = store.kind
        self._reading = (store, "validation", batch_size, config.batches, mask_documents, mesh)

        def sums(params: dict, reference: dict | None, batch: Batch) -> dict[str, jax.Array]:
            return summed(lambda piece: objective(params, reference, piece)[1], batch, microbatches)

        self._sums = jax.jit(sums, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def evaluate(self, params: dict, reference: dict | None) -> dict[str, float]:
        """Means over the held-out split: loss over all and by source; bits per byte for documents, rewards for pairs.

        Empty where the store has no such split.
        """
        totals: dict[str, collections.Counter] = {}
        for source, text_bytes, batch in held_out(*self._reading):
            sums = jax.device_get(self._sums(params, reference, batch))
            scalars = {name: float(value) for name, value in sums.items() if np.ndim(value) == 0}
            totals.setdefault(source, collections.Counter()).update({"bytes": text_bytes, **scalars})
        return _means(totals, self._kind) if totals else {}


def _means(totals: dict[str, collections.Counter], kind: str) -> dict[str, float]:
    names = {name for total in totals.values() for name in total}
    whole = {name: sum(total[name] for total in totals.values()) for name in names}
    result = {"count": whole["count"], "loss": whole["loss"] / whole["count"]}
    result |= {f"loss/{source}": total["loss"] / total["count"] for source, total in totals.items()}
    if kind == "pretrain":
        bits = {"": whole, **{f"/{source}": total for source, total in totals.items()}}
        result |= {f"bits_per_byte{name}": t["loss"] / np.log(2) / t["bytes"] for name, t in bits.items()}
    return result | {name: whole[name] / whole["count"] for name in sorted(names - {"count", "loss", "bytes"})}


class Questions:
    """Multiple choice: the choice of the largest log-probability wins, as `sum` of `ctllm eval`."""

    def __init__(self, probes: Probes, model: ModelConfig, mesh: Mesh):
        self._mesh, self._questions = mesh, probes.questions
        rows = [row for questions in probes.questions.values() for question in questions for row in question.rows]
        L = _length(max(len(row.tokens) for row in rows), model, mesh)
        # A device takes as many tokens at a time as a row of training has, at most.
        B = _rows(min(len(rows), max(1, model.max_length // L) * devices_over(mesh.shape, "batch")), mesh)
        self._arrays = [rows_arrays(rows[start : start + B], L, "chat", True) for start in range(0, len(rows), B)]
        self._shape = B
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._score = jax.jit(functools.partial(_logprobs, model), out_shardings=everywhere)

    def accuracies(self, params: dict) -> dict[str, float]:
        """The share of each task's questions that are answered rightly."""
        # One after the other: the collectives of two programs under way may meet in another order in each process of a
        # job on CPUs, and then none ends.
        found = [
            jax.device_get(self._score(params, _spread(arrays, self._shape, self._mesh))) for arrays in self._arrays
        ]
        scores = iter(np.concatenate(found))
        return {
            f"accuracy/{name}": float(
                np.mean([np.argmax([next(scores) for _ in question.rows]) == question.answer for question in questions])
            )
            for name, questions in self._questions.items()
        }


def _logprobs(model: ModelConfig, params: dict, batch: Batch) -> jax.Array:
    """Log-probability of each row's weighted labels [B]."""
    x_BLD = hidden_states(model, params, batch["tokens"], batch["positions"], batch["segments"])
    logprob_BL, _ = label_logprobs(x_BLD, head(model, params), batch["labels"], model.vocab_size)
    return jnp.sum(logprob_BL * batch["weights"], axis=-1)


class Samples:
    """What the model goes on with, the most probable token each time."""

    def __init__(self, probes: Probes, model: ModelConfig, mesh: Mesh):
        self._mesh, self._probes = mesh, probes
        L = _length(max(len(prompt.ids) + prompt.room for prompt in probes.prompts), model, mesh)
        tokens_BL, length_B = np.zeros((len(probes.prompts), L), np.int32), np.zeros(len(probes.prompts), np.int32)
        for row, prompt in enumerate(probes.prompts):
            tokens_BL[row, : len(prompt.ids)], length_B[row] = prompt.ids, len(prompt.ids)
        self._arrays = {"tokens": tokens_BL, "length": length_B}
        steps = max(prompt.room for prompt in probes.prompts)
        everywhere = NamedSharding(mesh, PartitionSpec())
        go_on = functools.partial(_go_on, decodable(model, probes.tokenizer), steps)
        self._go_on = jax.jit(go_on, out_shardings=everywhere)

    def generate(self, params: dict) -> list[dict]:
        """{"prompt", "text"} for each prompt."""
        prompts = self._probes.prompts
        batch = _spread(self._arrays, _rows(len(prompts), self._mesh), self._mesh)
        tokens_BL = jax.device_get(self._go_on(params, batch["tokens"], batch["length"]))[: len(prompts)]
        found = []
        for prompt, tokens_L in zip(prompts, tokens_BL, strict=True):
            new = tokens_L[len(prompt.ids) :][: prompt.room].tolist()
            end = next((place for place, token in enumerate(new) if token in self._probes.stop_ids), len(new))
            found.append({"prompt": prompt.text, "text": self._probes.tokenizer.decode(new[:end])})
        return found


def _go_on(model: ModelConfig, steps: int, params: dict, tokens_BL: jax.Array, length_B: jax.Array) -> jax.Array:
    """Puts the most probable token behind each row, `steps` times.

    The whole row is computed anew for each token: a few short rows cost less than the look at held-out data, and any
    mesh and attention backend that trains can do it, which a cache could not.
    """
    slot_L = jnp.arange(tokens_BL.shape[1])
    positions_BL = jnp.broadcast_to(slot_L, tokens_BL.shape)

    def one(_, state):
        tokens_BL, length_B = state
        segments_BL = (slot_L < length_B[:, None]).astype(jnp.int32)
        x_BLD = hidden_states(model, params, tokens_BL, positions_BL, segments_BL)
        x_B1D = jnp.take_along_axis(x_BLD, length_B[:, None, None] - 1, axis=1)
        logits_BV = head_logits(x_B1D, head(model, params))[:, 0, : model.vocab_size]
        next_B1 = jnp.argmax(logits_BV, axis=-1)[:, None].astype(jnp.int32)
        return jnp.where(slot_L == length_B[:, None], next_B1, tokens_BL), length_B + 1

    return jax.lax.fori_loop(0, steps, one, (tokens_BL, length_B))[0]


def _rows(count: int, mesh: Mesh) -> int:
    """The next number of rows that lies evenly over the mesh."""
    ways = devices_over(mesh.shape, "batch")
    return -(-count // ways) * ways


def _length(longest: int, model: ModelConfig, mesh: Mesh) -> int:
    """The next bucketed length that lies evenly over the mesh."""
    ways = devices_over(mesh.shape, "length")
    return -(-bucket(longest, model.max_length) // ways) * ways


def _spread(arrays: dict[str, np.ndarray], rows: int, mesh: Mesh) -> Batch:
    """Arrays [., L] or [.] that every process has, laid out over the mesh; empty rows fill them up."""

    def put(array: np.ndarray) -> jax.Array:
        whole = np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))
        layout = batch_sharding(mesh, (), narrow=array.ndim == 1)
        return jax.make_array_from_callback(whole.shape, layout, lambda index: whole[index])

    return {name: put(array) for name, array in arrays.items()}


# ---- samples.jsonl


class SamplesLog:
    """A run's samples.jsonl: {"step", "prompt", "text"} a line, whole at any time.

    What lies beyond the step that the run goes on from is dropped, as in metrics.jsonl.
    """

    def __init__(self, run_dir: pathlib.Path, resume_step: int, writes: bool):
        """`writes` is False in all processes but the first."""
        self._path, self._writes = run_dir / "samples.jsonl", writes
        old = read_jsonl(self._path) if writes and self._path.exists() else []
        self._entries = [entry for entry in old if resume_step and entry["step"] <= resume_step]
        if len(self._entries) < len(old):
            write_jsonl(self._path, self._entries)

    def write(self, step: int, samples: Sequence[dict]) -> None:
        """Adds the samples of a step."""
        if self._writes and samples:
            self._entries += [{"step": step, **sample} for sample in samples]
            write_jsonl(self._path, self._entries)
