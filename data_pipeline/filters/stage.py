"""Stage 1: one input file in; kept and rejected documents, hashes for deduplication and counts out.

`filter_file` is the whole work of one Beam element. It depends on nothing but its arguments, so that a retry
or a re-run writes the same bytes; a file whose counts are on the disk is not read again.
"""

import contextlib
import dataclasses
from typing import Any

from ctllm_jax.common.files import write_json
from data_pipeline.batches import batched
from data_pipeline.dedup.minhash import DedupConfig, hash_documents
from data_pipeline.dedup.store import HashWriter
from data_pipeline.documents import EXCERPT, Document, DocumentReader, Fields, InputFile, Malformed
from data_pipeline.filters.mask import MaskConfig, mask
from data_pipeline.filters.rules import FilterConfig, Filters, Verdict
from data_pipeline.shards import Layout, gzip_writer, json_line, zstd_writer
from data_pipeline.signals import SignalWriter

EXAMPLES = 3  # rejected documents shown per rule and file


@dataclasses.dataclass(frozen=True)
class FilterSettings:
    """What stage 1 needs to know, beside the file."""

    fields: Fields
    default_source: str | None
    max_record_bytes: int
    filters: FilterConfig
    dedup: DedupConfig


def filter_file(file: InputFile, settings: FilterSettings, layout: Layout) -> InputFile:
    """Filters one file; returns its pointer, for the next transform."""
    if layout.counts(file.index).exists():
        return file
    reader = DocumentReader(file, settings.fields, settings.default_source, settings.max_record_bytes)
    filters = Filters(settings.filters)
    with contextlib.ExitStack() as stack:
        writer = _Writer(file, layout, settings.filters.mask, stack)
        signals = SignalWriter(file.label, file.index, layout, stack)
        hashes = stack.enter_context(HashWriter(layout.all_hashes(file.index)))
        for batch in batched(reader, _characters):
            for item in batch:
                if isinstance(item, Malformed):
                    writer.malformed(item)
            verdicts = _judge(filters, [item for item in batch if isinstance(item, Document)])
            signals.append(verdicts)
            judged = [writer.judged(document, verdict) for document, verdict in verdicts]
            hashes.append(hash_documents([document for document in judged if document], settings.dedup))
            layout.progress(file.index).write_text(str(reader.records))
    ended = {"records": reader.records, "damage": reader.damage, "histograms": signals.histograms}
    write_json(layout.counts(file.index), writer.counts | ended)
    return file


def _characters(item: Document | Malformed) -> int:
    return len(item.text) if isinstance(item, Document) else 0


def _judge(filters: Filters, documents: list[Document]) -> list[tuple[Document, Verdict]]:
    """Documents with their verdicts, in the order given; each subset is measured as one batch."""
    verdicts: dict[int, Verdict] = {}
    for subset in sorted({document.source for document in documents}):
        places = [i for i, document in enumerate(documents) if document.source == subset]
        texts, addresses = [documents[i].text for i in places], [documents[i].url for i in places]
        verdicts.update(zip(places, filters.judge(subset, texts, addresses), strict=True))
    return [(document, verdicts[i]) for i, document in enumerate(documents)]


class _Writer:
    """Writes one file's kept and rejected documents and counts them. Rows number the kept documents."""

    def __init__(self, file: InputFile, layout: Layout, masks: MaskConfig, stack: contextlib.ExitStack):
        self._file, self._layout, self._masks, self._stack = file, layout, masks, stack
        self._kept: dict[str, Any] = {}
        self._rejected = stack.enter_context(gzip_writer(layout.rejected(file.index, "filter")))
        self._row = 0
        self.counts: dict[str, Any] = {"file": file.label, "subsets": {}, "examples": {}}

    def malformed(self, item: Malformed) -> None:
        """Rejects a record that is no document."""
        count = self._subset(item.source)
        count["read"] += 1
        count["malformed"][item.reason] = count["malformed"].get(item.reason, 0) + 1
        place = {"file": self._file.label, "line": item.line}
        reason, excerpt = {"rule": item.reason, "value": item.detail}, mask(item.excerpt, self._masks)[0]
        self._rejected.write(json_line({**place, "source": item.source, "reasons": [reason], "excerpt": excerpt}))
        self._example(f"{self._file.name}:{item.line}", excerpt, reason)

    def judged(self, document: Document, verdict: Verdict) -> Document | None:
        """Writes a document to where its verdict sends it; returns it as it was kept, None if it was rejected.

        A rejected document is written with the text that it came with, but for masks.
        """
        count = self._subset(document.source)
        count["read"] += 1
        count["well_formed"] += 1
        count["passed_rules"] += verdict.passed_rules
        if verdict.reasons:
            document = dataclasses.replace(document, text=mask(document.text, self._masks)[0])
        else:
            meta = document.meta | verdict.aside
            document = dataclasses.replace(document, text=verdict.text, meta=meta)
        place = {"file": self._file.label, "line": document.line}
        record = {name: getattr(document, name) for name in ("id", "url", "source", "text", "meta")}
        record |= {"signals": verdict.signals, **place}
        if not verdict.reasons:
            self._writer(document.source).write(json_line({"row": self._row, **record}))
            self._row += 1
            count["passed_language"] += 1
            for kind, number in verdict.aside.get("masked", {}).items():
                count["masked"][kind] = count["masked"].get(kind, 0) + number
            return document
        self._rejected.write(json_line({**record, "reasons": verdict.reasons}))
        for reason in verdict.reasons:
            count["rules"][reason["rule"]] = count["rules"].get(reason["rule"], 0) + 1
            self._example(document.id, document.text[:EXCERPT], reason)
        return None

    def _writer(self, subset: str) -> Any:
        if subset not in self._kept:
            self._kept[subset] = self._stack.enter_context(zstd_writer(self._layout.kept(self._file.index, subset)))
        return self._kept[subset]

    def _subset(self, subset: str) -> dict[str, Any]:
        empty = {
            "read": 0,
            "well_formed": 0,
            "passed_rules": 0,
            "passed_language": 0,
            "malformed": {},
            "rules": {},
            "masked": {},
        }
        return self.counts["subsets"].setdefault(subset, empty)

    def _example(self, identity: str, excerpt: str, reason: dict[str, Any]) -> None:
        examples = self.counts["examples"].setdefault(reason["rule"], [])
        if len(examples) < EXAMPLES:
            examples.append({"id": identity, "excerpt": excerpt, **reason})
