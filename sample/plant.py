"""Writes the sample's documents: natural texts, with duplicates, junk and broken records planted among them.

    python sample/plant.py            writes sample/documents/*.jsonl and sample/planted.json
    python sample/plant.py --check    exits 1 unless the shipped files are what it would write

Reads natural/<subset>.txt and junk.txt: documents in plain text, each below a line `=== HEADER`. The header
is a natural document's URL; of junk it is the subset, the fault, the rule that should reject it, and the URL.
The key, planted.json, maps each planted document's id, or FILE:LINE for a record that is no document, to
    kind      what was planted
    of        the id of the natural document that it repeats (duplicates)
    expect    the rule or reason by which it should be rejected (of a pair, the copy or its original)
Everything is drawn from one seed, each thing by a generator of its own, so the bytes are the same everywhere.
"""

import collections
import json
import pathlib
import random
import re
import sys
from collections.abc import Iterator

HERE = pathlib.Path(__file__).parent
SUBSETS = ("zh_cc", "zh_baike", "zh_papers", "zh_books", "zh_others", "en", "code")
SEED = 20240405

# kind of edit, the rule that should catch it, and for each copy: subset of the original > subset of the copy.
DUPLICATES = """
exact            duplicate_exact  zh_cc>zh_cc zh_cc>zh_others zh_baike>zh_cc zh_books>zh_books en>en code>code
form             duplicate_exact  zh_cc>zh_cc zh_papers>zh_cc zh_others>zh_others en>en code>code
characters       duplicate_near   zh_cc>zh_cc zh_cc>zh_cc zh_baike>zh_cc zh_papers>zh_papers
characters       duplicate_near   zh_books>zh_cc zh_others>zh_others en>en code>code
sentence_dropped duplicate_near   zh_cc>zh_cc zh_baike>zh_others zh_books>zh_books en>en
boilerplate      duplicate_near   zh_cc>zh_cc zh_books>zh_cc en>en code>code
truncated        duplicate_near   zh_books>zh_cc en>en code>code
shuffled         duplicate_near   zh_books>zh_books en>en code>code
"""
BOILERPLATE = {
    "zh": ("首页 > 文章 > 正文\n", "\n上一篇　下一篇　返回顶部"),
    "en": ("Home > Articles\n", "\nShare this page. Back to top"),
    "code": ("# mirrored copy, do not edit\n", "\n# end of file"),
}


def generator(*name: object) -> random.Random:
    """The random generator of a named thing."""
    return random.Random(":".join(str(part) for part in (SEED, *name)))


