"""The command line: what the user types reaches the verb; what is wrong is said in one line, with an exit status."""

import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
from command import ctllm

from ctllm_jax import cli, convert
from ctllm_jax.common.config import build
from ctllm_jax.common.errors import Unanswered, UserError
from ctllm_jax.verbs import VERBS

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What a verb's default config leaves to the user.
NEEDED = {
    "contamination": ["--config.corpus=CORPUS"],
    "explain": ["ID"],
    "tokenize": ["--config.corpus=CORPUS"],
    "select": ["--config.scores=DIR"],
    "pairs": ["--config.earlier=DIR"],
    "train": ["--config=configs/pretrain.py:tiny", "--config.data.store=STORE"],
    "plan": ["--config=configs/pretrain.py:ct_llm_2b", "--slice=v5e:4x4"],
    "trace": ["--step=1"],
    "report": ["RUN"],
    "compare": ["A", "B"],
    "table": ["A"],
}


@pytest.fixture
def ran(monkeypatch):
    """What `ctllm convert` was run with, instead of running."""
    calls = []
    monkeypatch.setattr(convert, "run", lambda config, workdir: calls.append((config, workdir)))
    return calls


# ---- What reaches the verb


def test_config_values_and_the_folder_reach_the_verb(capsys, ran):
    status, out, err = ctllm(
        capsys, "convert", "--config.source=runs/dpo", "--config.step=7", "--config.dtype=float32", "--workdir=out"
    )
    assert (status, out, err) == (0, "", "")
    assert ran == [
        (convert.ConvertConfig(source="runs/dpo", step=7, to="huggingface", dtype="float32", all_steps=False), "out")
    ]


def test_a_config_file_is_found_here_and_in_the_repository(capsys, ran, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ctllm(capsys, "convert", "--config=configs/convert.py", "--workdir=out")[0] == 0
    own = (ROOT / "configs" / "convert.py").read_text().replace('"bfloat16"', '"float16"')
    (tmp_path / "own.py").write_text(own)
    assert ctllm(capsys, "convert", "--config=own.py", "--config.source=x", "--workdir=out")[0] == 0
    assert [config.dtype for config, _ in ran] == ["bfloat16", "float16"]


def printed(capsys, *arguments: str) -> dict:
    status, out, err = ctllm(capsys, *arguments, "--print_config")
    assert (status, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize("name", VERBS)
def test_the_printed_config_builds_the_same_config(capsys, name):
    values = printed(capsys, name, *NEEDED.get(name, []))
    cls = getattr(importlib.import_module(VERBS[name].module), VERBS[name].config)
    built = build(cls, values)
    assert json.loads(json.dumps(dataclasses.asdict(built))) == values
    assert values.keys() == {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("('a.jsonl', 'b.jsonl')", ["a.jsonl", "b.jsonl"]),
        ("('raw/*.jsonl.gz',)", ["raw/*.jsonl.gz"]),
        ("()", []),
    ],
)
def test_a_tuple_is_given_in_pythons_notation(capsys, value, expected):
    assert printed(capsys, "corpus", f"--config.input={value}")["input"] == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--step=3"], {"step": 3}),
        (["--step", "3", "--json"], {"step": 3, "json": True}),
        (["--config.step=3", "--json=False"], {"step": 3, "json": False}),
        (["--spike"], {"spike": 5}),
        (["--spike=2", "--text_chars", "9"], {"spike": 2, "text_chars": 9}),
        (["--document=--id=1"], {"document": "--id=1"}),
        (["--document", "17"], {"document": "17"}),
    ],
)
def test_a_short_flag_is_a_key_of_the_config(capsys, arguments, expected):
    values, untouched = printed(capsys, "trace", *arguments), printed(capsys, "trace", "--step=1") | {"step": None}
    assert values == untouched | expected


@pytest.mark.parametrize("arguments", [["a", "b", "--smooth=0"], ["--smooth", "0", "a", "b"], ["a", "--smooth=0", "b"]])
def test_arguments_without_a_flag_are_listed_where_the_verb_takes_them(capsys, arguments):
    values, untouched = printed(capsys, "report", *arguments), printed(capsys, "report", "a")
    assert values == untouched | {"runs": ["a", "b"], "smooth": 0.0}


