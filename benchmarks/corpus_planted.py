"""A corpus whose near duplicates are known: real documents without natural ones, every third with an altered copy.

What is planted, how similar it is, and how removals are scored against it; `corpus.py` says what for. The folding that
similarity is taken on is written out here once more, over OpenCC, so that an error in the project's own shows.
"""

import dataclasses
import functools
import heapq
import json
import pathlib
import random
import re
import subprocess
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from common import environment
from corpus_inputs import documents_of

OPENCC = ("opencc==1.4.2",)
NATURAL = 0.4  # documents that are so similar to an earlier one are no source
SIMILAR = 0.8  # pairs from here on are to be found
_GRAM = 5
_EVERY = 3  # so many sources, and one of them has a copy
_DELAY = 2000  # a copy stands at most so many documents after its original
_SCRIPTS = ("s2t", "s2tw", "s2hk")
_HEADER, _FOOTER = "首页 > 资讯 > 正文\n来源：本站整理 字号：大 中 小\n", "\n【责任编辑：小文】\n上一篇 下一篇 返回顶部"
_MARKS = str.maketrans("，。！？：；（）“”", ',.!?:;()""')


@dataclasses.dataclass(frozen=True)
class Score:
    """How removals fit what was planted.

    recall: of planted pairs with a Jaccard similarity of SIMILAR or more, those of which one is removed; by kind too.
    precision: of the documents removed, those that are one of a planted pair (and repeat the other, if it is told).
    """

    recall: float
    precision: float
    by_kind: dict[str, float]
    pairs: int
    removed: int


def score(key: pathlib.Path, removed: Mapping[str, str | None]) -> Score:
    """Scores {removed id: id of what it repeats, None: not told} against a key."""
    planted = json.loads(key.read_bytes())
    partner = {copy: entry["of"] for copy, entry in planted.items()}
    partner |= {entry["of"]: copy for copy, entry in planted.items()}
    found, wanted = Counter(), Counter()
    for copy, entry in planted.items():
        if entry["jaccard"] >= SIMILAR:
            wanted[entry["kind"]] += 1
            found[entry["kind"]] += copy in removed or entry["of"] in removed
    right = sum(name in partner and of in (None, partner[name]) for name, of in removed.items())
    return Score(
        sum(found.values()) / sum(wanted.values()),
        right / max(len(removed), 1),
        {kind: found[kind] / count for kind, count in sorted(wanted.items())},
        sum(wanted.values()),
        len(removed),
    )


def write_planted(path: pathlib.Path, patterns: Sequence[str], megabytes: float) -> tuple[int, pathlib.Path]:
    """Writes JSON lines {id, url, text} of so many megabytes, unless they are there; returns documents and key.

    Made by a process of its own: a child's peak memory counts what its parent held when it was started.

    When the documents given are used up they come again with their letters, digits and characters exchanged for others
    (one permutation of all of them each time), so that no text repeats another but where it is planted.
    """
    key = path.parent.parent / f"{path.parent.name}.key.json"  # not beside the documents: peers read all of a folder
    count = key.with_suffix(".count")
    if not count.exists():
        subprocess.run([sys.executable, __file__, str(path), str(key), str(megabytes), *patterns], check=True)
    return int(count.read_text()), key


