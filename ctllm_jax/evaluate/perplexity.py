"""Held-out language modelling on a token store, beside what a unigram model reaches on the very same tokens.

A token is predicted if it follows another of its own document: the same tokens that training learns
(end-of-document included, a document's first token not), seen under the same document mask.

Legend: B rows, L length, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.progress import Progress
from ctllm_jax.data.batches import row_arrays
from ctllm_jax.data.store import TokenStore
from ctllm_jax.evaluate.devices import spread
from ctllm_jax.evaluate.scoring import next_token_logprobs, no_number
from ctllm_jax.loading import LoadedModel, check_ids


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
    """Which rows are read."""

    store: str  # folder of `ctllm tokenize`
    split: str  # of the store: "validation" or "train"
    rows: int  # [rows] most held-out rows of each source
    baseline_rows: int  # [rows] most train rows of each source that the unigram baseline counts

    def __post_init__(self):
        if self.rows < 1 or self.baseline_rows < 0:
            raise ValueError("rows must be at least 1, baseline_rows must not be negative")


def perplexity(models: Sequence[LoadedModel], store: TokenStore, config: PerplexityConfig, batch_tokens: int) -> dict:
    """Held-out figures of each source and of "total".

    Args:
      models: the model on each device, as `devices.on_each_device` gives it; each takes a batch at a time.
      batch_tokens: most tokens of a batch (a batch has one row at least); decides speed and memory.

    Returns:
      {source: {rows, tokens (predicted), bytes, nats_per_token, stderr (of nats_per_token, over rows),
      perplexity, bits_per_byte, unigram_nats_per_token, unigram_bits_per_byte}}; the bits per byte are None
      for chat stores, whose rows count bytes that are not predicted.

    Raises:
      UserError: another tokenizer's store, a preference store, rows beyond the model's context, no such split, or a
        log-probability that is no number.
    """
    model = models[0]
    if store.kind == "preference":
        raise UserError(f"{store.folder} holds preference pairs; perplexity needs documents or conversations")
    if store.info["tokenizer"]["digest"] != model.tokenizer.digest:
        raise UserError(f"{store.folder} was made with another tokenizer than {model.name} has")
    if store.sequence_length > model.config.max_length:
        raise UserError(
            f"{store.folder}: rows of {store.sequence_length} tokens, {model.name} takes {model.config.max_length}"
        )
    if not store.sources(config.split):
        raise UserError(f"{store.folder} has no rows in split {config.split!r}")
    unigram_V = _unigram(store, model.config.vocab_size, config.baseline_rows)
    sources = {source: min(store.size(config.split, source), config.rows) for source in store.sources(config.split)}
    size = max(1, batch_tokens // store.sequence_length)
    found: dict[str, dict[int, list[tuple]]] = {source: {} for source in sources}

    def work(model: LoadedModel, job: tuple[str, int, list[dict]]) -> tuple[str, int, list[tuple]]:
        source, start, batch = job
        rows = _row_sums(model, unigram_V, batch, size)
        for number, (nll, *_) in enumerate(rows, start):
            if math.isnan(nll):
                raise no_number(model, f"{store.folder}, {source}, row {number} of {config.split}")
        return source, start, rows

    with Progress("perplexity", sum(sources.values()), "rows") as progress:
        for source, start, rows in spread(models, work, _batches(store, config.split, sources, size)):
            found[source][start] = rows
            progress.add(len(rows))
    sums = {source: np.concatenate([rows for _, rows in sorted(own.items())]) for source, own in found.items()}
    figures = {source: _figures(own, store.kind) for source, own in sums.items()}
    return {**figures, "total": _figures(np.concatenate(list(sums.values())), store.kind)}


def _unigram(store: TokenStore, vocab_size: int, most: int) -> np.ndarray:
    """Log-probability of each id: counts of predicted tokens in the train split, one added to each."""
    count_V = np.ones(vocab_size, np.float64)
    for source in store.sources("train"):
        for index in range(min(store.size("train", source), most)):
            arrays = row_arrays(store.row("train", source, index), store.sequence_length, store.kind, True)
            np.add.at(count_V, arrays["labels"], arrays["weights"])
    return np.log(count_V / count_V.sum())


def _batches(
    store: TokenStore, split: str, sources: dict[str, int], size: int
) -> Iterator[tuple[str, int, list[dict]]]:
    """(source, its first row, rows as arrays, each with its "bytes") of the first rows of each source."""
    for source, most in sources.items():
        for start in range(0, most, size):
            rows = [store.row(split, source, index) for index in range(start, min(start + size, most))]
            arrays = [row_arrays(row, store.sequence_length, store.kind, True) for row in rows]
            yield source, start, [{**own, "bytes": row.bytes} for own, row in zip(arrays, rows, strict=True)]


def _row_sums(model: LoadedModel, unigram_V: np.ndarray, batch: list[dict], size: int) -> list[tuple]:
    """(negative log-likelihood, the unigram model's, predicted tokens, bytes) of each row."""
    check_ids(model, [arrays["tokens"] for arrays in batch])
    short = [{name: np.zeros_like(value) for name, value in batch[0].items()}] * (size - len(batch))
    stacked = {name: np.stack([arrays[name] for arrays in [*batch, *short]]) for name in batch[0]}
    inputs = (stacked[name] for name in ("tokens", "positions", "segments", "labels"))
    with model.in_use():
        logprob_BL = jax.device_get(next_token_logprobs(model.config, model.params, *inputs))
    weights_BL = stacked["weights"].astype(np.float64)
    nll_B = -np.sum(np.where(weights_BL > 0, logprob_BL, 0.0) * weights_BL, axis=-1)
    unigram_B = -np.sum(unigram_V[stacked["labels"]] * weights_BL, axis=-1)
    columns = (nll_B, unigram_B, weights_BL.sum(-1), stacked["bytes"])
    return [tuple(float(column[row]) for column in columns) for row in range(len(batch))]


def _figures(sums_R4: np.ndarray, kind: str) -> dict:
    nll, unigram, tokens, text_bytes = sums_R4.sum(axis=0)
    rows, mean = len(sums_R4), nll / tokens
    # Ratio estimate: rows differ in how many tokens they predict.
    residual_R = sums_R4[:, 0] - mean * sums_R4[:, 2]
    stderr = math.sqrt(rows / (rows - 1) * float(np.sum(residual_R**2))) / tokens if rows > 1 else None
    per_byte = math.log(2) * text_bytes if kind == "pretrain" else None
    return {
        "rows": rows,
        "tokens": int(tokens),
        "bytes": int(text_bytes),
        "nats_per_token": mean,
        "stderr": stderr,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": nll / per_byte if per_byte else None,
        "unigram_nats_per_token": unigram / tokens,
        "unigram_bits_per_byte": unigram / per_byte if per_byte else None,
    }
