"""The whole house: every stage joined, killed at will, ending in the same bits."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import pytest

from configs import quickstart
from ctllm_jax import quickstart as verb
from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = (
    "--config.pretrain_steps=12",
    "--config.sft_steps=6",
    "--config.dpo_steps=4",
    "--config.vocab_size=3000",
    "--config.sequence_length=128",
    "--config.max_tokens=8",
)


def start(workdir: pathlib.Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    return subprocess.Popen(
        [sys.executable, "-m", "ctllm_jax.cli", "quickstart", *SMALL, f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(workdir: pathlib.Path) -> dict:
    """What must not depend on how often a run was cut short: documents, stores, losses, scores, samples, weights."""
    summary = json.loads((workdir / "summary.json").read_text())
    summary.pop("seconds")
    for run in summary["training"].values():
        run.pop("tokens_per_second")
    files = [
        path
        for pattern in ("corpus/**/*.tfrecord-*", "corpus/rejected/*", "tokenizer/*.model", "store/**/*.array_record")
        for path in sorted(workdir.glob(pattern))
    ] + sorted(workdir.glob("huggingface/model/*.safetensors"))
    assert len(files) > 20
    return {"summary": summary, "files": {str(path.relative_to(workdir)): path.read_bytes() for path in files}}


def test_a_stage_to_stop_after_has_to_be_one(tmp_path):
    config = build(verb.QuickstartConfig, quickstart.get_config().to_dict() | {"last": "corpsu"})
    with pytest.raises(
        UserError, match="last: 'corpsu' is not a stage; there are: corpus, tokenizer, store/pretrain, "
    ):
        verb.run(config, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_many_texts_stays_a_pattern_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number}.txt").write_text("茶", encoding="utf-8")
    config = quickstart.get_config()
    config.input = ("texts/*.txt",)
    stages = verb.commands(build(verb.QuickstartConfig, config.to_dict()), "OUT")
    assert stages["corpus"] == ["corpus", f'--config.input=("{tmp_path}/texts/*.txt",)']
    assert stages["store/sft"][-1] == f'--config.input=("{ROOT}/sample/sft.jsonl",)'  # not here: in the repository


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    process = start(workdir)
    _, log = process.communicate()
    assert process.returncode == 0, log[-3000:]
    return workdir


@pytest.mark.slow
def test_every_claim_is_judged_and_the_page_stands_alone(undisturbed):
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert len(summary["checks"]) == 5 and all(isinstance(check["holds"], bool) for check in summary["checks"])
    export = summary["checks"][-1]
    assert export["claim"].startswith("Export") and export["holds"]
    page = (undisturbed / "report.html").read_text()
    assert "<script" not in page and "src=" not in page and 'href="http' not in page
    rules = summary["corpus"]["totals"]["rules"]
    assert all(f"<td>{rule}</td>" in page for rule in rules) and len(rules) > 25


@pytest.mark.slow
def test_a_second_run_redoes_nothing(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("manifest.json")}
    process = start(undisturbed)
    _, log = process.communicate()
    assert process.returncode == 0, log[-3000:]
    assert log.count("already finished") == 14
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("manifest.json")} == before


@pytest.mark.slow
def test_killing_it_again_and_again_changes_nothing(undisturbed, tmp_path):
    draw = random.Random(7)
    stages = len(list(undisturbed.rglob("manifest.json")))
    reached = []
    for target in range(1, stages + 1):  # a kill in every stage, somewhere
        process = start(tmp_path)
        for line in process.stderr:
            if line.startswith(f"[{target}/"):
                break
        try:
            process.wait(draw.uniform(0.5, 9))
        except subprocess.TimeoutExpired:
            reached.append(target)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(reached) >= 5, f"only the stages {reached} were still at work when they were killed"
    process = start(tmp_path)
    _, log = process.communicate()
    assert process.returncode == 0, log[-3000:]
    disturbed, expected = outcome(tmp_path), outcome(undisturbed)
    assert disturbed["files"] == expected["files"]
    for part, value in expected["summary"].items():
        found = json.dumps(disturbed["summary"][part]).replace(str(tmp_path), str(undisturbed))
        assert found == json.dumps(value), part
