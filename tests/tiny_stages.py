"""A corpus, tokenizers and token stores, made once by the stages themselves from a part of the sample."""

import functools
import json
import pathlib
import tempfile

import numpy as np
import seqio
import tensorflow_datasets as tfds
import tokenizers
from tiny_models import TEXT, widened, write_jsonl
from tiny_records import chats, pairs

from configs import corpus as corpus_config
from configs import tokenize as tokenize_config
from configs import tokenizer as tokenizer_config
from ctllm_jax.common.config import build
from ctllm_jax.data.store import TokenStore
from data_pipeline import corpus, map_cc, token_store, tokenizer

SAMPLE = pathlib.Path(__file__).resolve().parent.parent / "sample"
LENGTH = 64  # shorter than most documents, so that they are cut
SUBSETS = {"zh_cc": 30, "en": 20, "code": 8}  # documents of the sample that are read


@functools.cache
def stages() -> pathlib.Path:
    """A folder with a corpus, a SentencePiece and a Hugging Face tokenizer and the three kinds of store."""
    folder = pathlib.Path(tempfile.mkdtemp())
    for subset, count in SUBSETS.items():
        lines = (SAMPLE / "documents" / f"{subset}.jsonl").read_bytes().split(b"\n")[:count]
        (folder / f"{subset}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    values = corpus_config.get_config().to_dict() | {"input": [str(folder / "*.jsonl")]}
    corpus.run(build(corpus.CorpusConfig, values), str(folder / "corpus"))
    changes = {"corpus": str(folder / "corpus"), "vocab_size": 1500, "character_coverage": 0.98}
    values = tokenizer_config.get_config().to_dict() | changes
    tokenizer.run(build(tokenizer.TokenizerConfig, values), str(folder / "tokenizer"))
    hugging_face(folder / "hugging_face")
    widened(write_jsonl(folder / "chats.json", chats()))
    write_jsonl(folder / "pairs.json", pairs())
    for kind in ("pretrain", "chat", "preference"):
        token_store.run(config_of(folder, kind), str(folder / kind))
    return folder


def hugging_face(folder: pathlib.Path) -> None:
    """A byte-level BPE tokenizer.json of 400 pieces: id 0 is a common piece, and no piece opens a document."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=399, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(TEXT * 4, trainer)
    model.add_special_tokens(["<|endoftext|>"])
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def config_of(root: pathlib.Path, store: str, **changes) -> token_store.TokenizeConfig:
    """The config that makes the store of that kind in `stages()`, with changes."""
    values = tokenize_config.get_config(store).to_dict()
    made_from = {
        "pretrain": {"corpus": str(root / "corpus")},
        "chat": {"input": [str(root / "chats.json")]},
        "preference": {"input": [str(root / "pairs.json")]},
    }[store]
    own = {"tokenizer": str(root / "tokenizer"), "sequence_length": LENGTH, "validation_share": 0.25}
    return build(token_store.TokenizeConfig, values | made_from | own | changes)


def documents(root: pathlib.Path) -> dict[str, dict[str, str]]:
    """{subset: {id: text}} as TFDS reads them."""
    found = {}
    for subset, folder in map_cc.subset_folders(root / "corpus").items():
        dataset = tfds.builder_from_directory(folder).as_dataset(split="train").as_numpy_iterator()
        found[subset] = {example["id"].decode(): example["text"].decode() for example in dataset}
    return found


def dataset_of(task: str, split: str, **options) -> list[dict]:
    """A task's examples through SeqIO's front door."""
    return list(
        seqio.get_dataset(
            task,
            task_feature_lengths=dict.fromkeys(seqio.get_mixture_or_task(task).output_features, 100_000),
            feature_converter=seqio.PassThroughFeatureConverter(),
            dataset_split=split,
            shuffle=False,
            **options,
        ).as_numpy_iterator()
    )


def assembled(store: TokenStore, split: str, repeated: int = 1) -> dict[str, dict[str, np.ndarray]]:
    """{source: {id: tokens}}: the documents of a split put together from their pieces, by `ids` and `starts` alone.

    A later piece repeats so many tokens of the one before it.
    """
    found = {}
    for source in store.sources(split):
        parts: dict[str, dict[int, np.ndarray]] = {}
        for row in store.rows(split, source):
            segments = np.split(row.tokens, np.cumsum(row.lengths)[:-1])
            for name, start, tokens in zip(row.ids, row.starts or [0] * len(segments), segments, strict=True):
                assert start not in parts.setdefault(name, {}), f"{name} begins twice at {start}"
                parts[name][start] = tokens
        found[source] = {name: _whole(own, repeated) for name, own in parts.items()}
    return found


def _whole(parts: dict[int, np.ndarray], repeated: int) -> np.ndarray:
    (first, whole), *rest = sorted(parts.items())
    assert first == 0
    for start, tokens in rest:
        assert start == len(whole) - repeated
        np.testing.assert_array_equal(tokens[:repeated], whole[start:])
        whole = np.concatenate([whole, tokens[repeated:]])
    return whole
