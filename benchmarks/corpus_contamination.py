"""Documents that hold items of a benchmark, and which: what `corpus.py` measures the search for contamination on.

    python corpus_contamination.py FOLDER MEGABYTES [PATTERN ...]

Items are Chinese passages of the documents given, with all letters, digits and characters exchanged by one permutation,
so that no document holds one but where it is planted: in every twentieth, whole, in another form, in traditional
script, with every fiftieth character exchanged, its first 75 %, or, as a trap, its first 20 %.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from corpus_inputs import documents_of, write_corpus
from corpus_planted import convert, edited, exchanged_rounds, grams, reformed

ITEMS, _EVERY = 2000, 20
_TRIED = 20  # passages looked at for each item
_LENGTHS = (60, 200)  # characters of an item
TRAP = "first 20 %"  # too little to count


@dataclasses.dataclass(frozen=True)
class Score:
    """recall: of what was planted but the traps, what was found; precision: of hits, those that are planted so."""

    recall: float
    precision: float
    by_kind: dict[str, float]


def score(key: pathlib.Path, hits: pathlib.Path) -> Score:
    """Scores hits against what was planted."""
    planted: Mapping[str, Sequence[str]] = json.loads(key.read_text())
    found = {(hit["document"], hit["item"]) for hit in map(json.loads, hits.open())}
    right = {(document, item) for document, (item, kind) in planted.items() if kind != TRAP}
    kinds = Counter(kind for _, kind in planted.values())
    seen = Counter(kind for document, (item, kind) in planted.items() if (document, item) in found)
    return Score(
        len(found & right) / len(right),
        len(found & right) / max(len(found), 1),
        {kind: seen[kind] / count for kind, count in sorted(kinds.items())},
    )


def write_contaminated(folder: pathlib.Path, patterns: Sequence[str], megabytes: float) -> int:
    """Writes documents.jsonl, items.jsonl and key.json to a folder, unless they are there; returns the documents.

    Made by a process of its own: a child's peak memory counts what its parent held when it was started.
    """
    if not (folder / "count").exists():
        subprocess.run([sys.executable, __file__, str(folder), str(megabytes), *patterns], check=True)
    return int((folder / "count").read_text())


def _write(folder: pathlib.Path, megabytes: float, patterns: Sequence[str]) -> None:
    plain = folder / "plain" / "documents.jsonl"
    count = write_corpus(plain, patterns, megabytes)
    items = list(_items(documents_of(patterns)))
    (folder / "items.jsonl").write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(items)))
    copies, planted, rng = _copies(items), {}, random.Random(1)
    with plain.open() as lines, (folder / "documents.jsonl").open("w") as out:
        for number, document in enumerate(map(json.loads, lines)):
            if number % _EVERY == 0:
                item, kind, copy = next(copies)
                place = rng.randrange(len(document["text"]) + 1)
                document["text"] = f"{document['text'][:place]}\n{copy}\n{document['text'][place:]}"
                planted[document["id"]] = (str(item), kind)
            out.write(json.dumps(document, ensure_ascii=False) + "\n")
    plain.unlink()
    (folder / "key.json").write_text(json.dumps(planted))
    (folder / "count").write_text(str(count))


def _items(documents: list[dict]) -> Iterator[str]:
    """Passages of the documents in their second round, which exchanges everything."""
    rng = random.Random(0)
    _, exchanged = itertools.islice(exchanged_rounds(documents), 2)
    long = [document["text"] for document in exchanged if len(document["text"]) >= 2 * _LENGTHS[0]]
    passages = (_passage(text, rng) for text in itertools.islice(itertools.cycle(long), _TRIED * ITEMS))
    yield from itertools.islice(_apart(passages), ITEMS)


def _passage(text: str, rng: random.Random) -> str:
    length = rng.randint(_LENGTHS[0], min(_LENGTHS[1], len(text) // 2))
    begin = rng.randrange(len(text) - length)
    return text[begin : begin + length]


def _apart(passages: Iterable[str]) -> Iterator[str]:
    """Those that are mostly Chinese, do not repeat themselves and share no 13 characters with an earlier one."""
    seen: set[str] = set()
    for text in passages:
        own = grams(text, 13)
        chinese = sum("一" <= c <= "鿿" for c in text) >= 0.7 * len(text)
        if chinese and len(own) > len(text) / 2 and not own & seen:
            seen |= own
            yield text


def _copies(items: list[str]) -> Iterator[tuple[int, str, str]]:
    """(item, kind, copy) for ever."""
    rng = random.Random(2)
    kinds = {
        "whole": lambda text: text,
        "form": functools.partial(reformed, rng=rng),
        "script": None,
        "edited 2 %": functools.partial(edited, 0.02, rng=rng),
        "first 75 %": lambda text: text[: int(0.75 * len(text))],
        TRAP: lambda text: text[: len(text) // 5],
    }
    traditional = convert([("s2t", text) for text in items])
    for number in itertools.count():
        item, kind = number % len(items), list(kinds)[number % len(kinds)]
        yield item, kind, traditional[item] if kind == "script" else kinds[kind](items[item])


if __name__ == "__main__":
    _write(pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
