"""Where texts are looked through: documents, a corpus, conversations and preference pairs, a token store.

Beam's element is a `Shard`: one file, or one shard of a store. Reading it needs nothing else.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ctllm_jax.common.files import expand, file_digest, identity, shown
from ctllm_jax.common.manifest import stage_fingerprint
from ctllm_jax.data.store import open_store
from data_pipeline.documents import SUBSETS, DocumentReader, Fields, InputFile, Malformed, input_files, single_files
from data_pipeline.formats import Unusable, normalise
from data_pipeline.records import entries

MAX_RECORD_BYTES = 50_000_000
_ROWS = 256  # of a store that are read together


@dataclasses.dataclass(frozen=True)
class Text:
    """A text with its name. source: a document's subset, a record's file, or a store's source; where: its place, for
    people; whole: it is no piece of a longer text."""

    document: str
    source: str
    text: str
    where: Mapping[str, Any]
    whole: bool = True


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A record that holds no text; with `damage`, which says why, all that is left of its file."""

    damage: str = ""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of what is looked through. kind: a key of READERS; the other fields say where it lies."""

    index: int
    kind: str
    file: str
    name: str = ""  # of documents and records, what begins their ids; of a store's shard, its split and source
    rows: tuple[int, int] = (0, 0)  # of a store
    rest: tuple[str, ...] = ()  # of documents, the other parts of a file that was cut


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Exactly one of documents, records, corpus and store."""

    documents: tuple[str, ...]  # globs of documents, as `ctllm corpus` reads them
    records: tuple[str, ...]  # globs of conversations or preference pairs, as `ctllm tokenize` reads them
    corpus: str  # folder of `ctllm corpus`
    store: str  # folder of `ctllm tokenize`
    fields: Fields  # names of the documents' keys

    def __post_init__(self) -> None:
        if sum(map(bool, (self.documents, self.records, self.corpus, self.store))) != 1:
            raise ValueError("give exactly one of documents, records, corpus and store")


def shards_of(config: SourceConfig) -> tuple[list[Shard], list[str]]:
    """The shards in their order, and hashes of what they are.

    Raises:
      UserError: a pattern that names no file, or a folder that is no finished corpus or store.
    """
    if config.documents or config.records:
        kind = "documents" if config.documents else "records"
        numbered = input_files if config.documents else single_files
        files = numbered(expand(config.documents or config.records))
        known = identity if config.documents else file_digest
        marks = [" ".join([file.name, *map(known, file.paths)]) for file in files]
        return [Shard(file.index, kind, file.path, file.name, rest=file.rest) for file in files], marks
    if config.corpus:
        from data_pipeline import map_cc  # TensorFlow takes seconds to import

        mark = stage_fingerprint(config.corpus, "corpus")
        folders = map_cc.subset_folders(config.corpus).values()
        paths = [path for folder in folders for path in map_cc.shard_files(pathlib.Path(folder))]
        return [Shard(i, "corpus", str(path)) for i, path in enumerate(paths)], [mark]
    store = open_store(config.store)
    return list(_store_shards(store.info["splits"], config.store)), [store.fingerprint]


def _store_shards(splits: Mapping[str, Mapping], folder: str) -> Iterator[Shard]:
    index = 0
    for split, sources in sorted(splits.items()):
        for source, entry in sorted(sources.items()):
            begin = 0
            for part in entry["shards"]:
                yield Shard(index, "store", folder, f"{split}/{source}", (begin, begin + part["rows"]))
                begin += part["rows"]
                index += 1


def read(shard: Shard, fields: Fields) -> Iterator[Text | Unreadable]:
    """The shard's texts, and what there is instead of one."""
    return _READERS[shard.kind](shard, fields)


def _documents(shard: Shard, fields: Fields) -> Iterator[Text | Unreadable]:
    file = InputFile(shard.index, shard.file, shard.name, rest=shard.rest)
    reader = DocumentReader(file, fields, SUBSETS[0], MAX_RECORD_BYTES)
    for item in reader:
        where = {"file": shown(shard.file), "line": item.line}
        yield Unreadable() if isinstance(item, Malformed) else Text(item.id, item.source, item.text, where)
    if reader.damage:
        yield Unreadable(reader.damage)


def _records(shard: Shard, fields: Fields) -> Iterator[Text | Unreadable]:
    for number, entry in entries(shard.file):
        try:
            if not isinstance(entry, dict):
                raise Unusable("not a JSON object")
            text = "\n".join(part for body in normalise(entry) for part in _texts_of(body))
        except Unusable:
            yield Unreadable()
            continue
        name = entry.get("id") if entry.get("id") not in (None, "") else f"{shard.name}:{number}"
        yield Text(str(name), shard.name, text, {"file": shown(shard.file), "line": number})


def _texts_of(body: Mapping[str, Any]) -> Iterator[str]:
    """All that is said in a conversation or around a pair of answers; what is no text is passed over."""
    messages = body.get("messages", body.get("prompt"))
    for message in messages if isinstance(messages, Sequence) else ():
        if isinstance(message, Mapping) and isinstance(message.get("content"), str):
            yield message["content"]
    yield from (body[side] for side in ("chosen", "rejected") if isinstance(body.get(side), str))


def _corpus(shard: Shard, fields: Fields) -> Iterator[Text]:
    from data_pipeline import map_cc

    with open(shard.file, "rb") as file:
        while feature := map_cc.read_record(file):
            name, source, text = (feature[key].bytes_list.value[0].decode() for key in ("id", "source", "text"))
            yield Text(name, source, text, {})


def _store(shard: Shard, fields: Fields) -> Iterator[Text]:
    """Segments of rows. A document that was cut lies in several, all in one shard."""
    store, (split, source) = open_store(shard.file), shard.name.split("/", 1)
    first, last = shard.rows
    for begin in range(first, last, _ROWS):
        numbers = range(begin, min(begin + _ROWS, last))
        for number, row in zip(numbers, store.read(split, source, numbers), strict=True):
            stop = 0
            for document, length in zip(row.ids, row.lengths, strict=True):
                text = store.tokenizer.decode(row.tokens[stop : stop + length])
                yield Text(document, source, text, {"split": split, "row": number}, whole=False)
                stop += length


_READERS = {"documents": _documents, "records": _records, "corpus": _corpus, "store": _store}
