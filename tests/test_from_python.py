"""Verbs called from a program: the results of the command line, command lines of configs, what a notebook draws."""

import shlex
import sys
import threading
import time

import numpy as np
import pytest
from command import ctllm
from test_report import write_run
from tiny_models import score, tiny_model

from configs import convert as convert_config
from configs import corpus, pretrain
from ctllm_jax import cli, convert
from ctllm_jax.common import html, quiet
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import write_json
from ctllm_jax.evaluate.reading import drawn, read
from ctllm_jax.metrics.report import read_runs
from ctllm_jax.metrics.report_page import curves, sections
from ctllm_jax.metrics.run_record import follow
from ctllm_jax.notebook import command, run, show
from ctllm_jax.verbs import VERBS
from launch.run import launch

# ---- Running a verb


def test_a_verb_runs_with_its_default_config_and_the_values_given(tmp_path, capsys):
    runs = [write_run(tmp_path, "one"), write_run(tmp_path, "two")]
    result = run("report", workdir=tmp_path, runs=tuple(map(str, runs)), smooth=0.0)
    assert result == {"report": str(tmp_path / "report.html")}
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.html'}\n"
    assert run("report", workdir=tmp_path, runs=tuple(map(str, runs)), smooth=0.0, say=False) == result
    assert capsys.readouterr().out == ""
    ours = (tmp_path / "report.html").read_text()
    assert ctllm(capsys, "report", *map(str, runs), f"--workdir={tmp_path}", "--smooth=0")[0] == 0
    assert (tmp_path / "report.html").read_text() == ours


def test_options_of_a_verb_are_values_too(capsys):
    config = pretrain.get_config("ct_llm_2b@v5e:16x16")
    plans = run("plan", config, slice="v5e:16x16", compile=False)["plans"]
    ours = capsys.readouterr().out
    flags = ["--config=configs/pretrain.py:ct_llm_2b@v5e:16x16", "--slice=v5e:16x16", "--nocompile"]
    assert len(plans) == 1 and ctllm(capsys, "plan", *flags)[1] == ours


@pytest.mark.parametrize(
    ("arguments", "values", "message"),
    [
        (["reprot"], {}, "unknown verb 'reprot'; there are: corpus, "),
        (["train"], {}, "train: give a config, from one of configs/"),
        (["convert"], {"sauce": "x"}, "config: unknown key 'sauce'"),
        (["convert"], {"source": "x"}, "convert: give --workdir=DIR"),
    ],
)
def test_a_mistake_is_said(arguments, values, message):
    with pytest.raises(UserError) as caught:
        run(*arguments, **values)
    assert str(caught.value).startswith(message)


# ---- A config as a command line


def test_a_command_says_what_differs_and_means_the_same():
    config = pretrain.get_config("tiny")
    config.data.store = "a b/store"
    config.update(duration="12 steps", distributed=True)
    config.eval.update(every=12, tasks=(), prompts=("春天 ", "it's"))
    config.optimizer.learning_rate = 1e-3
    config.log.wandb = "project"
    words = command("train", "configs/pretrain.py:tiny", config, "runs/x")
    assert words[:2] == ["train", "--config=configs/pretrain.py:tiny"] and words[-1] == "--workdir=runs/x"
    assert len(words) == 11 and '--config.eval.prompts=("春天 ","it\'s",)' in words
    argv = list(sys.argv)
    values, workdir, _ = cli.parse("train", VERBS["train"], shlex.split(shlex.join(words[1:])))
    assert (values, workdir, sys.argv) == (config.to_dict(), "runs/x", argv)
    assert command("train", "configs/pretrain.py:tiny", pretrain.get_config("tiny")) == words[:2]


