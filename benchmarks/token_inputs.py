"""What `tokens.py` works on: a corpus, its tokenizer, the same documents for peers, and a synthetic store."""

import collections
import json
import os
import pathlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
from token_readers import LENGTH, RAW_LENGTHS, RAW_TOKENS
from tokenizer_json import write_tokenizer_json

from ctllm_jax.cli import main as ctllm
from ctllm_jax.common.files import identity
from ctllm_jax.common.manifest import open_stage
from ctllm_jax.data.record import FORMAT, Row, ids_name, shard_name, write_ids, write_shard

VOCABULARY = 125_696  # of the synthetic store: as large as CT-LLM's
SAMPLE = pathlib.Path(__file__).resolve().parent.parent / "sample" / "documents"
_ROWS_OF_SHARD, _DISTINCT_SHARDS = 1024, 16
_SOURCES = ("zh_cc", "zh_cc", "en", "code")  # of the shards by turns


class Inputs:
    """A folder with everything that the tokenize and packing parts read.

    Attributes:
      corpus: MAP-CC, as `ctllm corpus` wrote it.
      few: MAP-CC of a handful of documents: a run on it costs little but its start.
      model: SentencePiece model, trained on the corpus.
      tokenizer_json: the same vocabulary for the tokenizers library.
      documents, few_documents: folders with the texts of `corpus` and `few` as one JSON lines file each.
    """

    def __init__(self, folder: pathlib.Path, patterns: Sequence[str], vocabulary: int, sample_documents: int):
        """Args: where; globs of documents (none: made of the repository's sample); pieces; documents to make."""
        if not patterns:
            patterns = [str(folder / "sample.jsonl")]
            _write_lines(pathlib.Path(patterns[0]), _documents_of_sample(sample_documents))
        self.corpus, self.few = folder / "corpus", folder / "few"
        ctllm(["corpus", f"--config.input={tuple(patterns)!r}", f"--workdir={self.corpus}"])
        self.documents, self.few_documents = folder / "documents", folder / "few_documents"
        kept = list(_documents_of_corpus(self.corpus))
        _write_lines(self.documents / "all.jsonl", kept)
        few = [document for number, document in enumerate(kept) if number % (len(kept) // 20 + 1) == 0]
        _write_lines(self.few_documents / "few.jsonl", few)
        ctllm(["corpus", f"--config.input={self.few_documents}/few.jsonl", f"--workdir={self.few}"])
        ctllm(
            [
                "tokenizer",
                f"--config.corpus={self.corpus}",
                f"--config.vocab_size={vocabulary}",
                f"--workdir={folder / 'tokenizer'}",
            ]
        )
        self.model = folder / "tokenizer" / "tokenizer.model"
        self.tokenizer_json = write_tokenizer_json(self.model, folder / "tokenizer_json")


def _documents_of_sample(count: int) -> Iterator[dict]:
    """Documents of lines drawn from the sample's, each from one source: natural text, no two alike."""
    lines: dict[str, list[str]] = {}
    for file in sorted(SAMPLE.glob("*.jsonl")):
        for raw in file.read_bytes().splitlines():
            try:
                document = json.loads(raw)
                lines.setdefault(document["source"], []).extend(document["text"].splitlines())
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # the sample's planted broken records
    draw, sources = random.Random(0), ("zh_cc", "zh_baike", "zh_papers", "zh_books", "zh_others", "en")
    for number in range(count):
        source = sources[number % len(sources)]
        chosen = draw.choices(lines[source], k=draw.randint(8, 40))
        yield {"id": f"made-{number}", "url": "", "source": source, "text": "\n".join(chosen)}


def _documents_of_corpus(corpus: pathlib.Path) -> Iterator[dict]:
    import tensorflow_datasets as tfds  # seconds to import: after the command line has been checked

    from data_pipeline.map_cc import subset_folders

    for source, folder in subset_folders(corpus).items():
        for example in tfds.builder_from_directory(folder).as_dataset(split="train").as_numpy_iterator():
            yield {"id": example["id"].decode(), "url": "", "source": source, "text": example["text"].decode()}


def _write_lines(file: pathlib.Path, documents: Iterator[dict] | list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)


# ---- A synthetic store


def write_synthetic_store(folder: pathlib.Path, tokens: int) -> int:
    """A finished store of at least so many tokens, all rows full; returns how many it has.

    16 shards are written; the others are hard links to them under names of their own, so that a billion tokens are
    made in seconds and what is read stays in the page cache. Ids follow Zipf's law over a large vocabulary.
    """
    shards = -(-tokens // (_ROWS_OF_SHARD * LENGTH))
    stage = open_stage("tokenize", FORMAT, folder, {"synthetic": shards}, {})
    if stage.done:
        return shards * _ROWS_OF_SHARD * LENGTH
    parts = [_rows(number) for number in range(min(shards, _DISTINCT_SHARDS))]
    originals = [folder / f"original-{number}" for number in range(len(parts))]
    for original, part in zip(originals, parts, strict=True):
        write_shard(original, part)
        write_ids(original.with_suffix(".ids"), part)
    entries = {}
    for source, count in collections.Counter(_SOURCES[number % len(_SOURCES)] for number in range(shards)).items():
        files = []
        for index in range(count):
            original, name = originals[index % len(originals)], shard_name("train", source, index, count)
            os.link(original, folder / name)
            os.link(original.with_suffix(".ids"), folder / ids_name(name))
            files.append({"file": name, "rows": _ROWS_OF_SHARD, "identity": identity(original)})
        entries[source] = {"shards": files, "rows": count * _ROWS_OF_SHARD}
    rows = [row for part in parts for row in part]
    np.save(folder / RAW_TOKENS, np.stack([row.tokens for row in rows]).astype(np.uint32))
    np.save(folder / RAW_LENGTHS, np.array([[*row.lengths, *[0] * (10 - len(row.lengths))] for row in rows]))
    stage.finish(
        {
            "format": FORMAT,
            "kind": "pretrain",
            "sequence_length": LENGTH,
            "tokenizer": {"vocab_size": VOCABULARY, "digest": "synthetic"},
            "splits": {"train": entries},
        }
    )
    return shards * _ROWS_OF_SHARD * LENGTH


def _rows(shard: int) -> list[Row]:
    """Full rows of 3 to 10 documents; the id of rank r comes with a probability in proportion to 1/r."""
    draw, rows = np.random.default_rng(shard), []
    for number in range(_ROWS_OF_SHARD):
        cuts = np.sort(draw.choice(np.arange(1, LENGTH), draw.integers(2, 10), replace=False))
        lengths = np.diff([0, *cuts, LENGTH]).tolist()
        tokens = (VOCABULARY ** draw.random(LENGTH)).astype(np.int32)
        ids = [f"document-{shard}-{number}-{place}" for place in range(len(lengths))]
        rows.append(Row(tokens, lengths, ids, None, 4 * LENGTH))
    return rows
