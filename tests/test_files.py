"""Paths, and writes that are whole or not there."""

import json
import math
import os
import re

import pytest

from ctllm_jax.common import files
from ctllm_jax.common.errors import UserError


def names(folder) -> list[str]:
    """Everything below a folder but a stage's lock, which stays."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock")


def test_a_write_replaces_the_whole_file_and_makes_its_folder(tmp_path):
    files.write_atomic(tmp_path / "a" / "b.txt", "早上好")
    files.write_atomic(tmp_path / "a" / "b.txt", b"later")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"later"
    assert names(tmp_path) == ["a", "a/b.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "inside").touch()
    with pytest.raises(OSError):
        files.write_atomic(tmp_path / "taken", "text")
    files.write_json(tmp_path / "value.json", {"loss": 1.0})
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "value.json", {"loss": math.nan})
    with pytest.raises(UnicodeEncodeError):
        files.write_atomic(tmp_path / "value.json", "\ud800")
    assert files.read_json(tmp_path / "value.json") == {"loss": 1.0}
    assert names(tmp_path) == ["taken", "taken/inside", "value.json"]


def test_atomic_file_publishes_on_success_only(tmp_path):
    with files.atomic_file(tmp_path / "x") as temporary:
        temporary.write_text("first")
        assert not (tmp_path / "x").exists()
    with pytest.raises(RuntimeError):
        with files.atomic_file(tmp_path / "x") as temporary:
            temporary.write_text("second, cut short")
            raise RuntimeError
    assert (tmp_path / "x").read_text() == "first" and names(tmp_path) == ["x"]


def test_atomic_dir_replaces_on_success_only(tmp_path):
    for content in ("first", "second"):
        with files.atomic_dir(tmp_path / "d") as temporary:
            (temporary / content).write_text(content)
    assert names(tmp_path) == ["d", "d/second"]
    with pytest.raises(RuntimeError):
        with files.atomic_dir(tmp_path / "d") as temporary:
            (temporary / "third").write_text("cut short")
            raise RuntimeError
    assert names(tmp_path) == ["d", "d/second"]


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "sub" / ".d.1.tmp").mkdir(parents=True)
    (tmp_path / "sub" / ".d.1.tmp" / "part").touch()
    (tmp_path / ".f.2.tmp").touch()
    (tmp_path / "notes.tmp").touch()
    (tmp_path / ".hidden").touch()
    files.remove_temporaries(tmp_path)
    assert names(tmp_path) == [".hidden", "notes.tmp", "sub"]


def test_json_lines_keep_line_separators_inside_strings(tmp_path):
    rows = [{"text": "a\u2028b\u0085c\x0bd\x1ce\r"}, {"text": "\n"}]
    path = tmp_path / "rows.jsonl"
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode() + b"\n")
    assert files.read_jsonl(path) == rows


@pytest.mark.parametrize("bad", [b'{"cut": ', b"[1]", b'"text"', b'{"text": "\xff"}'])
def test_a_malformed_line_is_named_with_its_file_and_number(tmp_path, bad):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"good": 1}\n\n' + bad + b"\n")
    with pytest.raises(UserError, match=f"{re.escape(str(path))}:3: "):
        files.read_jsonl(path)


def test_missing_and_malformed_files_are_user_errors_that_name_them(tmp_path):
    for read in (files.read_json, files.read_jsonl):
        with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
            read(tmp_path / "nowhere.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: not valid JSON"):
        files.read_json(tmp_path / "bad.json")


def test_patterns_expand_to_sorted_files_without_repeats(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        files.write_atomic(tmp_path / name, "")
    root = str(tmp_path)
    found = files.expand([f"{root}/**/*.txt", f"{root}/a.txt"])
    assert found == [f"{root}/{name}" for name in ("a.txt", "b.txt", "sub/c.txt")]
    for pattern in (f"{root}/*.md", f"{root}/sub"):  # a folder is no file
        with pytest.raises(UserError, match=f"no file matches {re.escape(repr(pattern))}"):
            files.expand([f"{root}/*.txt", pattern])


@pytest.mark.parametrize("place", [0, -1, 70_000])
def test_identity_changes_with_content_at_either_end_and_with_size(tmp_path, place):
    content = bytearray(os.urandom(140_000))
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(content)
    other.write_bytes(content)
    assert files.identity(path) == files.identity(other)
    if place == 70_000:
        other.write_bytes(content + b"x")
    else:
        content[place] ^= 1
        other.write_bytes(content)
    assert files.identity(path) != files.identity(other)


@pytest.mark.parametrize("place", [0, -1, 70_000])
def test_the_digest_of_a_file_changes_with_content_anywhere(tmp_path, place):
    content = bytearray(os.urandom(140_000))
    path = tmp_path / "a"
    path.write_bytes(content)
    before = files.file_digest(path)
    content[place] ^= 1
    path.write_bytes(content)
    assert files.file_digest(path) != before