def test_every_short_flag_is_a_key_that_its_default_config_has(capsys):
    for name, verb in VERBS.items():
        assert verb.short.keys() <= printed(capsys, name, *NEEDED.get(name, [])).keys()
        assert all(short.form.startswith(f"--{key}") for key, short in verb.short.items())


def test_values_of_every_kind_are_overridden(capsys):
    values = printed(
        capsys,
        "train",
        "--config=configs/pretrain.py:tiny",
        "--config.optimizer.learning_rate=1",
        "--config.data.mask_documents=False",
        "--config.mesh.tensor=2",
        "--config.data.store=STORE",
        "--config.objective.name=lm",
    )
    assert (values["optimizer"]["learning_rate"], values["mesh"]["tensor"]) == (1.0, 2)
    assert values["data"]["mask_documents"] is False and values["data"]["store"] == "STORE"
    assert values["model"]["num_layers"] == 4
    large = printed(capsys, "train", "--config=configs/pretrain.py:ct_llm_2b", "--config.model.remat=qkv")
    assert (large["model"]["num_layers"], large["model"]["remat"]) == (32, "qkv")


# ---- Help


@pytest.mark.parametrize("arguments", [[], ["help"], ["-h"], ["--help"]])
def test_the_overview_names_every_verb(capsys, arguments):
    status, out, _ = ctllm(capsys, *arguments)
    assert status == 0 and all(f"\n  {name} " in out and verb.help in out for name, verb in VERBS.items())


@pytest.mark.parametrize("name", VERBS)
def test_help_of_a_verb_names_its_flags_and_default_config(capsys, name):
    status, out, err = ctllm(capsys, name, "--help")
    assert (status, err) == (0, "")
    assert VERBS[name].help in out and (VERBS[name].default or "--config is required") in out
    assert all(f"\n  {flag}" in out for flag in ("--config=", "--config.KEY=", "--print_config"))
    workdir = VERBS[name].workdir
    assert "\n  --workdir=" not in out if workdir is None else f"--workdir=DIR           {workdir}" in out
    assert all(f"\n  {short.form} " in out and short.help in out for short in VERBS[name].short.values())


# ---- What the user gets wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pretrain"],
            "unknown verb 'pretrain'; there are: corpus, explain, sweep, contamination, tokenizer",
        ),
        (["convert", "--nosuch=1"], "convert: Unknown command line flag 'nosuch'"),
        (["convert", "--config.nosuch=1"], "nosuch"),
        (["train", "--config=configs/pretrain.py:tiny", "--config.optimizer.nosuch=1"], "nosuch"),
        (["convert", "--config.step=seven", "--workdir=out"], "--config.step=seven"),
        (["corpus", "--config.input=('a',", "--workdir=out"], "--config.input=('a',"),
        (["convert", "--config=nowhere.py", "--workdir=out"], "nowhere.py"),
        (["train", "--config=configs/pretrain.py:huge", "--workdir=out"], "'huge'"),
        (["train", "--workdir=out"], "train: give --config=FILE.py"),
        (["convert", "--config.source=x"], "convert: give --workdir=DIR"),
        (["convert", "--step=3", "--workdir=out"], "convert: Unknown command line flag 'step'"),
        (["trace", "--step"], "trace: --step needs a value: --step=N"),
        (["trace", "--document", "--workdir=out"], "trace: --document needs a value: --document=ID"),
        (["trace", "--step=three", "--workdir=out"], "--config.step=three"),
        (["trace", "--spike", "3", "--workdir=out"], "trace: unexpected argument '3'"),
        (["trace", "--workdir=out"], "config: give exactly one of step, spike and document"),
        (["trace", "--step=3"], "trace: give --workdir=DIR (run directory"),
        (["convert", "out"], "convert: unexpected argument 'out'"),
        (["report"], "config: give at least one run directory: ctllm report RUN"),
        (["report", "nowhere"], "nowhere: no run directory (stage.json is missing)"),
        (["convert", "--workdir"], "--workdir"),
        (["tokenize", "--config=configs/tokenize.py:chat", "--workdir=out"], "config: "),
        (
            ["train", "--config=configs/pretrain.py:tiny", "--config.data.rates.zh=1"],
            "config has no key 'zh' there",
        ),
        (
            ["train", "--config=configs/convert.py", "--workdir=out"],
            "config: unknown key 'all_steps'; known keys: batch",
        ),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_and_status_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = ctllm(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.startswith("ctllm: error: ") and message in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "expected"), [(UserError, 2), (Unanswered, 69)])
