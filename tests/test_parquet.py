"""Parquet files: their rows are records whatever stands in the columns, and limits hold inside of lists and structs."""

import datetime
import decimal
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_inputs import parquet, read, written

from data_pipeline.documents import Document, Fields, Malformed
from data_pipeline.parquet_footer import Column, row_groups
from data_pipeline.shards import json_line


def test_rows_of_a_parquet_file_are_records_by_field_names(tmp_path):
    day = datetime.date(2024, 1, 2)
    columns = {"key": [1, 2, 3], "content": ["一", None, "三"], "score": [0.5, 1.5, 2.5]}
    columns |= {"day": [day] * 3, "price": [decimal.Decimal("1.50")] * 3, "tags": [["a"], [], None]}
    path = parquet(tmp_path / "a.parquet", columns, row_group_size=2)
    (first, second, third), reader = read(path, fields=Fields(id="key", url="u", source="s", text="content"))
    meta = {"score": 0.5, "day": "2024-01-02", "price": "1.50", "tags": ["a"]}
    assert first == Document("1", "", "zh_cc", "一", meta, 1)
    assert (second.reason, second.line, third.id, reader.records) == ("no_text", 2, "3", 3)


def test_lists_and_structs_keep_their_content_and_place_however_they_are_cut(tmp_path):
    rows = [
        {
            "text": f"t{i}",
            "turns": [{"role": "user", "content": f"c{i % 7}" * 9}, None][: i % 3],
            "n": i,
            "where": {"a": f"a{i}", "b": [[i, None], []][: i % 3]} if i % 4 else None,
            "last": ["x", None] if i % 2 else None,
        }
        for i in range(300)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=130, data_page_size=100)
    items, reader = read(tmp_path / "a.parquet")
    assert reader.damage is None and [item.text for item in items] == [row.pop("text") for row in rows]
    assert [item.meta for item in items] == rows and all(list(item.meta) == list(rows[0]) for item in items)


@pytest.mark.parametrize(
    ("column", "size"),
    [
        (pa.array([{"a": "xx", "b": {"c": "yyy"}}, None]), 5),
        (pa.array([["xx", None, "y"], None]), 3 + 3 * 8),
        (pa.array([[[1], [2, 3]], []]), 5 * 8),
        (pa.array([[("k", "vv")], None], pa.map_(pa.string(), pa.string())), 3 + 8),
        (pa.array([[{"a": b"xx", "b": 1}], None]), 2 + 8),
        (pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)), 2 * 8),
        (pa.array([b"abc", None], pa.binary(3)), 3),
        (pa.array([[1.5], [2.5]], pa.large_list(pa.float32())), 8),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_the_limit_counts_what_a_row_holds_inside(tmp_path, column, size):
    path = parquet(tmp_path / "a.parquet", {"text": ["t" * 100, ""], "x": column})
    for limit, reason in ((100 + size, ""), (99 + size, "record_too_long")):
        first, _ = read(path, limit=limit)[0]
        assert (first.reason if isinstance(first, Malformed) else "") == reason


