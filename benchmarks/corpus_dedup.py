"""Our deduplication alone, from JSON lines to survivors and duplicates, as `ctllm corpus` runs it after its filters.

python corpus_dedup.py INPUT.jsonl OUTPUT_FOLDER PRESET
"""

import importlib
import itertools
import sys

from ctllm_jax.common.config import build
from data_pipeline.batches import batched
from data_pipeline.corpus import CorpusConfig
from data_pipeline.dedup.corpora import Corpora
from data_pipeline.dedup.minhash import DedupConfig, hash_documents
from data_pipeline.dedup.stage import deduplicate
from data_pipeline.dedup.store import HashWriter
from data_pipeline.documents import Document, DocumentReader, InputFile
from data_pipeline.shards import Layout, json_line, zstd_writer

_SUBSET = "zh_cc"


def main(documents: str, output: str, preset: str) -> None:
    """One process, one file: what stage 1 does but the filters, then stage 2."""
    values = importlib.import_module("configs.corpus").get_config(preset).to_dict()
    values["dedup"]["similar_lines"] = ""
    config = build(CorpusConfig, values | {"input": [documents]})
    layout = Layout(output)
    reader = DocumentReader(InputFile(0, documents, "input"), config.fields, _SUBSET, config.max_record_bytes)
    _hash(reader, config.dedup, layout)
    deduplicate(Corpora((), layout, 1), config.dedup, config.beam)


def _hash(reader: DocumentReader, config: DedupConfig, layout: Layout) -> None:
    """Writes documents and hashes to where stage 2 looks for them."""
    documents, rows = (item for item in reader if isinstance(item, Document)), itertools.count()
    with zstd_writer(layout.kept(0, _SUBSET)) as kept, HashWriter(layout.all_hashes(0)) as hashes:
        for found in batched(documents, lambda document: len(document.text)):
            hashes.append(hash_documents(found, config))
            for document in found:
                fields = {name: getattr(document, name) for name in ("id", "url", "source", "text", "meta", "line")}
                kept.write(json_line({"row": next(rows), **fields}))


if __name__ == "__main__":
    main(*sys.argv[1:])
