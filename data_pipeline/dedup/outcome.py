"""What deduplication did to a shard: survivors and their hashes, and every document removed with what it repeats."""

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from ctllm_jax.common.files import write_json
from data_pipeline.dedup.corpora import Corpora
from data_pipeline.dedup.similar_lines import similar_lines
from data_pipeline.dedup.store import HashWriter, open_hashes
from data_pipeline.documents import EXCERPT
from data_pipeline.filters.stage import EXAMPLES
from data_pipeline.shards import STEPS, Layout, gzip_writer, json_line, read_lines, zstd_writer

_CHUNK = 1 << 15  # documents whose hashes are copied together


@dataclasses.dataclass(frozen=True)
class Removal:
    """Why a document was removed: the step that found it, the id it repeats, the similarity of the texts.

    Exact copies have similarity 1; for a repeated id nothing is known of the texts. The document that it
    repeats may itself be a near duplicate of another, never of this one.
    """

    kind: str
    duplicate_of: str
    similarity: float | None


class Removals:
    """What was removed from one shard, all steps together; they share no row."""

    def __init__(self, shard: int, corpora: Corpora):
        self._by_step = {step: np.load(corpora.layout.removals(step, shard)) for step in STEPS}
        self._ids = _ids_repeated(self._by_step.values(), corpora)
        self.removed = np.zeros(len(open_hashes(corpora.layout.all_hashes(shard))), bool)
        for records in self._by_step.values():
            self.removed[records["row"]] = True

    def __call__(self, row: int) -> Removal | None:
        """Why a document was removed; None if it was not."""
        if not self.removed[row]:
            return None
        for step, records in self._by_step.items():
            place = np.searchsorted(records["row"], row)
            if place < len(records) and records["row"][place] == row:
                record = records[place]
                original = self._ids[int(record["of_shard"]), int(record["of_row"])]
                return Removal(step, original, None if step == "id" else round(float(record["similarity"]), 4))
        raise AssertionError(f"row {row} was removed by no step")


def _ids_repeated(removals: Iterable[np.ndarray], corpora: Corpora) -> dict[tuple[int, int], str]:
    """{(shard, row): id} of the documents that others repeat; one shard's files are open at a time."""
    wanted = sorted({(int(record["of_shard"]), int(record["of_row"])) for records in removals for record in records})
    ids = {}
    for shard, places in itertools.groupby(wanted, key=lambda place: place[0]):
        hashes = corpora.hashes(shard)
        ids.update((place, hashes.id(place[1])) for place in places)
    return ids


def write_outcome(shard: int, corpora: Corpora, line_rule: str) -> None:
    """Writes a shard's survivors, what was rejected with what it repeats, and what is left per subset.

    Args:
      line_rule: of `similar_lines`; '': the texts stay as they are.
    """
    layout, found = corpora.layout, Removals(shard, corpora)
    outcome: dict[str, dict] = {"subsets": {}, "examples": {}}
    with contextlib.ExitStack() as stack:
        rejected = stack.enter_context(gzip_writer(layout.rejected(shard, "dedup")))
        lines = stack.enter_context(gzip_writer(layout.rejected(shard, "lines"))) if line_rule else None
        for path in layout.kept_files(shard):
            subset = path.name.split(".")[1]
            count = outcome["subsets"].setdefault(subset, Counter())
            survivors = stack.enter_context(zstd_writer(layout.survivors(shard, subset)))
            for record in read_lines(path):
                removal = found(record.pop("row"))
                if removal is not None:
                    rule = f"duplicate_{removal.kind}"
                    count[rule] += 1
                    _reject(record, rule, dataclasses.asdict(removal), rejected, outcome["examples"])
                    continue
                if lines:
                    record["text"], dropped = similar_lines(record["text"], line_rule)
                    count["similar_lines"] += len(dropped)
                    place = {name: record[name] for name in ("id", "source", "file", "line")}
                    lines.writelines(json_line(place | dataclasses.asdict(line)) for line in dropped)
                count["kept"] += 1
                count["characters"] += len(record["text"])
                count["bytes"] += len(record["text"].encode())
                survivors.write(json_line(record))
    _keep_hashes(shard, found.removed, layout)
    write_json(layout.outcome(shard), outcome)


def _reject(record: dict[str, Any], rule: str, why: dict[str, Any], rejected: Any, examples: dict[str, list]) -> None:
    rejected.write(json_line(record | why | {"reasons": [{"rule": rule} | why]}))
    shown = examples.setdefault(rule, [])
    if len(shown) < EXAMPLES:
        shown.append({"id": record["id"], "excerpt": record["text"][:EXCERPT], **why})


def _keep_hashes(shard: int, removed: np.ndarray, layout: Layout) -> None:
    """Copies the survivors' hashes to where later corpora find them."""
    with HashWriter(layout.hashes(shard)) as writer:
        for begin in range(0, len(removed), _CHUNK):
            kept = np.flatnonzero(~removed[begin : begin + _CHUNK])
            some = open_hashes(layout.all_hashes(shard)).part(begin, min(begin + _CHUNK, len(removed)))
            writer.append(some.select(kept))
