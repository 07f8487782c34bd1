"""Held-out language modelling on a token store, beside what a unigram model reaches on the very same tokens.

A token is predicted if it follows another of its own document: the same tokens that training learns
(end-of-document included, a document's first token not), seen under the same document mask.

Legend: B rows, L length, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.progress import Progress
from ctllm_jax.data.batches import row_arrays
from ctllm_jax.data.store import TokenStore
from ctllm_jax.evaluate.scoring import next_token_logprobs
from ctllm_jax.loading import LoadedModel, check_ids


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
    """Which rows are read."""

    store: str  # folder of `ctllm tokenize`
    split: str
    rows: int  # most held-out rows of each source
    baseline_rows: int  # most train rows of each source that the unigram baseline counts


def perplexity(model: LoadedModel, store: TokenStore, config: PerplexityConfig, batch_tokens: int) -> dict:
    """Held-out figures of each source and of "total".

    Returns:
      {source: {rows, tokens (predicted), bytes, nats_per_token, stderr (of nats_per_token, over rows),
      perplexity, bits_per_byte, unigram_nats_per_token, unigram_bits_per_byte}}; the bits per byte are None
      for chat stores, whose rows count bytes that are not predicted.

    Raises:
      UserError: another tokenizer's store, a preference store, rows beyond the model's context, or no such
        split.
    """
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
    sums = {source: [] for source in store.sources(config.split)}
    batch_rows = max(1, batch_tokens // store.sequence_length)
    total = sum(min(store.size(config.split, source), config.rows) for source in sums)
    with Progress("perplexity", total, "rows") as progress:
        for source, found in sums.items():
            for batch in _batches(store, config.split, source, config.rows, batch_rows):
                found += _row_sums(model, unigram_V, batch, batch_rows)
                progress.add(len(batch))
    figures = {source: _figures(np.array(found), store.kind) for source, found in sums.items()}
    return {
        **figures,
        "total": _figures(np.concatenate([np.array(found) for found in sums.values()]), store.kind),
    }


def _unigram(store: TokenStore, vocab_size: int, most: int) -> np.ndarray:
    """Log-probability of each id: counts of predicted tokens in the train split, one added to each."""
    count_V = np.ones(vocab_size, np.float64)
    for source in store.sources("train"):
        for index in range(min(store.size("train", source), most)):
            arrays = row_arrays(store.row("train", source, index), store.sequence_length, store.kind, True)
            np.add.at(count_V, arrays["labels"], arrays["weights"])
    return np.log(count_V / count_V.sum())


def _batches(store: TokenStore, split: str, source: str, most: int, size: int) -> Iterator[list[dict]]:
    """A source's rows as arrays, each with its "bytes"."""
    stop = min(store.size(split, source), most)
    for start in range(0, stop, size):
        rows = [store.row(split, source, index) for index in range(start, min(start + size, stop))]
        yield [{**row_arrays(row, store.sequence_length, store.kind, True), "bytes": row.bytes} for row in rows]


def _row_sums(model: LoadedModel, unigram_V: np.ndarray, batch: list[dict], size: int) -> list[tuple]:
    """(negative log-likelihood, the unigram model's, predicted tokens, bytes) of each row."""
    check_ids(model, [arrays["tokens"] for arrays in batch])
    short = [{name: np.zeros_like(value) for name, value in batch[0].items()}] * (size - len(batch))
    stacked = {name: np.stack([arrays[name] for arrays in [*batch, *short]]) for name in batch[0]}
    logprob_BL = jax.device_get(
        next_token_logprobs(
            model.config,
            model.params,
            *(stacked[name] for name in ("tokens", "positions", "segments", "labels")),
        )[0]
    )
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