def test_a_verbs_own_user_error_has_no_traceback(capsys, monkeypatch, kind, expected):
    def fail(config, workdir):
        raise kind(f"{workdir}: is on fire; pour water")

    monkeypatch.setattr(convert, "run", fail)
    status, _, err = ctllm(capsys, "convert", "--workdir=out")
    assert (status, err) == (expected, "ctllm: error: out: is on fire; pour water\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_under_standard_error_ends_no_work(monkeypatch, tmp_path):
    def run(*_):
        print("progress", file=sys.stderr, flush=True)
        return {"done": True}

    monkeypatch.setattr(convert, "run", run)
    values = importlib.import_module("configs.convert").get_config().to_dict()
    with open("/dev/full", "w", buffering=1) as full, open(os.devnull, "wb") as nothing:
        monkeypatch.setattr(sys, "stderr", full)
        with pytest.raises(OSError, match="No space left"):
            run()
        result = cli.execute("convert", VERBS["convert"], values, str(tmp_path))
        os.dup2(nothing.fileno(), full.fileno())  # for what `close` writes
    assert result == {"done": True}


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt(), 130), (SystemExit(75), 75)])
def test_an_interrupted_and_a_stopped_verb_have_statuses_of_their_own(capsys, monkeypatch, raised, status):
    def stop(config, workdir):
        raise raised

    monkeypatch.setattr(convert, "run", stop)
    assert ctllm(capsys, "convert", "--workdir=out")[0] == status


def test_an_error_of_ours_keeps_its_traceback(capsys, monkeypatch):
    monkeypatch.setattr(convert, "run", lambda config, workdir: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["convert", "--workdir=out"])


@pytest.mark.parametrize(
    ("verb", "missing", "message"),
    [
        ("convert", "torchvision", "convert needs torchvision: pip install 'ctllm-jax[data]'"),
        ("serve", "aiohttp", "serve needs aiohttp: pip install 'ctllm-jax[serve]'"),
        ("convert", "ctllm_jax.nosuch", None),
    ],
)
def test_a_missing_library_is_the_users_to_install_a_missing_module_of_ours_is_not(
    capsys, monkeypatch, verb, missing, message
):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    if message is None:
        with pytest.raises(ModuleNotFoundError):
            cli.main([verb, "--workdir=out"])
    else:
        status, _, err = ctllm(capsys, verb, "--workdir=out")
        assert status == 2 and message in err


# ---- The script itself


def test_the_installed_script_reports_its_statuses(tmp_path):
    script = pathlib.Path(sys.executable).with_name("ctllm")
    if not script.exists():
        pytest.skip(f"{script} is not installed")

    def status(*arguments: str) -> tuple[int, str]:
        process = subprocess.run([script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        return process.returncode, process.stderr

    assert status("--help") == (0, "")
    code, error = status("convert", f"--config.source={tmp_path}", f"--workdir={tmp_path / 'out'}")
    assert code == 2 and error.startswith("ctllm: error: ") and "Traceback" not in error
    assert os.fspath(tmp_path) in error


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["convert", "--print_config"]])
def test_output_that_nobody_reads_on_is_no_error(arguments):
    command = [sys.executable, "-m", "ctllm_jax.cli", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # as `| head` does when it has seen enough
        assert process.stderr.read() == ""
    assert process.returncode == cli.EXIT_CLOSED_PIPE


def test_a_broken_pipe_elsewhere_is_an_error_of_ours(monkeypatch, tmp_path):
    def fail(config, workdir):
        raise BrokenPipeError("a worker went away")

    monkeypatch.setattr(convert, "run", fail)
    with open(tmp_path / "out", "w") as file, pytest.raises(BrokenPipeError):
        monkeypatch.setattr(sys, "stdout", file)
        cli.main(["convert", "--workdir=out"])
