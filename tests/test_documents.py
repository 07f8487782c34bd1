"""Reading: every record becomes a document or a rejection with file, line and reason; none is lost."""

import gzip
import json
import tracemalloc

import pytest

from ctllm_jax.common.errors import UserError
from data_pipeline import batches, damage
from data_pipeline.documents import Document, DocumentReader, Fields, Malformed, input_files

FIELDS = Fields(id="id", url="url", source="source", text="text")


def read(path, default_source="zh_cc", limit=1 << 20, fields=FIELDS):
    reader = DocumentReader(input_files([str(path)])[0], fields, default_source, limit)
    return list(reader), reader


def write(path, *lines: bytes):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "a", "text": ', "invalid_json"),
        (b'{"id": "a", "text": NaN}', "invalid_json"),
        (b'{"id": "a", "text": "\\ud800"}', "invalid_json"),
        (b"[1, 2]", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b'{"id": "a"}', "no_text"),
        (b'{"id": "a", "text": null}', "no_text"),
        (b'{"id": "a", "text": ""}', "empty_text"),
        (b'{"id": "a", "text": " \\n\\t"}', "empty_text"),
        (b'{"id": "a", "text": 5}', "wrong_type"),
        (b'{"id": ["a"], "text": "t"}', "wrong_type"),
        (b'{"id": true, "text": "t"}', "wrong_type"),
        (b'{"url": {}, "text": "t"}', "wrong_type"),
        (b'{"id": "a", "text": "\xff\xfe"}', "invalid_utf8"),
        (b'{"source": "zh_mars", "text": "t"}', "unknown_source"),
        (b'{"source": 3, "text": "t"}', "unknown_source"),
        (b'{"text": "' + b"x" * 2000 + b'"}', "record_too_long"),
    ],
)
def test_a_bad_record_is_named_and_its_neighbours_are_read(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", b'{"text": "first"}', line, b'{"text": "third"}')
    (first, bad, third), reader = read(path, limit=1000)
    assert (first.text, third.text) == ("first", "third")
    assert isinstance(bad, Malformed) and bad.reason == reason and bad.line == 2 and bad.excerpt
    assert reader.records == 3 and reader.damage is None


def test_a_record_without_source_is_rejected_where_no_default_is_set(tmp_path):
    (item,), _ = read(write(tmp_path / "a.jsonl", b'{"text": "t"}'), default_source=None)
    assert item.reason == "no_source"


def test_a_malformed_record_counts_for_its_source_where_that_is_known(tmp_path):
    (item,), _ = read(write(tmp_path / "a.jsonl", b'{"source": "code", "text": 5}'))
    assert item.source == "code"


def test_all_parts_of_a_document_arrive(tmp_path):
    record = {
        "key": 7,
        "u": "http://a/b",
        "kind": "en",
        "body": "全角，标点。",
        "meta": {"a": 1},
        "date": "2024",
    }
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json.dumps(record).encode(), b"", b"  ")
    (item,), reader = read(path, fields=Fields(id="key", url="u", source="kind", text="body"))
    assert item == Document("7", "http://a/b", "en", "全角，标点。", {"a": 1, "date": "2024"}, 1)
    assert reader.records == 1


def test_a_text_in_parts_is_refused(tmp_path):
    paths = [str(write(tmp_path / name, b"text")) for name in ("a.txt.part1", "a.txt.part2")]
    with pytest.raises(UserError, match=r"a\.txt\.part1 is a part of a text, which is read whole"):
        input_files(paths)


def test_missing_ids_name_file_and_line_and_differ_between_files_of_one_name(tmp_path):
    paths = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        paths.append(str(write(tmp_path / folder / "part.jsonl.part00", b"", b'{"text": "t"}')))
    names = [file.name for file in input_files([*paths, str(tmp_path / "other.jsonl")])]
    assert names == ["x/part", "y/part", "other"]
    (item,), _ = read(paths[0])
    assert item.id == "part:2"


@pytest.mark.parametrize(("items", "characters", "sizes"), [(2, 100, [2, 2, 2, 1]), (99, 5, [3, 1, 2, 1])])
def test_a_batch_is_closed_by_its_items_or_by_their_characters(monkeypatch, items, characters, sizes):
    monkeypatch.setattr(batches, "ITEMS", items)
    monkeypatch.setattr(batches, "CHARACTERS", characters)
    texts = ["a", "", "bcde", "f" * 50, "gh", "ijk", "l"]
    found = list(batches.batched(iter(texts), len))
    assert [len(batch) for batch in found] == sizes and sum(found, []) == texts


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_the_byte_limit_is_exact(tmp_path, extra, end):
    line = b'{"text": "abc"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b" " * extra + end)
    (item,), _ = read(path, limit=len(line))
    assert isinstance(item, Malformed) == bool(extra)


def test_a_record_over_the_limit_is_never_held_whole(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "' + b"x" * 50_000_000 + b'"}\n{"text": "next"}\n')
    tracemalloc.start()
    (bad, good), _ = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bad.reason == "record_too_long" and "50,000,012" in bad.detail and good.text == "next"
    assert peak < 10_000_000


@pytest.mark.parametrize("unit", [b"x", b"{}\n", b"\n"], ids=["one line", "many records", "many empty lines"])
def test_a_decompression_bomb_is_left_where_it_shows(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(damage, "JUDGED", 1 << 19)
    monkeypatch.setattr(damage, "EXPANSION", 20)  # of the 128 KiB that gzip takes at once from Python 3.12 on
    path = tmp_path / "bomb.jsonl.gz"
    member = gzip.compress(unit * (1 << 20), mtime=0)
    path.write_bytes(gzip.compress(b'{"text": "good"}\n') + member * 1000)
    items, reader = read(path, limit=1 << 16)
    assert items[0].text == "good" and reader.records < 1_000_000
    assert "decompression bomb" in reader.damage


def test_text_that_compresses_well_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(damage, "JUDGED", 1)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"text": "page %d"}\n' % i for i in range(20_000))))
    items, reader = read(path)
    assert len(items) == 20_000 and reader.damage is None


def packed(lines: int) -> bytes:
    """Gzip of lines that hardly compress, so that a cut falls among them."""
    texts = (f"{i * 7919 % 104729:x}-{i * i % 99991:x}" * 20 for i in range(lines))
    return gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), mtime=0)


def test_a_gzip_cut_short_keeps_its_whole_lines_and_is_reported(tmp_path):
    data = packed(20_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data[: len(data) // 2])
    items, reader = read(path)
    assert 5_000 < len(items) < 15_000 and all(isinstance(item, Document) for item in items)
    assert [item.line for item in items] == list(range(1, len(items) + 1))
    assert "EOFError" in reader.damage and f"after {len(items):,} records" in reader.damage


def test_a_flipped_byte_and_a_file_that_is_no_gzip_are_reported(tmp_path):
    data = bytearray(packed(20_000))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "flipped.jsonl.gz").write_bytes(data)
    assert read(tmp_path / "flipped.jsonl.gz")[1].damage
    write(tmp_path / "plain.jsonl.gz", b'{"text": "t"}')
    items, reader = read(tmp_path / "plain.jsonl.gz")
    assert items == [] and "named .gz, but it is not" in reader.damage