def _write(path: pathlib.Path, key: pathlib.Path, megabytes: float, patterns: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    planted, written, documents = {}, 0, 0
    with path.open("wb") as out:
        for document in _delayed(_planted(_sources(patterns), planted)):
            written += out.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
            documents += 1
            if written >= megabytes * 1e6:
                break
    with path.open("rb") as lines:
        ids = {json.loads(line)["id"] for line in lines}
    whole = {copy: entry for copy, entry in planted.items() if copy in ids and entry["of"] in ids}
    key.write_text(json.dumps(whole))
    key.with_suffix(".count").write_text(str(documents))


def _planted(sources: list[dict], planted: dict[str, dict]) -> Iterator[tuple[int, dict]]:
    """(place, document) for ever; notes in `planted` what was planted: {id: {of, kind, jaccard}}."""
    place = 0
    for round_number, renamed in enumerate(exchanged_rounds(sources)):
        rng = random.Random(round_number)
        chosen = [i for i, source in enumerate(renamed) if i % _EVERY == 0 and len(source["text"]) >= 100]
        kinds = {i: list(_KINDS)[n % len(_KINDS)] for n, i in enumerate(chosen)}
        texts = [renamed[i]["text"] for i in chosen if kinds[i] == "script"]
        scripts = iter(convert([(_SCRIPTS[n % 3], text) for n, text in enumerate(texts)]))
        for i, source in enumerate(renamed):
            yield place, source
            if i in kinds:
                kind = kinds[i]
                text = next(scripts) if kind == "script" else _KINDS[kind](source["text"], rng)
                same = kind in ("script", "form")
                similarity = 1.0 if same else jaccard(grams(source["text"]), grams(text))
                planted[f"{source['id']}~copy"] = {"of": source["id"], "kind": kind, "jaccard": similarity}
                yield place + rng.randrange(1, _DELAY), {**source, "id": f"{source['id']}~copy", "text": text}
            place += 1


def _delayed(placed: Iterable[tuple[int, dict]]) -> Iterator[dict]:
    """The documents in the order of their places."""
    waiting, number = [], 0
    for place, document in placed:
        heapq.heappush(waiting, (place, number, document))
        number += 1
        while waiting[0][0] < place:
            yield heapq.heappop(waiting)[2]


# ---- Copies


def edited(share: float, text: str, rng: random.Random) -> str:
    characters = list(text)
    for _ in range(max(1, round(len(text) * share))):
        characters[rng.randrange(len(text))] = rng.choice(text)
    return "".join(characters)


def _dropped(text: str, rng: random.Random) -> str:
    first, *others = re.findall("[^。]*。?", text)
    return first + "".join(part for part in others if rng.random() > 0.08)


def _shuffled(text: str, rng: random.Random) -> str:
    paragraphs = text.split("\n")
    rng.shuffle(paragraphs)
    return "\n".join(paragraphs)


def reformed(text: str, rng: random.Random) -> str:
    """Other marks, widths and spaces."""
    wide = [chr(ord(c) + 0xFEE0) if c.isascii() and c.isalnum() else c for c in text.translate(_MARKS)]
    return "".join(c + " " * (rng.random() < 0.05) for c in wide)


_KINDS = {
    "edited 0.5 %": functools.partial(edited, 0.005),
    "edited 1 %": functools.partial(edited, 0.01),
    "edited 2 %": functools.partial(edited, 0.02),
    "boilerplate": lambda text, rng: _HEADER + text + _FOOTER,
    "sentences dropped": _dropped,
    "cut to 85 %": lambda text, rng: text[: int(0.85 * len(text))],
    "paragraphs shuffled": _shuffled,
    "form": reformed,
    "script": None,  # by OpenCC
}


# ---- Similarity


def grams(text: str, size: int = _GRAM) -> set[str]:
    """n-grams of the text without case, width, punctuation, symbols and space."""
    folded = unicodedata.normalize("NFKC", text).lower()
    folded = "".join(c for c in folded if unicodedata.category(c)[0] in "LNM")
    return {folded[i : i + size] for i in range(len(folded) - size + 1)}


def jaccard(first: set[str], second: set[str]) -> float:
    """Of two sets; 0 where both are empty."""
    return len(first & second) / max(len(first | second), 1)


def convert(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Texts by OpenCC's conversions."""
    script = pathlib.Path(__file__).with_name("opencc_convert.py")
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    done = subprocess.run(
        [environment("opencc", OPENCC), str(script)], input=lines, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


# ---- Sources


def _sources(patterns: Sequence[str]) -> list[dict]:
    """The documents without those that are similar to an earlier one, all in simplified script."""
    documents = documents_of(patterns)
    simplified = convert([("t2s", document["text"]) for document in documents])
    kept, sets, index = [], [], defaultdict(list)
    for number, (document, text) in enumerate(zip(documents, simplified, strict=True)):
        own = grams(text)
        sample = {gram for gram in own if zlib.crc32(gram.encode()) % 16 == 0} or set(sorted(own)[:4])
        shared = Counter(other for gram in sample for other in index[gram])
        close = [other for other, count in shared.items() if count >= 0.2 * len(sample)]
        if len(own) < 20 or any(jaccard(own, sets[other]) >= NATURAL for other in close):
            continue
        for gram in sample:
            index[gram].append(len(kept))
        kept.append({**document, "id": f"{number}", "text": text})
        sets.append(own)
    return kept


def exchanged_rounds(sources: list[dict]) -> Iterator[list[dict]]:
    """The sources, then again and again with everything exchanged."""
    yield sources
    text = set("".join(source["text"] for source in sources))
    groups = [sorted(c for c in text if "一" <= c <= "鿿"), list("abcdefghijklmnopqrstuvwxyz"), list("0123456789")]
    number = 0
    while True:
        number += 1
        rng, table = random.Random(f"round {number}"), {}
        for group in groups:
            exchanged = rng.sample(group, len(group))
            table |= dict(zip(group, exchanged, strict=True))
        table |= {letter.upper(): other.upper() for letter, other in table.items() if letter.islower()}
        exchange = str.maketrans(table)
        yield [{**s, "id": f"{s['id']}.{number}", "text": s["text"].translate(exchange)} for s in sources]


if __name__ == "__main__":
    _write(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
