"""Tiny random models, tokenizers and stores that several tests share."""

import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

from ctllm_jax.data.tokenizer import BOS, CHAT_PIECES, EOS, PAD, UNK, load_tokenizer
from ctllm_jax.evaluate.engine import Score, score_groups
from ctllm_jax.evaluate.scoring import fitted
from ctllm_jax.loading import LoadedModel
from ctllm_jax.model import ModelConfig, init_params

REFERENCE = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "reference"
NO_REFERENCE = f"reference outputs of other tools are not at {REFERENCE}"

TEXT = [
    "从前有座山，山里有座庙，庙里有个老和尚。",
    "老和尚对小和尚说：从前有座山。",
    "The quick brown fox jumps over the lazy dog 1234567890.",
    "北京是中国的首都，上海是中国最大的城市。",
    "水在标准大气压下的沸点是一百摄氏度。",
]


def tiny_config(**changes) -> ModelConfig:
    """A model of two layers; grouped queries, untied, more embedding rows than ids."""
    values = {
        "num_layers": 2,
        "d_model": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "d_ff": 48,
        "vocab_size": 370,
        "padded_vocab_size": 384,
        "max_length": 64,
        "norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "tie_embeddings": False,
        "qk_norm": False,
        "init_std": 0.2,
        "dtype": "float32",
        "param_dtype": "float32",
        "remat": "none",
        "attention": "xla",
    }
    return ModelConfig(**{**values, **changes})


@functools.cache
def tiny_tokenizer():
    """A SentencePiece BPE model with byte fallback and the chat markers, of 370 ids."""
    folder = pathlib.Path(tempfile.mkdtemp())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=370,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=EOS,
        pad_piece=PAD,
        pad_id=3,
        control_symbols=list(CHAT_PIECES),
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return load_tokenizer(folder)


def tiny_model(seed: int = 0, **changes) -> LoadedModel:
    """A random model with its tokenizer; every norm scale differs from 1, so that none can hide."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(**{"vocab_size": tokenizer.vocab_size, **changes})
    params = jax.tree.map(jnp.array, _drawn(config, seed))
    random = np.random.default_rng(seed)

    def scale(path, leaf):
        norm = path[-1].key.endswith("norm")
        return leaf * random.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype) if norm else leaf

    params = jax.tree_util.tree_map_with_path(scale, params)
    return LoadedModel(config=config, params=params, tokenizer=tokenizer, digest=f"digest-{seed}", name="tiny")


def score(model: LoadedModel, pairs, batch_tokens: int) -> list[Score]:
    """The scores of pairs of ids, (context, continuation)."""
    groups = [[fitted(model, *pair, number)] for number, pair in enumerate(pairs)]
    return [found for [found] in score_groups(model, groups, batch_tokens, "")]


@functools.cache
def _drawn(config: ModelConfig, seed: int) -> dict:
    """Parameters as numpy has them, drawn in one program: compiling it takes seconds."""
    return jax.device_get(jax.jit(functools.partial(init_params, config))(jax.random.key(seed)))


def write_jsonl(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def widened(path: pathlib.Path) -> pathlib.Path:
    """A JSON-lines file with so much white space around it that its ends tell nothing of what it holds."""
    path.write_bytes(b" " * 70_000 + path.read_bytes() + b" " * 70_000)
    return path