def test_a_command_carries_the_config_through_the_command_line(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(convert, "run", lambda config, workdir: calls.append((config, workdir)))
    config = convert_config.get_config()
    config.source = "a run"
    run("convert", config, "out")
    cli.main(command("convert", "configs/convert.py", config, "out"))
    assert len(calls) == 2 and calls[0] == calls[1] and calls[0][0].source == "a run"


def test_what_no_flag_can_say_is_refused():
    added, without = pretrain.get_config("tiny"), pretrain.get_config("tiny")
    with added.unlocked():
        added.data.rates.zh_cc = 1.0
    with pytest.raises(UserError, match="train: the config has no key 'zh_cc' there"):
        command("train", "configs/pretrain.py:tiny", added)
    with without.unlocked():
        del without.optimizer.decay
    with pytest.raises(
        UserError, match="decay = None cannot be set by a flag on top of configs/pretrain.py:tiny; write"
    ):
        command("train", "configs/pretrain.py:tiny", without)


# ---- Launching


def test_launch_hands_over_its_flags_and_says_what_the_launcher_says(capsys):
    words = command("corpus", "configs/corpus.py", corpus.get_config(), "out")
    assert launch("local", words, processes=1, dry_run=True) == 0
    said = capsys.readouterr().out
    assert "JAX_NUM_PROCESSES=1" in said and "ctllm_jax.cli corpus --config=configs/corpus.py --workdir=out" in said
    assert launch("local", words, processes=2) == 2
    assert "corpus runs in one process, not in 2" in capsys.readouterr().out


# ---- Following a run


def test_a_run_is_followed_from_before_its_beginning_to_its_end(tmp_path):
    def train() -> None:
        time.sleep(0.1)
        write_run(tmp_path, "run", steps=3, finished=False)
        assert followed.wait(60)
        write_run(tmp_path, "run", steps=5, finished=True)

    followed, steps = threading.Event(), []
    thread = threading.Thread(target=train)
    thread.start()
    for seen in follow(tmp_path / "run", "run", every=0.05):
        steps.append(len(seen.entries["train"]))
        followed.set() if steps[-1] == 3 else None
    thread.join()
    assert steps[-1] == 5 and 3 in steps and len(steps) == len(set(steps)) + (steps.count(5) - 1)


def test_a_run_that_says_nothing_new_is_given_up(tmp_path):
    with pytest.raises(UserError, match="no run has begun here"):
        list(follow(tmp_path / "nothing", "x", every=0.01, patience=0.05))
    run_dir = write_run(tmp_path, "dead", finished=False)
    assert len(list(follow(run_dir, "dead", every=0.01, patience=0.05))) == 1
    write_json(tmp_path / "other" / "stage.json", {"stage": "eval"})
    with pytest.raises(UserError, match="not of `ctllm train`"):
        next(follow(tmp_path / "other", "other"))


def test_some_curves_of_a_report(tmp_path):
    runs = read_runs([write_run(tmp_path, "one"), write_run(tmp_path, "two")])
    assert list(sections(runs))[:3] == ["Runs", "Training", "Held-out data"]
    charts = curves(runs, "train", "loss", "grad_norm")
    assert charts.count("<svg") == 2 and "one</span>" in charts
    assert curves(runs, "eval", "accuracy/").count("<svg") == 1
    assert curves(runs, "eval", "no_such_metric") == ""


# ---- What a notebook draws


def test_a_notebook_draws_html_that_reaches_nothing_around_it():
    shown = show(html.paragraph("a"), html.paragraph("b"))._repr_html_()
    style = shown[shown.index("<style>") + 7 : shown.index("</style>")]
    assert style.startswith(".ctllm {") and style.count("{") == style.count("}") and "body" not in style
    depth, outside = 0, ""
    for character in style:
        depth += {"{": 1, "}": -1}.get(character, 0)
        outside += character if depth == 0 else ""
    assert outside.strip("} ") == ".ctllm"  # one rule, all others inside
    assert shown.endswith('<p class="">a</p><p class="">b</p></div>')


def test_standard_error_that_is_no_terminals_stays_as_it_is(capsys):
    ours = sys.stderr  # of the test's capture, as a notebook's: it leads elsewhere
    with quiet.quiet_libraries():
        assert sys.stderr is ours
        print("said", file=sys.stderr)
    assert capsys.readouterr().err == "said\n"


# ---- How a model reads


def test_a_text_is_read_token_by_token():
    model = tiny_model()
    text = "从前有座山。<b>鑫"
    tokens = read(model, text, guesses=4)
    ids = model.tokenizer.encode(text)
    names = [name for _, name in model.tokenizer.pieces()]
    assert [token.text for token in tokens] == [names[i] for i in ids]
    for token in tokens:
        probabilities = [probability for _, probability in token.guesses]
        assert len(probabilities) == 4 and probabilities == sorted(probabilities, reverse=True)
        assert token.nats >= -np.log(probabilities[0]) - 1e-5
        own = dict(token.guesses).get(token.text)
        assert own is None or own == pytest.approx(np.exp(-token.nats))
    whole = score(model, [([model.tokenizer.bos_id], ids)], 256)[0].sum_logprob
    assert sum(token.nats for token in tokens) == pytest.approx(-whole, rel=1e-5)
    page = drawn(tokens)
    assert page.count("<span") == len(tokens) and "<b>" not in page and "nats; expected: " in page


def test_a_text_that_cannot_be_read_is_refused():
    model = tiny_model()
    for text in ("", "山" * 100):
        with pytest.raises(UserError, match="there must be 1 to 64"):
            read(model, text)