def read_texts(path: pathlib.Path) -> list[tuple[str, str]]:
    """(header, text) of each document of a plain text file."""
    parts = re.split(r"^=== (.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [(header, text.strip("\n")) for header, text in zip(parts[1::2], parts[2::2], strict=True)]


def record(name: str, url: str, source: str, text: str) -> dict[str, str]:
    return {"id": name, "url": url, "source": source, "text": text}


def language(subset: str) -> str:
    return "zh" if subset.startswith("zh") else subset


# --- duplicates: each edit takes (text, language, generator) and returns the copy's text


def exact(text: str, lang: str, rng: random.Random) -> str:
    return text


def form(text: str, lang: str, rng: random.Random) -> str:
    """Other punctuation, spacing, width and case, the same words."""
    if lang == "zh":
        table = str.maketrans("，。！？：；（）、“”", ',.!?:;(),""')
        return text.translate(table).replace("\n\n", "\n").replace(".", ". ").replace(",", ", ")
    if lang == "code":
        return text.replace("    ", "\t").replace("\n\n", "\n")
    return text.title().replace(", ", " , ").replace("\n\n", "\n")


def characters(text: str, lang: str, rng: random.Random) -> str:
    """One character changed in each stretch of 160: a Chinese one or a letter into another that is near."""
    usable = re.compile(r"[\u4e00-\u9fff]" if lang == "zh" else r"\w")
    edited = list(text)
    for start in range(0, max(160, len(text) - 159), 160):
        places = [i for i in range(start, min(start + 160, len(text))) if usable.match(text[i])]
        place = rng.choice(places)
        edited[place] = rng.choice([text[i] for i in places if text[i] != text[place]])
    return "".join(edited)


def sentences(text: str) -> list[str]:
    """The sentences with what follows them, so that joining gives the text back."""
    return re.findall(r".*?(?:[。！？]”?|[.!?](?=\s))\s*|.+$", text, flags=re.DOTALL)


def sentence_dropped(text: str, lang: str, rng: random.Random) -> str:
    """Without the shortest sentence that is neither the first nor the last."""
    parts = sentences(text)
    shortest = min(range(1, len(parts) - 1), key=lambda i: (len(parts[i]), i))
    return "".join(parts[:shortest] + parts[shortest + 1 :])


def boilerplate(text: str, lang: str, rng: random.Random) -> str:
    header, footer = BOILERPLATE[lang]
    return header + text + footer


def truncated(text: str, lang: str, rng: random.Random) -> str:
    """The first 85 to 90 % of the text."""
    return text[: round(len(text) * rng.uniform(0.86, 0.89))]


def shuffled(text: str, lang: str, rng: random.Random) -> str:
    """The paragraphs (of code: blocks between empty lines) in another order."""
    blocks = re.split(r"\n{2,}", text)
    order = list(range(len(blocks)))
    while order == sorted(order):
        rng.shuffle(order)
    return "\n\n".join(blocks[i] for i in order)


EDITS = (exact, form, characters, sentence_dropped, boilerplate, truncated, shuffled)


def duplicates(natural: dict[str, list[dict]]) -> Iterator[tuple[str, str, dict]]:
    """(subset, text, key entry) of each planted copy; every original is used once."""
    edits = {edit.__name__: edit for edit in EDITS}
    used = set()
    for row, line in enumerate(DUPLICATES.strip().splitlines()):
        kind, expect, *pairs = line.split()
        for number, pair in enumerate(pairs):
            source, target = pair.split(">")
            rng = generator("duplicate", row, number)
            lengths = sorted(len(document["text"]) for document in natural[source])
            usable = [document for document in natural[source] if document["id"] not in used]
            # the longer half: an edit of a fixed size then leaves the pair clearly alike
            choices = [document for document in usable if len(document["text"]) >= lengths[len(lengths) // 2]]
            original = rng.choice(choices)
            used.add(original["id"])
            text = edits[kind](original["text"], language(source), rng)
            yield target, text, {"kind": f"duplicate: {kind}", "of": original["id"], "expect": expect}


# --- junk: written by hand


def junk() -> Iterator[tuple[str, str, dict, str]]:
    """(subset, text, key entry, url) of each junk document."""
    for header, text in read_texts(HERE / "junk.txt"):
        subset, fault, rule, url = header.split()
        yield subset, text, {"kind": f"junk: {fault.replace('_', ' ')}", "expect": rule}, url


# --- broken records: lines of a file that are no document


def broken(natural: dict[str, list[dict]]) -> Iterator[tuple[str, bytes, dict]]:
    """(subset, line, key entry) of each broken record."""
    text = "这一条记录的文字写得没有问题，只是装它的信封坏了。"
    text += "它应当被退回，并且说明退回的原因，而不是悄悄地丢掉；等信封补好以后，再重新寄来。"

    def line(**fields: object) -> bytes:
        """A record with these fields; None leaves a field out."""
        whole = {"id": "b", "url": "https://broken.example.com/b", "source": "zh_cc", "text": text} | fields
        return dump({name: value for name, value in whole.items() if value is not None})

    cases = (
        ("zh_cc", "JSON cut off", "invalid_json", line()[:-32]),
        ("en", "not JSON", "invalid_json", b"<html><body>502 Bad Gateway</body></html>"),
        ("zh_others", "a JSON list", "not_an_object", dump(["zh_others-0000", text])),
        ("zh_baike", "no text", "no_text", line(text=None)),
        ("zh_papers", "empty text", "empty_text", line(text=" \n")),
        ("zh_cc", "a number as text", "wrong_type", line(text=2024)),
        ("zh_books", "invalid UTF-8", "invalid_utf8", line().replace("信".encode(), b"\xe4\xff")),
        ("zh_cc", "unknown source", "unknown_source", line(source="zh_forum")),
        ("zh_cc", "an id that was there before", "duplicate_id", line(id=natural["zh_cc"][0]["id"])),
    )
    for subset, kind, expect, raw in cases:
        yield subset, raw, {"kind": f"broken: {kind}", "expect": expect}


# --- files


def dump(document: object) -> bytes:
    """One line of JSON, without its end."""
    return json.dumps(document, ensure_ascii=False).encode()


def planted_files() -> dict[str, bytes]:
    """Name, below this folder, to bytes of every file that is written."""
    natural = {}
    for subset in SUBSETS:
        texts = read_texts(HERE / "natural" / f"{subset}.txt")
        natural[subset] = [
            record(f"{subset}-{number:04}", url, subset, text) for number, (url, text) in enumerate(texts, 1)
        ]
    extra = {subset: [] for subset in SUBSETS}  # (line, key entry, id or None)
    counts = collections.Counter()

    def add(subset: str, text: str, entry: dict, url: str | None = None) -> None:
        counts[subset] += 1
        name = f"{subset}-p{counts[subset]:03}"
        document = record(name, url or f"https://mirror.example.net/{subset}/{counts[subset]}", subset, text)
        extra[subset].append((dump(document), entry, name))

    for subset, text, entry in duplicates(natural):
        add(subset, text, entry)
    for subset, text, entry, url in junk():
        add(subset, text, entry, url)
    for subset, line, entry in broken(natural):
        extra[subset].append((line, entry, None))

    files, key = {}, {}
    for subset in SUBSETS:
        lines = [(dump(document), None, None) for document in natural[subset]]
        rng = generator("place", subset)
        for item in extra[subset]:
            lines.insert(rng.randint(1, len(lines)), item)
        files[f"documents/{subset}.jsonl"] = b"".join(line + b"\n" for line, _, _ in lines)
        for number, (_, entry, name) in enumerate(lines, 1):
            if entry:
                key[name or f"{subset}.jsonl:{number}"] = entry
    files["planted.json"] = json.dumps(key, ensure_ascii=False, indent=1).encode() + b"\n"
    return files


def table(files: dict[str, bytes]) -> str:
    """Markdown: what the sample holds, by subset and by what was planted."""
    key = json.loads(files["planted.json"])
    groups = ("natural", "duplicate", "junk", "broken")
    rows = ["| subset | " + " | ".join(groups) + " | bytes |", "|---" * (len(groups) + 2) + "|"]
    total = collections.Counter()
    for subset in SUBSETS:
        content = files[f"documents/{subset}.jsonl"]
        here = [entry["kind"].split(":")[0] for name, entry in key.items() if re.split(r"-|\.", name)[0] == subset]
        count = collections.Counter(here)
        count["natural"] = content.count(b"\n") - len(here)
        count["bytes"] = len(content)
        total.update(count)
        rows.append(f"| {subset} | " + " | ".join(str(count[name]) for name in (*groups, "bytes")) + " |")
    rows.append("| **all** | " + " | ".join(str(total[name]) for name in (*groups, "bytes")) + " |")
    kinds = collections.Counter((entry["kind"], entry["expect"]) for entry in key.values())
    rows += ["", "| planted | expected | number |", "|---|---|---|"]
    rows += [f"| {kind} | `{expect}` | {number} |" for (kind, expect), number in sorted(kinds.items())]
    return "\n".join(rows) + "\n"


def main() -> int:
    files = planted_files()
    if "--check" in sys.argv[1:]:
        wrong = [name for name, content in files.items() if not same(HERE / name, content)]
        for name in wrong:
            print(f"sample/{name} is not what plant.py writes: run `python sample/plant.py`", file=sys.stderr)
        return bool(wrong)
    for name, content in files.items():
        (HERE / name).parent.mkdir(exist_ok=True)
        (HERE / name).write_bytes(content)
    print(table(files), end="")
    return 0


def same(path: pathlib.Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


if __name__ == "__main__":
    sys.exit(main())
