"""Small token stores, written as `ctllm tokenize` writes them."""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import numpy as np
from tiny_models import tiny_config, tiny_tokenizer

from ctllm_jax.common import files
from ctllm_jax.common.manifest import open_stage
from ctllm_jax.data.batches import row_arrays
from ctllm_jax.data.record import FORMAT, Row, ids_name, shard_name, write_ids, write_shard
from ctllm_jax.data.store import TokenStore, open_store

Rows = Mapping[str, Mapping[str, Sequence[Row]]]  # {split: {source: rows}}


def write_store(folder: pathlib.Path, rows: Rows, kind: str, length: int, shards: int = 2) -> TokenStore:
    """A finished store of the given rows, with the tiny tokenizer in it."""
    stage, splits = open_stage("tokenize", FORMAT, folder, {"kind": kind, "sequence_length": length}, {}), {}
    for split, sources in rows.items():
        for source, own in sources.items():
            entry = splits.setdefault(split, {}).setdefault(source, {"rows": len(own), "shards": []})
            for index, part in enumerate(np.array_split(np.arange(len(own)), shards)):
                name = shard_name(split, source, index, shards)
                write_shard(folder / name, [own[i] for i in part])
                write_ids(folder / ids_name(name), [own[i] for i in part])
                identity = files.identity(folder / name)
                entry["shards"].append({"file": name, "rows": len(part), "identity": identity})
            entry["learned"] = sum(int(row_arrays(row, length, kind, True)["weights"].sum()) for row in own)
    tokenizer = tiny_tokenizer()
    (folder / "tokenizer").mkdir()
    shutil.copyfile(tokenizer.file, folder / "tokenizer" / "tokenizer.model")
    result = {"format": FORMAT, "kind": kind, "sequence_length": length, "made_from": [], "splits": splits}
    stage.finish({**result, "tokenizer": {"vocab_size": tokenizer.vocab_size, "digest": tokenizer.digest}})
    return open_store(folder)


def counting(random: np.random.Generator, size: int) -> np.ndarray:
    """A document that a model soon learns: ids that count up by one or two from a random start."""
    start, stride = random.integers(10, 250), random.integers(1, 3)
    return (10 + (start - 10 + stride * np.arange(size)) % 360).astype(np.int32)


def packed_row(random: np.random.Generator, length: int, name: str, masked: bool = False) -> Row:
    """A row of one to three documents, not quite full."""
    cuts = np.sort(random.choice(np.arange(4, length - 6), random.integers(0, 3), replace=False))
    lengths = [int(n) for n in np.diff([0, *cuts, length - random.integers(0, 3)]) if n > 0]
    tokens = np.concatenate([counting(random, n) for n in lengths])
    mask = (random.random(len(tokens)) < 0.6).astype(np.uint8) if masked else None
    return Row(tokens, lengths, [f"{name}.{i}" for i in range(len(lengths))], mask, 3 * len(tokens))


def preference_row(random: np.random.Generator, length: int, name: str) -> Row:
    """A pair that shares its prompt; the chosen answer counts up, the rejected one is noise."""
    prompt, answers = counting(random, 5), [int(n) for n in random.integers(4, length - 6, 2)]
    sides = [
        np.concatenate([prompt, counting(random, answers[0])]),
        np.concatenate([prompt, random.integers(10, 300, answers[1]).astype(np.int32)]),
    ]
    mask = np.concatenate([[0] * 5 + [1] * n for n in answers]).astype(np.uint8)
    return Row(np.concatenate(sides), [len(side) for side in sides], [name] * 2, mask, 3 * sum(answers))


def tiny_store(folder: pathlib.Path, kind: str = "pretrain", length: int = 32, rows: int = 60) -> TokenStore:
    """A store of two sources: `rows` rows to train on of `zh`, half as many of `en`, a few held out."""
    random = np.random.default_rng(7)

    def make(split: str, source: str, count: int) -> list[Row]:
        names = [f"{split}-{source}-{i}" for i in range(count)]
        if kind == "preference":
            return [preference_row(random, length, name) for name in names]
        return [packed_row(random, length, name, masked=kind == "chat") for name in names]

    sizes = {"train": {"zh": rows, "en": rows // 2}, "validation": {"zh": 11, "en": 5}}
    made = {split: {source: make(split, source, n) for source, n in own.items()} for split, own in sizes.items()}
    return write_store(folder, made, kind, length)


def batch_of(rows: list[Row], length: int, kind: str, empty: int = 0, mask_documents: bool = True) -> dict:
    """Rows as the model reads them, by turns of source 0 and 1, and some empty rows at the end."""
    examples = [row_arrays(row, length, kind, mask_documents) for row in rows]
    examples += [{name: np.zeros_like(array) for name, array in examples[0].items()}] * empty
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    return {**batch, "source": np.arange(len(examples), dtype=np.int32) % 2}


def train_values(store: pathlib.Path) -> dict:
    """The config of a run of 12 steps over 8 devices."""
    return {
        "objective": {
            "name": "lm",
            "z_loss": 1e-4,
            "cross_entropy": "auto",
            "logit_metrics": False,
            "preference": None,
        },
        "model": dataclasses.asdict(tiny_config(max_length=32)),
        "init_from": None,
        "init_step": None,
        "lora": {"rank": 0, "alpha": 8.0, "targets": ["q", "v", "out", "gate", "down"]},
        "data": {"store": str(store), "rates": {"zh": 0.75, "en": 0.25}, "rate_changes": [], "mask_documents": True},
        "optimizer": {
            "learning_rate": 2e-2,
            "final_learning_rate": 1e-3,
            "schedule": "cosine",
            "warmup": "2 steps",
            "decay": "",
            "beta1": 0.9,
            "beta2": 0.95,
            "epsilon": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "spike_window": 4,
            "spike_deviations": 6.0,
            "ema_half_life": "",
        },
        "mesh": {"data": 2, "fsdp": -1, "tensor": 1, "context": 1},
        "distributed": False,
        "batch_size": 8,
        "microbatches": 1,
        "duration": "12 steps",
        "seed": 11,
        "log": {"every": 1, "tensorboard": False, "wandb": None, "profile": []},
        "eval": {"every": 4, "batches": 1, "tasks": [], "items": 1, "prompts": [], "sample_tokens": 8},
        "checkpoints": {"every": 5, "minutes": 0.0, "kept": 5, "keep_every": 0, "keep_best": 0, "best": "lowest loss"},
        "watch": {"stall_minutes": 0.0, "slow_minutes": 0.0, "stop_minutes": 0.0, "notices": ""},
        "deterministic": True,
        "xla_options": {},
    }
