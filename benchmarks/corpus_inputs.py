"""What `corpus.py` works on: real documents, repeated with edits until there are enough of them."""

import gzip
import json
import pathlib
import random
from collections.abc import Iterator, Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import expand

SAMPLE = pathlib.Path(__file__).resolve().parent.parent / "sample" / "documents"
_EDITED = 0.02  # share of the characters of a repeated document that are exchanged


def write_corpus(path: pathlib.Path, patterns: Sequence[str], megabytes: float) -> int:
    """Writes JSON lines {id, url, text} of so many megabytes, unless they are there; returns the documents.

    The documents of the inputs in their order (none: the Chinese ones of the sample), then the same again with 2 % of
    each one's characters exchanged for others of its own, under ids ending in ~1, ~2, ...: all by one seed.
    """
    count = path.parent.parent / f"{path.parent.name}.count"  # not beside the documents: peers read all of a folder
    if not count.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        written = documents = 0
        with path.open("wb") as out:
            for document in _repeated(documents_of(patterns)):
                written += out.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
                documents += 1
                if written >= megabytes * 1e6:
                    break
        count.write_text(str(documents))
    return int(count.read_text())


def documents_of(patterns: Sequence[str]) -> list[dict[str, str]]:
    """{id, url, text} of the inputs in their order; without patterns, of the sample's Chinese documents.

    Raises:
      UserError: a pattern names no file, or none of the files has a document.
    """
    found = list(_documents(patterns))
    if not found:
        raise UserError(f"{', '.join(patterns)}: no line is a JSON object with an id and a text")
    return found


def _documents(patterns: Sequence[str]) -> Iterator[dict[str, str]]:
    for file in expand(patterns or [f"{SAMPLE}/zh_*.jsonl"]):
        with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                    yield {"id": str(record["id"]), "url": record.get("url", ""), "text": record["text"] + ""}
                except (ValueError, KeyError, TypeError):  # the sample's broken records
                    continue


def _repeated(sources: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    yield from sources
    rng, copy = random.Random(0), 0
    while True:
        copy += 1
        for document in sources:
            text = list(document["text"])
            for _ in range(int(len(text) * _EDITED)):
                text[rng.randrange(len(text))] = rng.choice(text)
            yield {**document, "id": f"{document['id']}~{copy}", "text": "".join(text)}
