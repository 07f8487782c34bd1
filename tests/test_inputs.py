"""Input formats: what stands in them arrives, and what is wrong with them is said and costs little."""

import dataclasses
import gzip
import json
import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fake_gcs import serving
from tiny_archives import answer, by_member, entry

from ctllm_jax.common.errors import UserError
from data_pipeline import damage
from data_pipeline.documents import Document, DocumentReader, Fields, Malformed, find_inputs, input_files
from data_pipeline.shards import json_line

FIELDS = Fields(id="id", url="url", source="source", text="text")
LINES = b"".join(json.dumps({"id": i, "text": f"text {i * 7919 % 104729:x}"}).encode() + b"\n" for i in range(5000))


def read(*paths, limit=1 << 20, fields=FIELDS):
    (file,) = input_files([str(path) for path in paths])
    reader = DocumentReader(file, fields, "zh_cc", limit)
    return list(reader), reader


def written(path, data: bytes):
    path.write_bytes(data)
    return path


def parquet(path, columns: dict, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


# ---- Packing and parts


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.unknown"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
def test_packing_is_told_by_content_and_a_name_that_promises_another_is_damage(tmp_path, name, pack):
    items, reader = read(written(tmp_path / name, pack(LINES)))
    if pack is bytes and name.endswith((".gz", ".zst")):
        assert items == [] and "not packed so" in reader.damage
    else:
        assert [item.id for item in items] == list(map(str, range(5000))) and reader.damage is None


def test_zstd_frames_in_a_row_and_skippable_ones_are_one_stream(tmp_path):
    skippable = b"\x50*M\x18\x04\0\0\0abcd"  # pzstd begins so
    data = skippable + zstandard.compress(LINES) + skippable + zstandard.compress(LINES)
    assert len(read(written(tmp_path / "a.jsonl.zst", data))[0]) == 10_000


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_parts_cut_by_bytes_are_one_file_in_the_order_of_their_numbers(tmp_path, pack):
    data = pack(LINES)
    cuts = [0, 1, 3, 3, *range(1000, len(data), len(data) // 8), len(data)]  # also parts of next to nothing
    for i, (begin, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        written(tmp_path / f"zh_cc.jsonl.gz.part{i}", data[begin:end])  # part10 sorts before part2
    (file,) = find_inputs([str(tmp_path / "*.part*")])
    assert (file.name, len(file.paths)) == ("zh_cc", len(cuts) - 1)
    reader = DocumentReader(file, FIELDS, "zh_cc", 1 << 20)
    assert [item.line for item in reader] == list(range(1, 5001)) and reader.damage is None


def test_a_part_between_others_must_be_there_and_one_at_the_end_is_missed_when_it_is_read(tmp_path):
    data = gzip.compress(os.urandom(3000).hex().encode() * 3)
    paths = [written(tmp_path / f"a.jsonl.gz.part{i:02d}", data[i * 1000 : (i + 1) * 1000]) for i in range(3)]
    for missing, message in ((0, "part 1 is missing before .*part02"), (1, "part 1 is missing before .*part02")):
        names = [str(path) for i, path in enumerate(paths) if i != missing]
        if missing:
            with pytest.raises(UserError, match=message):
                input_files(names)
        else:  # numbers may begin with 1, but no gzip begins here
            assert "not packed so" in read(*names)[1].damage
    with pytest.raises(UserError, match="whole and in parts"):
        input_files([str(tmp_path / "a.jsonl.gz"), str(paths[0])])
    assert "EOFError" in read(*paths[:2])[1].damage


def test_a_bucket_is_read_as_a_folder_is(tmp_path, monkeypatch):
    (tmp_path / "bucket" / "raw").mkdir(parents=True)
    packed = gzip.compress(LINES)
    for i, piece in enumerate((packed[:9000], packed[9000:])):
        written(tmp_path / "bucket" / "raw" / f"books.jsonl.gz.part{i:02d}", piece)
    written(tmp_path / "bucket" / "raw" / "web.jsonl.zst", zstandard.compress(LINES))
    parquet(tmp_path / "bucket" / "raw" / "code.parquet", {"id": ["a"], "text": ["b"]})
    with serving(tmp_path) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        files = find_inputs(["zh_books=gs://bucket/raw/books*", "gs://bucket/raw/[cw]*"])
        found = {file.name: list(DocumentReader(file, FIELDS, "en", 1 << 20)) for file in files}
    assert {name: (len(items), items[0].source) for name, items in found.items()} == {
        "books": (5000, "zh_books"),
        "web": (5000, "en"),
        "code.parquet": (1, "en"),
    }


# ---- Which subset


def test_an_input_named_for_a_subset_is_of_that_subset_whatever_its_records_say(tmp_path):
    path = written(tmp_path / "a.jsonl", b'{"text": "t", "source": "Wikipedia"}\n{"text": "t"}\nbad\n')
    (file,) = find_inputs([f"zh_baike={path}"])
    first, second, bad = DocumentReader(file, FIELDS, None, 1 << 20)
    assert (first.source, first.meta, second.source) == ("zh_baike", {"source": "Wikipedia"}, "zh_baike")
    assert bad.source == "zh_baike"
    odd = written(tmp_path / "lang=zh.jsonl", b"")
    assert find_inputs([str(odd)])[0].source is None  # a path with a = in it
    with pytest.raises(UserError, match="named twice, for en and for zh_baike"):
        find_inputs([f"zh_baike={path}", f"en={tmp_path}/a*"])


def test_json_that_could_not_be_written_again_is_refused(tmp_path):
    depths = [100, *range(240, 260), 1000, 2000]
    lines = [f'{{"text": "t", "x": {"[" * depth}{"]" * depth}}}'.encode() for depth in depths]
    items, _ = read(written(tmp_path / "a.jsonl", b"\n".join(lines)))
    good = [item for item in items if isinstance(item, Document)]
    for item in good:
        json_line({"meta": item.meta, "signals": {}})
    assert 10 < len(good) < 20 and [item.reason for item in items[-2:]] == ["nested_too_deep", "invalid_json"]


# ---- Web archives


def test_texts_of_a_wet_file_are_documents(tmp_path):
    data = by_member(
        entry("warcinfo", b"software: x"),
        entry("conversion", "正文。\n第二行。".encode(), warc_identified_content_language="zho,eng"),
        entry("conversion", b"\xff\xfe"),
        entry("conversion", b"x" * 1001, url="http://long"),
        entry("conversion", b"last"),
    )
    (first, bad, long, last), reader = read(written(tmp_path / "a.warc.wet.gz", data), limit=1000)
    assert (first.text, first.url, first.source, last.text) == ("正文。\n第二行。", "http://a.cn/b", "zh_cc", "last")
    assert first.meta == {"date": "2024-03-01T00:00:00Z", "language": "zho,eng"} and len(first.id) == 8
    assert (bad.reason, long.reason, long.line) == ("invalid_utf8", "record_too_long", 3)
    assert reader.damage is None and reader.records == 4


def test_what_is_no_page_is_counted_and_what_is_no_content_is_passed_over(tmp_path):
    data = by_member(
        entry("request", b"GET / HTTP/1.1"),
        entry("response", answer(b"gone", status="404 Not Found")),
        entry("response", answer(b"%PDF", content_type="application/pdf")),
        entry("response", b"nonsense"),
        entry("response", answer(b"x", content_encoding="br")),
        entry("response", answer(b"\x1f\x8bnonsense", content_encoding="gzip")),
        entry("metadata", b"x"),
    )
    items, reader = read(written(tmp_path / "a.warc.gz", data))
    reasons = ["no_page", "no_page", "broken_http", "unknown_encoding", "broken_http"]
    assert [item.reason for item in items] == reasons and "404" in items[0].detail and reader.damage is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (entry("conversion", b"cut short")[:-10], "is cut short"),
        (entry("conversion", b"x", content_length="99999999999"), "is cut short"),
        (entry("conversion", b"x", content_length="-5"), "Content-Length"),
        (entry("conversion", b"x", content_length="many"), "Content-Length"),
        (entry("conversion", b"x", content_length="0"), "no record of a web archive"),
        (b"WARC/1.0\r\nX: " + b"x" * 100_000, "header is cut short or longer"),
        (b"WARC/1.0\r\n" + b"X: y\r\n" * 300, "more than 200 header lines"),
        (b"WARC/1.0\r\nWARC-Type: resp", "header is cut short or longer"),
    ],
)
def test_an_archive_is_read_up_to_where_it_is_damaged(tmp_path, data, message):
    items, reader = read(written(tmp_path / "a.warc", entry("conversion", b"whole") + data))
    assert items[0].text == "whole" and message in reader.damage


# ---- Damage and bombs


def test_a_file_that_is_gone_is_damage(tmp_path):
    items, reader = read(tmp_path / "gone.jsonl")
    assert items == [] and "no such file" in reader.damage


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.warc"])
def test_an_empty_file_holds_nothing_and_is_not_damaged(tmp_path, name):
    items, reader = read(written(tmp_path / name, b""))
    assert items == [] and reader.damage is None


def test_a_zstd_cut_anywhere_is_reported_and_keeps_its_whole_lines(tmp_path):
    data = zstandard.compress(os.urandom(100_000).hex().encode().replace(b"0", b"\n"))
    for size in (5, len(data) // 2, len(data) - 1):
        items, reader = read(written(tmp_path / "a.jsonl.zst", data[:size]))
        assert "Truncated" in reader.damage and all(item.reason in ("invalid_json", "not_an_object") for item in items)


def bomb(kind: str, path):
    """60 MB of one letter, or more, behind a good record."""
    letters = b"x" * 60_000_000
    if kind == "parquet page":
        return parquet(path, {"text": ["good", letters.decode()]}, use_dictionary=False, compression="zstd")
    if kind == "parquet dictionary":
        indices = pa.array([0] + [1] * 3000, pa.int32())
        return parquet(
            path, {"text": pa.DictionaryArray.from_arrays(indices, ["good", "x" * 900_000])}, store_schema=False
        )
    if kind.startswith("parquet"):
        return parquet(path, NESTED[kind](), store_schema=False, compression="zstd")
    pack = {"gzip": gzip.compress, "zstd": zstandard.compress}[kind.split()[0]]
    if kind == "gzip in an archive":
        packed = entry("response", answer(pack(letters), content_encoding="gzip"))
        return written(path, by_member(entry("conversion", b"good"), packed))
    return written(path, pack(b'{"text": "good"}\n') + pack(letters))


def repeated(times: int) -> pa.Array:
    """The same long text again and again, in a few bytes."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), ["x" * 900_000])


def one_list(entries: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, 0, len(entries)], pa.int32()), entries)


NESTED = {
    "parquet list of numbers": lambda: {"text": ["good", "x"], "x": one_list(pa.array(np.zeros(9_000_000, np.int64)))},
    "parquet list of nothing": lambda: {"text": ["good", "x"], "x": one_list(pa.nulls(9_000_000, pa.int8()))},
    "parquet list of texts": lambda: {"text": ["good", "x"], "x": one_list(repeated(3000))},
    "parquet struct": lambda: {"text": ["good"] * 3000, "x": pa.StructArray.from_arrays([repeated(3000)], ["a"])},
    "parquet list of structs": lambda: {
        "text": ["good", "x"],
        "x": one_list(pa.StructArray.from_arrays([repeated(3000), pa.array(range(3000))], ["a", "b"])),
    },
    "parquet map": lambda: {
        "text": ["good", "x"],
        "x": pa.MapArray.from_arrays(pa.array([0, 0, 3000], pa.int32()), pa.array(range(3000)), repeated(3000)),
    },
}
KINDS = ["gzip", "zstd", "gzip in an archive", "parquet page", "parquet dictionary", *NESTED]


@pytest.mark.parametrize("kind", KINDS)
def test_a_decompression_bomb_takes_little_memory_and_is_named(tmp_path, monkeypatch, kind):
    path = bomb(kind, tmp_path / "bomb")
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(damage, "JUDGED", 1 << 22)
    monkeypatch.setattr("data_pipeline.parquet._DECODED", 1 << 22)
    own = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(own)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        items, reader = read(path)
        peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(own)
    if kind == "gzip in an archive":
        assert items[1].reason == "record_too_long"
    else:
        assert "decompression bomb" in reader.damage
    early = ("parquet page", "parquet list of numbers", "parquet list of nothing")  # the footer says so
    assert (not items and kind in early) or items[0].text == "good"
    assert peak < 40_000_000


# ---- Texts


def test_a_text_is_a_document_whose_id_is_its_path(tmp_path):
    paths = [
        written(tmp_path / "a.txt", "\ufeff第一行\r\n第二行\n".encode()),
        written(tmp_path / "b.txt.gz", gzip.compress(b'{"text": 1}')),
        written(tmp_path / "c.txt", b" \n"),
        written(tmp_path / "d.txt", "国".encode("gb18030") * 40),
        written(tmp_path / "e.txt.gz", gzip.compress(b"x" * 5000)[:30]),
        written(tmp_path / "f.txt", b"x" * 1001),
        written(tmp_path / "g.txt", b"y" * 1000),
    ]
    # The user's names of keys are those of JSON lines
    items, reader = read(*paths, limit=1000, fields=Fields(id="key", url="u", source="kind", text="body"))
    texts = {item.id: item.text for item in items if isinstance(item, Document)}
    assert texts == {str(paths[0]): "第一行\n第二行\n", str(paths[1]): '{"text": 1}', str(paths[6]): "y" * 1000}
    refused = {item.line: (item.reason, item.detail) for item in items if isinstance(item, Malformed)}
    reasons = {3: "empty_text", 4: "invalid_utf8", 5: "damaged_file", 6: "record_too_long"}
    assert {line: reason for line, (reason, _) in refused.items()} == reasons
    assert all(str(paths[line - 1]) in refused[line][1] for line in (4, 5, 6))
    assert "gb18030" in refused[4][1] and reader.records == 7 and reader.damage is None


def test_texts_of_one_subset_are_read_by_hundreds(tmp_path):
    for number in range(300):
        written(tmp_path / f"{number:03}.txt", b"t")
    written(tmp_path / "000.jsonl", b'{"text": "t"}\n')
    found = find_inputs([f"zh_books={tmp_path}/0*", f"{tmp_path}/[12]*.txt"])
    sizes = [(os.path.basename(file.path), file.source, len(file.paths)) for file in found]
    assert sizes == [("000.jsonl", "zh_books", 1), ("000.txt", "zh_books", 100), ("100.txt", None, 200)]
    assert len({file.name for file in found}) == 3
    assert found[1].label == f"{tmp_path}/000.txt to {tmp_path}/099.txt" and found[0].label == found[0].path
    assert [len(file.paths) for file in find_inputs([f"{tmp_path}/*.txt"])] == [256, 44]


def test_a_file_whose_name_is_no_utf8_is_read_and_named_in_text(tmp_path):
    names = [b"caf\xe9.txt", b"empty\xff.txt", b"\xd6\xd0.jsonl"]
    for name, content in zip(names, (b"text", b" ", b'{"text": "t"}\nbad\n'), strict=True):
        written(tmp_path / os.fsdecode(name), content)
    files = find_inputs([f"{tmp_path}/*"])
    items = [item for file in files for item in DocumentReader(file, FIELDS, "zh_cc", 1 << 20)]
    assert {item.id for item in items if isinstance(item, Document)} == {f"{tmp_path}/caf\\xe9.txt", "\\xd6\\xd0:1"}
    assert [item.reason for item in items if isinstance(item, Malformed)] == ["empty_text", "invalid_json"]
    json_line({"items": [str(item) for item in items], "files": [[file.name, file.label] for file in files]})
    for left in tmp_path.iterdir():
        left.unlink()
    for file in files:
        reader = DocumentReader(dataclasses.replace(file, share=0.5), FIELDS, "zh_cc", 1 << 20)
        json_line({"items": [str(item) for item in reader], "damage": reader.damage})
    assert "\\xd6\\xd0.jsonl: no such file" in reader.damage
