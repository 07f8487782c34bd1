"""Our filters alone, from JSON lines to kept and rejected documents in gzip, as stage 1 of `ctllm corpus` runs them.

python corpus_filters.py INPUT.jsonl OUTPUT_FOLDER PRESET

What stage 1 does besides, hashing for deduplication, is left out: the peer has other stages for it.
"""

import importlib
import pathlib
import sys

from ctllm_jax.common.config import build
from data_pipeline.batches import batched
from data_pipeline.corpus import CorpusConfig
from data_pipeline.documents import Document, DocumentReader, InputFile
from data_pipeline.filters.rules import Filters
from data_pipeline.shards import gzip_writer, json_line


def main(documents_file: str, output: str, preset: str) -> None:
    """One process, one file."""
    values = importlib.import_module("configs.corpus").get_config(preset).to_dict()
    config = build(CorpusConfig, values | {"input": [documents_file]})
    reader = DocumentReader(InputFile(0, documents_file, "input"), config.fields, "zh_cc", config.max_record_bytes)
    filters, kept = Filters(config.filters), 0
    folder = pathlib.Path(output)
    with gzip_writer(folder / "kept.jsonl.gz") as good, gzip_writer(folder / "rejected.jsonl.gz") as bad:
        documents = (item for item in reader if isinstance(item, Document))
        for found in batched(documents, lambda document: len(document.text)):
            verdicts = filters.judge("zh_cc", [item.text for item in found], [item.url for item in found])
            for document, verdict in zip(found, verdicts, strict=True):
                record = {"id": document.id, "url": document.url, "text": verdict.text, "signals": verdict.signals}
                kept += not verdict.reasons
                (bad if verdict.reasons else good).write(json_line(record | {"reasons": verdict.reasons}))
    print(kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
