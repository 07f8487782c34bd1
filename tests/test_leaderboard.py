"""The table of scores beside CT-LLM's: columns, averages, marks, and its files."""

import json
import pathlib

import pytest
from tiny_models import write_jsonl

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.manifest import open_stage
from ctllm_jax.evaluate.benchmark import summary
from ctllm_jax.evaluate.declarations import Benchmark, load_task
from ctllm_jax.evaluate.leaderboard import TABLES, TableConfig, read_reported, run

PNG = b"\x89PNG\r\n\x1a\n"


def entry(hit: bool, options: int) -> dict:
    own = {"options": [""] * options, "shots": 5, "cut": 0, "gold": 0, "margins": {"ppl": 1.0}}
    return {**own, "picked": {"ppl": 0 if hit else 1}}


def scored(name: str, hits: dict[str, list[bool]], options: int) -> dict:
    log = {subset: [entry(hit, options) for hit in own] for subset, own in hits.items()}
    return summary(Benchmark(load_task(name), {}, {}, "p"), log)


@pytest.fixture
def evaluations(tmp_path):
    """Two checkpoints, the later one first; C-Eval by subset: a whole, a half and nothing right."""
    subsets = [subset for own in load_task("ceval_ppl").groups.values() for subset in own]
    hits = {subset: [True, False] for subset in dict.fromkeys(subsets)}
    folders = []
    for step in (20, 10):
        benchmarks = {
            "ceval_ppl": scored("ceval_ppl", hits, 4),
            "eprstmt_ppl": scored("eprstmt_ppl", {"": [True] * 3 + [False]}, 2),
        }
        if step == 10:
            benchmarks["piqa_ppl"] = scored("piqa_ppl", {"": [True]}, 2)
        folder = tmp_path / f"eval-{step}"
        stage = open_stage("eval", 3, folder, {}, {"step": step})
        result = {"model": f"run@{step}", "tokens": step * 2_000_000, "limit": 2 if step == 10 else None}
        stage.finish({**result, "benchmarks": benchmarks})
        folders.append(str(folder))
    return tuple(folders)


def test_reported_columns_are_benchmarks_of_ours():
    for name in TABLES:
        rows = read_reported(name)
        assert all(0 <= score <= 100 for row in rows for score, _ in row.scores.values())
        for column in {column for row in rows for column in row.scores}:
            task, _, group = column.partition("/")
            assert not group or group in load_task(task).groups
    final, base = read_reported("checkpoints")[-1].scores, read_reported("base")[-1].scores
    assert {column: final[column] for column in base} == base  # CT-LLM's last checkpoint is its base model


def test_ours_beside_the_base_models(evaluations, tmp_path, capsys):
    run(TableConfig(evaluations, "base", ""), str(tmp_path / "table"))
    printed = capsys.readouterr().out
    head, _, *rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert head == ["model", "ceval_ppl", "eprstmt_ppl", "piqa_ppl"]  # C-Eval alone is in that table of the paper
    lines = {row[0]: row[1:] for row in rows}
    assert lines["CT-LLM (base)"] == ["36.78", "-", "-"]
    assert lines["run@20, 40M tokens"][1:] == ["75.00 ± 25.00", "-"]
    assert lines["run@10, 20M tokens*"][0].startswith("50.00 ± ")
    assert lines["run@10, 20M tokens*"][2] == "100.00"  # one item has no deviation
    assert lines["chance"] == ["25.00", "50.00", "50.00"]
    assert "* At most 2 items of a subset: run@10." in printed
    assert (tmp_path / "table" / "table.md").read_text() == printed
    tex = (tmp_path / "table" / "table.tex").read_text()
    assert r"CT-LLM (base) & 36.78 & - & - \\" in tex and r"eprstmt\_ppl" in tex and tex.count(r"\midrule") == 3
    assert (tmp_path / "table" / "table.png").read_bytes().startswith(PNG)
    whole = json.loads((tmp_path / "table" / "table.json").read_text())
    assert whole["rows"][-1]["scores"]["piqa_ppl"] == [100.0, None]


def test_checkpoints_go_by_tokens_and_have_groups(evaluations, tmp_path, capsys):
    found = run(TableConfig(evaluations, "checkpoints", ""), str(tmp_path / "table"))
    assert found["columns"][:2] == ["piqa_ppl", "ceval_ppl"] and "ceval_ppl/hard" in found["columns"]
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[2] == "CT-LLM @ 13.3B" and rows[-3:] == ["run@10, 20M tokens*", "run@20, 40M tokens", "chance"]
    assert (tmp_path / "table" / "table.png").read_bytes().startswith(PNG)


def test_nothing_to_show(tmp_path, capsys):
    stage = open_stage("eval", 3, tmp_path / "eval", {}, {})
    stage.finish({"model": "run@1", "tokens": None, "limit": None, "benchmarks": {}})
    with pytest.raises(UserError, match="none of the evaluations has a benchmark"):
        run(TableConfig((str(tmp_path / "eval"),), "", ""), None)
    with pytest.raises(UserError, match="not a finished folder of `ctllm eval`"):
        run(TableConfig((str(tmp_path),), "", ""), None)
    with pytest.raises(ValueError, match="unknown; there are: base, aligned, checkpoints"):
        TableConfig(("a",), "chat", "")


def test_items_that_the_training_data_held(evaluations, tmp_path, capsys):
    for number, folder in enumerate(evaluations):
        path = pathlib.Path(folder) / "parts" / "eprstmt_ppl" / "all-0000.jsonl"
        path.parent.mkdir(parents=True)
        write_jsonl(path, [{"id": str(i), **entry(i != 3 - number, 2)} for i in range(4)])
    searched = open_stage("contamination", 3, tmp_path / "searched", {}, {})
    write_jsonl(searched.folder / "hits.jsonl", [{"task": "eprstmt_ppl", "item": "3"}] * 2)
    searched.finish({"tasks": {"eprstmt_ppl": {}, "cmmlu_ppl": {}}})
    run(TableConfig(evaluations, "", str(tmp_path / "searched")), str(tmp_path / "table"))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "| eprstmt_ppl |" in line]
    assert rows[1] == ["run@20", "eprstmt_ppl", "4", "1", "75.00 ± 25.00", "100.00 ± 0.00", "0.00"]
    assert rows[2] == ["run@10", "eprstmt_ppl", "4", "1", "75.00 ± 25.00", "66.67 ± 33.33", "100.00"]
    kept = json.loads((tmp_path / "table" / "table.json").read_text())["seen"]
    assert kept[0][1]["eprstmt_ppl"]["clean"] == {"mean": 1.0, "stderr": 0.0, "n": 3}
    write_jsonl(searched.folder / "hits.jsonl", [{"task": "eprstmt_ppl", "item": "9"}])
    with pytest.raises(UserError, match="eprstmt_ppl has no item '9'"):
        run(TableConfig(evaluations[:1], "", str(tmp_path / "searched")), None)
