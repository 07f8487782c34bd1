"""`ctllm corpus` on a real Beam runner, over every input format and over inputs that are damaged or mean harm."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import zstandard
from test_corpus import config, prose, rejected
from tiny_archives import answer, by_member, entry, page

from data_pipeline import corpus, damage, map_cc
from data_pipeline.filters.mask import MaskConfig

pytest.importorskip("resiliparse", exc_type=ImportError)
LIMIT = 1 << 20  # bytes of a record
RANDOM = np.random.default_rng(3)
PARAGRAPHS = [prose(RANDOM) for _ in range(3)]


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def texts(count: int) -> list[str]:
    return [prose(RANDOM) for _ in range(count)]


def good(folder) -> dict[str, int]:
    """Inputs of every format: {path, or subset=path: documents}."""
    wet = by_member(entry("warcinfo", b"x"), *(entry("conversion", text.encode()) for text in texts(3)))
    table = pa.table({"text": texts(4), "id": [f"p{i}" for i in range(4)]})
    pq.write_table(table, folder / "rows.parquet", row_group_size=2)
    packed = gzip.compress(lines(*texts(20)))
    for i in range(3):
        cut = slice(i * len(packed) // 3, (i + 1) * len(packed) // 3)
        (folder / f"zh_books.jsonl.gz.part{i:02d}").write_bytes(packed[cut])
    (folder / "a.jsonl.zst").write_bytes(
        zstandard.compress(lines(*texts(4), f"{texts(1)[0]}请联系a@b.cn。", "太短：c@d.cn"))
    )
    (folder / "crawl.warc.wet.gz").write_bytes(wet)
    return {
        str(folder / "rows.parquet"): 4,
        f"zh_books={folder}/zh_books.*": 20,
        str(folder / "a.jsonl.zst"): 6,
        f"zh_others={folder}/crawl.warc.wet.gz": 3,
    }


def harm(folder, size: int) -> None:
    """Inputs that are damaged, or made to do harm: bombs of so many bytes."""
    long = lines(*texts(300))
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(long)[:-5000])
    (folder / "cut.jsonl.zst").write_bytes(zstandard.compress(long)[:-5000])
    (folder / "bad.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n{"id": "no text"}\n{"text": ""}\nno JSON: e@f.cn\n')
    (folder / "long.jsonl").write_bytes(lines("x" * 50_000_000, *texts(1)))
    (folder / "bomb.jsonl.gz").write_bytes(gzip.compress(b"\n" * (1 << 20)) * (size >> 20))
    (folder / "bomb.jsonl.zst").write_bytes(zstandard.compress(b"x" * size))
    table = pa.table({"text": ["x" * size]})
    pq.write_table(table, folder / "bomb.parquet", use_dictionary=False, compression="zstd")
    paths = [{"id": f"{'../' * 8}wicked{i}", "text": text} for i, text in enumerate(texts(1))]
    paths += [{"id": "/etc/wicked\0\n", "text": texts(1)[0]}]
    (folder / "paths.jsonl").write_text("\n".join(map(json.dumps, paths)))
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 30))
    pages = [
        answer(page(PARAGRAPHS, "gb18030"), content_type="text/html; charset=gbk"),
        answer(f'<!DOCTYPE html [<!ENTITY l0 "lol">{laughs}]><body>&l29;'.encode()),
        answer(b"<div>" * 200_000),
        answer(b"gone", status="404 Not Found"),
    ]
    records = [entry("response", record, url=f"http://a/{i}") for i, record in enumerate(pages)]
    (folder / "pages.warc.gz").write_bytes(by_member(*records))
    (folder / "%2e%2e%2f$(wicked).jsonl").write_bytes(lines(*texts(1)))
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text(texts(1)[0])
    odd = {"text": texts(1), "id": ["late"], "date": pa.array([2**62], pa.timestamp("us"))}
    pq.write_table(pa.table(odd), folder / "late.parquet")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    (folder / "harm").mkdir()
    wanted = good(folder)
    harm(folder / "harm", 1 << 25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(damage, "JUDGED", 1 << 22)
        settings = config([*wanted, f"{folder}/harm/*"], max_record_bytes=LIMIT)
        filters = dataclasses.replace(settings.filters, mask=MaskConfig("<邮箱>", "", "", ""))
        return folder, corpus.run(dataclasses.replace(settings, filters=filters), str(folder / "out" / "corpus"))


def test_every_document_of_every_format_arrives_in_its_subset(built):
    result = built[1]
    found = {name: values["kept"] for name, values in result["subsets"].items()}
    assert result["totals"]["masked"] == {"email": 1}
    assert found["zh_books"] == 20 and found["zh_others"] == 3
    ids = [map_cc.find(built[0] / "out" / "corpus" / "map_cc", f"p{i}").source for i in range(4)]
    assert ids == ["zh_cc"] * 4
    source = tfds.load("map_cc/zh_cc", data_dir=str(built[0] / "out" / "corpus"), split="train")
    pages = {row["url"].decode(): row["text"].decode() for row in tfds.as_numpy(source) if row["url"]}
    assert pages == {"http://a/0": "\n\n".join(PARAGRAPHS)}


def test_what_is_rejected_is_masked_as_well(built):
    workdir = built[0] / "out" / "corpus"
    (short,) = [record for record in rejected(workdir) if record.get("text", "").startswith("太短")]
    (broken,) = [record for record in rejected(workdir) if record["reasons"][0]["rule"] == "invalid_json"]
    assert (short["text"], broken["excerpt"]) == ("太短：<邮箱>", "no JSON: <邮箱>")
    for ending in ("json", "html"):
        report = (workdir / f"report.{ending}").read_text()
        assert not any(address in report for address in ("a@b.cn", "c@d.cn", "e@f.cn"))


def test_damage_is_counted_and_reported_file_by_file(built):
    folder, result = built
    damaged = {entry["file"].rpartition("/")[2]: entry["damage"] for entry in result["damaged_files"]}
    assert set(damaged) == {"cut.jsonl.gz", "cut.jsonl.zst", "bomb.jsonl.gz", "bomb.jsonl.zst", "bomb.parquet"}
    for name, said in damaged.items():
        assert ("decompression bomb" if name.startswith("bomb") else "Error") in said, name
    assert [path.rpartition("/")[2] for path in result["empty_files"]] == ["empty.jsonl"]
    reasons = {"invalid_utf8": 1, "no_text": 1, "empty_text": 1, "invalid_json": 1, "record_too_long": 1}
    reasons |= {"no_page": 1, "page_too_deep": 1}
    assert result["totals"]["malformed"] == reasons
    by_file = [record for record in rejected(folder / "out" / "corpus") if record["reasons"][0]["rule"] in reasons]
    assert {record["file"].rpartition("/")[2] for record in by_file} == {"bad.jsonl", "long.jsonl", "pages.warc.gz"}
    page_of_report = (folder / "out" / "corpus" / "report.html").read_text()
    assert all(name in page_of_report for name in damaged) and "1 email" in page_of_report


def test_an_id_or_a_name_like_a_path_stays_an_id(built):
    folder, _ = built
    text = f"{folder}/harm/caf\\xe9.txt"  # its name is no UTF-8
    for name in ("../" * 8 + "wicked0", "/etc/wicked\0\n", "%2e%2e%2f$(wicked):1", text, "late"):
        assert map_cc.find(folder / "out" / "corpus" / "map_cc", name).id == name
    outside = [path for path in folder.rglob("*wicked*") if "harm" not in path.parts]
    assert outside == [] and [path.name for path in (folder / "out").iterdir()] == ["corpus"]
    assert not os.path.exists("/etc/wicked")


@pytest.mark.slow
def test_harm_costs_a_worker_little_memory(tmp_path):
    """In a process of its own, with the bounds as they are: bombs are judged from 128 MiB on."""
    harm(tmp_path, 1 << 28)
    program = (
        "import sys; sys.path.insert(0, 'tests'); import test_corpus as t, resource; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"t.corpus.run(t.config([{str(tmp_path / '*')!r}]), {str(tmp_path / 'out')!r}); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 1 << 30