FAR = 2**62  # microseconds: the year 148,108


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([FAR], pa.timestamp("us")), str(FAR)),
        (pa.array([-FAR], pa.timestamp("ms", tz="UTC")), str(-FAR)),
        (pa.array([1], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
        (pa.array([1], pa.timestamp("us", tz="Mars/Phobos")), "1970-01-01 00:00:00.000001Z"),
        (pa.array([-62135596800], pa.timestamp("s", tz="America/New_York")), "0001-01-01 00:00:00.000Z"),
        (pa.array([2**31 - 1], pa.date32()), str(2**31 - 1)),
        (pa.array([1], pa.time64("ns")), "00:00:00.000000001"),
        (pa.array([1], pa.duration("ns")), "1"),
        (pa.array([[1, None, FAR]], pa.list_(pa.timestamp("us"))), str(FAR)),
        (pa.array([{"a": {"b": FAR}}], pa.struct({"a": pa.struct({"b": pa.timestamp("us")})})), str(FAR)),
        (pa.array([float("nan")]), None),
        (pa.array([float("-inf")]), None),
        (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
        (pa.array([decimal.Decimal(10**70)], pa.decimal256(76)), str(10**70)),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_a_value_that_no_calendar_or_number_has_is_said_as_text(tmp_path, column, said):
    (item,), _ = read(parquet(tmp_path / "a.parquet", {"text": ["t"], "x": column}))
    found = json.loads(json_line({"meta": item.meta}))["meta"]["x"]
    assert found == said or str(said) in str(found)


def test_rows_that_no_json_can_hold_are_counted(tmp_path):
    deep = pa.array([1, 2], pa.int8())
    for _ in range(253):
        deep = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), deep)
    items, reader = read(parquet(tmp_path / "a.parquet", {"text": ["t", "u"], "x": deep}, store_schema=False))
    assert [item.reason for item in items] == ["nested_too_deep"] * 2 and reader.damage is None


def test_names_of_columns_may_be_anything_but_no_utf8_is_damage(tmp_path):
    names = ["", ".", "a.b", "a", "a.", "a.list", "a.list.element"]
    kinds = [pa.array([["x"], None]), pa.array([1, 2]), pa.array([{"c": "y"}, None]), pa.array(["z", "z"])]
    for shift in range(len(kinds)):
        columns = {name: kinds[(i + shift) % len(kinds)] for i, name in enumerate(names)}
        items, reader = read(parquet(tmp_path / "a.parquet", {"text": ["t", "u"], **columns}))
        assert [item.text for item in items] == ["t", "u"] and reader.damage is None
        assert items[1].meta == {name: column[1].as_py() for name, column in columns.items()}
    data = parquet(tmp_path / "a.parquet", {"text": ["t"], "name": ["n"]}, store_schema=False).read_bytes()
    items, reader = read(written(tmp_path / "b.parquet", data.replace(b"name", b"\xffame")))
    assert items == [] and "UnicodeDecodeError" in reader.damage


def test_a_footer_that_promises_more_rows_than_there_are_is_damage(tmp_path):
    columns = {"text": ["t"] * 300, "x": [[1]] * 300}
    data = parquet(tmp_path / "a.parquet", columns, store_schema=False).read_bytes()
    number = data.rindex(b"\xd8\x04")  # 300, behind the columns of the row group
    items, reader = read(written(tmp_path / "b.parquet", data[:number] + b"\xfe\x7f" + data[number + 2 :]))
    assert items == [] and "says 8,191 rows and has a column of 300 values" in reader.damage


NESTED = pa.table({"text": ["t"] * 9, "x": [["a"] * i for i in range(9)], "y": [{"a": i} for i in range(9)]})
FLIPPED = """
import io, pathlib, sys
from data_pipeline.containers import _rows
from data_pipeline.damage import Damaged

data = bytearray(pathlib.Path(sys.argv[1]).read_bytes())
footer = int.from_bytes(data[-8:-4], "little")
for place in range(len(data) - 8 - footer, len(data)):
    for bit in (0, 1, 4, 7):
        data[place] ^= 1 << bit
        try:
            list(_rows(io.BytesIO(data), 1000))
        except Damaged:
            pass
        data[place] ^= 1 << bit
"""


def test_what_the_footer_says_is_read_as_pyarrow_reads_it(tmp_path):
    for options in ({}, {"use_dictionary": False, "data_page_version": "2.0", "write_statistics": False}):
        pq.write_table(NESTED, tmp_path / "a.parquet", row_group_size=4, **options)
        theirs = pq.read_metadata(tmp_path / "a.parquet")
        with open(tmp_path / "a.parquet", "rb") as file:
            groups = list(row_groups(file))
        assert len(groups) == theirs.num_row_groups == 3
        for i, group in enumerate(groups):
            other = theirs.row_group(i)
            assert (group.rows, group.unpacked) == (other.num_rows, other.total_byte_size)
            columns = [other.column(j) for j in range(other.num_columns)]
            assert group.columns == [
                Column(c.num_values, c.total_compressed_size, c.total_uncompressed_size, c.has_dictionary_page)
                for c in columns
            ]


def test_a_footer_with_a_wrong_bit_is_damage_at_worst_and_never_the_end_of_the_process(tmp_path):
    """In a process of its own: what C++ throws where nobody listens ends it, whatever a test may do."""
    pq.write_table(NESTED, tmp_path / "a.parquet")
    done = subprocess.run([sys.executable, "-c", FLIPPED, tmp_path / "a.parquet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_list_that_names_an_entry_its_dictionary_lacks_is_damage(tmp_path):
    columns = {"text": ["t"] * 8, "x": [["a", "b", "c", "a"]] * 8}
    data = parquet(tmp_path / "a.parquet", columns, compression="none").read_bytes()
    packed, wrong = b"\x24" * 8, b"\xe4" * 8  # two bits an entry: 0 1 2 0, and 0 1 2 3
    assert data.count(packed) == 1
    items, reader = read(written(tmp_path / "b.parquet", data.replace(packed, wrong)))
    assert items == [] and "an entry 3 of a dictionary that has 3" in reader.damage


def test_a_parquet_file_without_columns_holds_nothing(tmp_path):
    assert read(parquet(tmp_path / "a.parquet", {}))[0] == []


@pytest.mark.parametrize("size", [1000, 1001])
def test_the_limit_holds_for_a_row_as_for_a_line(tmp_path, size):
    (item,), _ = read(parquet(tmp_path / "a.parquet", {"text": ["x" * size]}), limit=1000)
    assert (item.reason if isinstance(item, Malformed) else "") == ("record_too_long" if size > 1000 else "")


def test_a_parquet_file_that_is_broken_or_in_parts_is_damaged(tmp_path):
    texts = [os.urandom(100).hex() for _ in range(1000)]
    data = parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=100, write_page_checksum=True).read_bytes()
    assert "Arrow" in read(written(tmp_path / "cut.parquet", data[:-100]))[1].damage
    assert "named as Parquet" in read(written(tmp_path / "no.parquet", b"text\n"))[1].damage
    assert "join them" in read(written(tmp_path / "b.part0", data[:999]), written(tmp_path / "b.part1", b"x"))[1].damage
    broken = data[:4] + b"\xff" * 200 + data[204:]
    assert read(written(tmp_path / "broken.parquet", broken))[1].damage


def test_binary_columns_are_texts_where_they_can_be(tmp_path):
    columns = {"text": ["一".encode(), b"\xff"], "picture": [b"\xff\xd8", b"a"]}
    (first, second), _ = read(parquet(tmp_path / "a.parquet", columns))
    assert (first.text, first.meta, second.reason) == ("一", {"picture": None}, "no_text")


def test_bytes_that_are_no_text_are_named_and_the_rows_around_them_read(tmp_path):
    column = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")]
    )
    (first, bad, third), _ = read(parquet(tmp_path / "a.parquet", {"text": column}))
    assert (first.text, bad.reason, third.text) == ("a", "invalid_utf8", "c")
