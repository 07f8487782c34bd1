"""The helpers under every stage: whole writes, stage folders, configs, reports, progress."""

import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree

import pytest

from ctllm_jax.common import config, files, html, manifest, progress
from ctllm_jax.common.errors import UserError

# ---- Files


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


# ---- Stages


def test_a_stage_is_claimed_resumed_and_done(tmp_path, capsys):
    folder = tmp_path / "stage"

    def open_it():
        return manifest.open_stage("build", 1, folder, {"seed": 1, "sizes": (1, 2)}, ["abc"])

    stage = open_it()
    assert not stage.done and names(folder) == ["stage.json"]
    (folder / "part").touch()
    (folder / ".half.tmp").touch()
    stage = open_it()  # cut short: taken up, without what a killed writer left
    assert not stage.done and names(folder) == ["part", "stage.json"]
    with pytest.raises(UserError, match="not a finished folder of `ctllm build`"):
        manifest.read_result(folder, "build")
    assert stage.finish({"rows": 3}) == {"rows": 3} and stage.done
    again = open_it()
    assert again.done and again.result == {"rows": 3} and "already finished" in capsys.readouterr().err
    assert manifest.read_result(folder, "build") == (stage.fingerprint, {"rows": 3})
    assert manifest.stage_fingerprint(folder) == stage.fingerprint
    with pytest.raises(UserError, match="'?build'?"):
        manifest.read_result(folder, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"seed": 2, "deep": {"beta": 0.5}}}, r"settings\.seed: 1 there, 2 now"),
        ({"settings": {"seed": 1, "deep": {"beta": 0.1}}}, r"settings\.deep\.beta: 0\.5 there, 0\.1 now"),
        ({"settings": {"seed": 1}}, r"settings\.deep: .* there, null now"),
        ({"inputs": {"corpus": "def"}}, r'inputs\.corpus: "abc" there, "def" now'),
        ({"name": "other"}, "holds a 'build' run"),
        ({"version": 2}, "version: 1 there, 2 now"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_of_another_run_is_refused_and_the_difference_named(tmp_path, change, message, finished):
    claim = {
        "name": "build",
        "version": 1,
        "workdir": tmp_path,
        "settings": {"seed": 1, "deep": {"beta": 0.5}},
        "inputs": {"corpus": "abc"},
    }
    stage = manifest.open_stage(**claim)
    if finished:
        stage.finish({})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message):
        manifest.open_stage(**claim | change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_is_worked_on_by_one_process_at_a_time(tmp_path):
    def program(then: str) -> list[str]:
        claim = f"manifest.open_stage('build', 1, {str(tmp_path)!r}, {{}}, {{}})"
        return [sys.executable, "-c", f"import sys; from ctllm_jax.common import manifest; {claim}; {then}"]

    holder = subprocess.Popen(
        program("print(flush=True); sys.stdin.read()"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    with pytest.raises(UserError, match="another process is working here"):
        manifest.open_stage("build", 1, tmp_path, {}, {})
    holder.kill()  # however it ends, the folder is free again
    holder.communicate()
    stage = manifest.open_stage("build", 1, tmp_path, {}, {})
    assert not stage.done
    assert subprocess.run(program(""), capture_output=True, check=False).returncode == 1
    stage.finish({})
    assert subprocess.run(program(""), capture_output=True, check=False).returncode == 0  # reading is for all


def test_fingerprints_do_not_depend_on_key_order_or_on_list_type():
    assert manifest.fingerprint({"a": 1, "b": (2, 3)}) == manifest.fingerprint({"b": [2, 3], "a": 1})
    assert manifest.fingerprint({"a": 1}) != manifest.fingerprint({"a": 1.5})


# ---- Configs


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    name: str = "x"


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    maybe: Inner | None
    steps: int
    flag: bool
    words: tuple[str, ...]
    table: dict[str, float]

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps {self.steps} is negative")


GOOD = {
    "inner": {"rate": 1},
    "maybe": None,
    "steps": 3,
    "flag": True,
    "words": ["a", "b"],
    "table": {"zh": 1, "en": 0.5},
}


def test_a_mapping_becomes_typed_dataclasses():
    built = config.build(Outer, GOOD)
    assert built == Outer(Inner(1.0), None, 3, True, ("a", "b"), {"zh": 1.0, "en": 0.5})
    assert isinstance(built.inner.rate, float) and isinstance(built.table["zh"], float)
    assert config.build(Outer, {**GOOD, "maybe": {"rate": 2}}).maybe == Inner(2.0)
    assert config.build(Outer, dataclasses.asdict(built)) == built


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepps": 3}, r"config: unknown key 'stepps'; known keys: flag, inner, maybe, steps, table, words"),
        ({"inner": {"rate": 1, "extra": 2}}, r"config\.inner: unknown key 'extra'"),
        ({"maybe": {"rate": 1, "extra": 2}}, r"config\.maybe: unknown key 'extra'"),
        ({"inner": {}}, r"config\.inner: key 'rate' is missing"),
        ({"inner": 3}, r"config\.inner: expected a group of keys, found 3"),
        ({"inner": None}, r"config\.inner: expected a group of keys, found None"),
        ({"inner": {"rate": "1e-3"}}, r"config\.inner\.rate: expected a number, found '1e-3'"),
        ({"inner": {"rate": True}}, r"config\.inner\.rate: expected a number, found True"),
        ({"steps": 3.0}, r"config\.steps: expected a whole number, found 3\.0"),
        ({"steps": True}, r"config\.steps: expected a whole number, found True"),
        ({"flag": 1}, r"config\.flag: expected True or False, found 1"),
        ({"words": "ab"}, r"config\.words: expected a list, found 'ab'"),
        ({"words": ["a", 1]}, r"config\.words\[1\]: expected text, found 1"),
        ({"table": {"zh": "x"}}, r"config\.table\.zh: expected a number, found 'x'"),
        ({"steps": -1}, r"config: steps -1 is negative"),
    ],
)
def test_what_is_wrong_in_a_config_is_named_with_its_path(change, message):
    with pytest.raises(UserError, match=message):
        config.build(Outer, {**GOOD, **change})


def test_a_missing_key_is_an_error():
    with pytest.raises(UserError, match="config: key 'steps' is missing"):
        config.build(Outer, {key: value for key, value in GOOD.items() if key != "steps"})


# ---- Reports

NASTY = "<script>alert('1 & \"2\"')</script>"


def svg(figure: str) -> xml.etree.ElementTree.Element:
    """The drawing in a chart's HTML; a parse error where it is not well-formed."""
    return xml.etree.ElementTree.fromstring(re.search(r"<svg.*</svg>", figure, re.S).group())


def test_whatever_comes_from_outside_is_escaped():
    parts = [
        html.page(NASTY, NASTY, [(NASTY, "")]),
        html.paragraph(NASTY),
        html.heading(NASTY),
        html.quote(NASTY),
        html.details(NASTY, ""),
        html.cards({NASTY: NASTY}),
        html.table([NASTY], [[NASTY]]),
        html.line_chart(NASTY, {NASTY: [(0, 1), (1, 2)]}, NASTY, {NASTY: 1.5}),
        html.line_chart(NASTY, {NASTY: [(0, 1)], "b": [(1, 2)]}, NASTY, faint={NASTY: [(0, 1)]}),
        html.bar_chart(NASTY, {NASTY: 1}, NASTY),
        html.stacked_bars(NASTY, {NASTY: {NASTY: 1, "b": 2}}, NASTY),
    ]
    for part in parts:
        assert "<script" not in part and "&lt;script&gt;" in part and "&quot;2&quot;" in part
    assert html.paragraph(html.raw("<b>x</b>")) == '<p class=""><b>x</b></p>'


def test_tables_write_numbers_for_people_and_set_their_columns_flush_right():
    table = html.table(["name", "n", "share"], [["a", 1234567, 0.123456], ["b", None, 12345.6]])
    assert "<td>a</td>" in table
    assert '<td class="number">1,234,567</td>' in table and '<td class="number"></td>' in table
    assert '<td class="number">0.1235</td>' in table and '<td class="number">12,346</td>' in table
    assert "<th>name</th>" in html.table(["name"], [])


@pytest.mark.parametrize("line", [[], [(1.0, math.nan)], [(math.inf, 1.0)]])
def test_a_chart_without_points_says_so(line):
    assert html.line_chart("loss", {"train": line}, "step") == html.paragraph("loss: no data", "soft")


@pytest.mark.parametrize("x", [0.0, 1.0, 3e9, -5e17])
@pytest.mark.parametrize("y", [0.0, 2.5, 1e20])
def test_a_chart_of_one_point_shows_it(x, y):
    (dot,) = svg(html.line_chart("loss", {"eval": [(x, y)]}, "step")).findall("circle")
    assert 0 <= float(dot.get("cx")) <= 500 and 0 <= float(dot.get("cy")) <= 250


def test_a_line_lies_inside_its_chart_and_skips_what_is_not_finite():
    points = [(0, 5.0), (10, math.nan), (20, 1.0), (30, math.inf), (40, 3.0)]
    drawing = svg(html.line_chart("loss", {"train": points, "eval": [(20, 2.0), (40, 1.5)]}, "step", {"goal": 0.5}))
    first, second = [line.get("points").split() for line in drawing.findall("polyline")]
    assert len(first) == 3 and len(second) == 2
    for point in first + second:
        x, y = map(float, point.split(","))
        assert 0 <= x <= 500 and 0 <= y <= 250
    assert "goal" in [text.text for text in drawing.findall("text")]


def test_a_logarithmic_axis_has_equal_steps_for_equal_ratios_and_leaves_out_what_it_cannot_show():
    points = [(0, 0.01), (1, 0.1), (2, 1.0), (3, 0.0), (4, -1.0), (5, 10.0)]
    drawing = svg(html.line_chart("loss", {"train": points}, "step", log=True))
    line = [float(point.split(",")[1]) for point in drawing.find("polyline").get("points").split()]
    steps = [a - b for a, b in zip(line, line[1:], strict=False)]
    assert len(line) == 4 and steps == pytest.approx([steps[0]] * 3, abs=0.11) and steps[0] > 20
    assert {"0.01", "0.1", "1", "10"} <= {text.text for text in drawing.findall("text")}
    narrow = svg(html.line_chart("loss", {"train": [(0, 2.1), (1, 2.9)]}, "step", log=True))
    assert {"2.2", "2.6"} <= {text.text for text in narrow.findall("text")}


def test_single_values_lie_pale_behind_their_mean_and_may_leave_the_frame():
    single = [(x, 1.0 + x % 2) for x in range(400)] + [(400, 1000.0)]
    chart = html.line_chart("loss", {"a": [(0, 1.5), (400, 1.5)], "b": [(0, 1), (400, 2)]}, "step", faint={"a": single})
    pale, first, second = svg(chart).findall("polyline")
    assert pale.get("stroke") == first.get("stroke") != second.get("stroke") and pale.get("stroke-opacity") == "0.3"
    heights = [float(point.split(",")[1]) for point in pale.get("points").split()]
    assert max(heights) - min(heights[:-1]) > 100 and heights[-1] == min(heights)
    assert chart.count("</i>") == 2 and html.line_chart("loss", {"a": [(0, 1)]}, "step").count("</i>") == 0


def test_points_tell_their_values_and_are_not_too_many():
    drawing = svg(html.line_chart("loss", {"train": [(x, float(x)) for x in range(1000)]}, "step"))
    told = [dot.find("title").text for dot in drawing.findall("circle")]
    assert told[0] == "train, step 0: 0" and 40 < len(told) < 80


@pytest.mark.parametrize(("tick", "text"), [(20_000, "20k"), (1.5e6, "1.5M"), (5000, "5000"), (2e-5, "2e-05")])
def test_round_numbers_are_short(tick, text):
    assert html._short(tick) == text


def test_stacked_bars_divide_one_length_as_their_parts():
    drawing = svg(html.stacked_bars("time", {"a": {"x": 30.0, "y": 10.0}, "b": {"x": 0.0, "y": 0.0}}, " s"))
    assert [float(bar.get("width")) for bar in drawing.findall("rect")] == [225, 75, 0, 0]
    assert [float(bar.get("x")) for bar in drawing.findall("rect")][:2] == [110, 335]
    assert "40 s" in [text.text for text in drawing.findall("text")]
    assert drawing.find("rect").find("title").text == "a, x: 30 s"


def test_bars_are_as_long_as_their_values():
    drawing = svg(html.bar_chart("reasons", {"a": 4, "b": 1, "c": 0}))
    widths = [float(bar.get("width")) for bar in drawing.findall("rect")]
    assert widths == [250.0, 62.5, 0.0]
    svg(html.bar_chart("nothing", {}))


# ---- Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_progress_shows_total_rate_time_left_and_a_remark(clock):
    stream = io.StringIO()
    with progress.Progress("train", 2000, "steps", stream) as shown:
        shown.at(1)
        clock[0] += 20
        shown.at(1001, "loss 2.5")
    first, last = stream.getvalue().splitlines()
    assert first == "train: 1,001/2,000 steps  50/s  0:19 left  loss 2.5"
    assert last == "train: 1,001/2,000 steps  50/s  20.0 s  loss 2.5"


def test_the_rate_leaves_out_what_was_done_before(clock):
    stream = io.StringIO()
    with progress.Progress("train", None, "steps", stream) as shown:
        shown.at(5000)
        clock[0] += 10
        shown.at(5020)
    assert stream.getvalue().splitlines()[-1] == "train: 5,020 steps  2/s  10.0 s"


def test_amounts_are_added_up_and_a_log_gets_a_line_now_and_then(clock):
    stream = io.StringIO()
    with progress.Progress("read", None, "documents", stream) as shown:
        for _ in range(100):
            clock[0] += 1
            shown.add(3)
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "read: 300 documents  3/s  100.0 s" and len(lines) == 11


def test_a_watch_shows_what_others_have_done(capsys):
    with progress.Watch("tokenize", 4, "shards", lambda: 4, every=0.001):
        pass
    assert "tokenize: 4/4 shards" in capsys.readouterr().err


def test_a_second_process_is_kept_out_of_an_unfinished_folder(tmp_path):
    manifest.open_stage("build", 1, tmp_path, {}, [])
    second = (
        "from ctllm_jax.common import errors, manifest\n"
        "try:\n"
        f"    manifest.open_stage('build', 1, {str(tmp_path)!r}, {{}}, [])\n"
        "except errors.UserError as error:\n"
        "    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True, check=True).stdout
    assert "another process is working here" in said
