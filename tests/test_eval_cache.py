"""What was answered before is not asked again, whatever else changed, and nothing else is taken for it."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from test_benchmark import TASK, WRITTEN, config_of, loaded, toy
from tiny_models import tiny_model

from ctllm_jax.common import files
from ctllm_jax.common.errors import UserError
from ctllm_jax.evaluate import run as eval_verb
from ctllm_jax.evaluate.benchmark import ask
from ctllm_jax.evaluate.cache import Cache, model_mark
from ctllm_jax.evaluate.declarations import load_benchmark, load_task
from ctllm_jax.evaluate.devices import on_each_device
from ctllm_jax.evaluate.encoding import Opening
from ctllm_jax.evaluate.engine import Request, Score
from ctllm_jax.hf_export import export
from ctllm_jax.model import init_params

SCORE = Score(-1.5, 2, False, 0, -4.25, 4)
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def fill(cache: Cache, requests: list, answers: list) -> int:
    """Answers requests, each a group; how many of them were not known."""
    found = dict(zip(requests, answers, strict=True))
    claim = cache.claim([[request] for request in requests])
    cache.answer(claim, lambda groups: [[found[request] for request in group] for group in groups])
    return claim.missing


def numbered(n: int) -> Request:
    return Request((n, 1, 2, 3), 2, 0)


def segments(folder) -> list[pathlib.Path]:
    return sorted(pathlib.Path(folder).rglob("*.tsv"))


# ---- Requests


def test_a_request_is_named_by_all_that_decides_its_answer_and_nothing_else(model, tmp_path):
    ids = (5, 6, 7, 8)
    requests = [
        *(Request(ids, 2, 0), Request(ids, 3, 0), Request((1, *ids), 3, 0), Request(ids[:3], 2, 0)),
        *(Opening(ids, 8, frozenset({2})), Opening(ids, 9, frozenset({2})), Opening(ids, 8, frozenset({2, 4}))),
        *(Opening(ids[:3], 8, frozenset({2})), Opening(ids, 8, frozenset())),
    ]
    assert len({request.name for request in requests}) == len(requests)
    assert Request(list(ids), 2, 7).name == requests[0].name  # how much was cut off before it is no part of it

    found = loaded(tmp_path, text=WRITTEN)
    names = [
        {request.name for group in ask(model, found, "", found.items[""], bos).groups for request in group}
        for bos in (True, False)
    ]
    assert names[0].isdisjoint(names[1])


def test_answers_come_back_as_they_were(tmp_path):
    floats = [(-0.1 - 1e-17, -1 / 3), (math.nan, -math.inf), (5e-324, -1.7976931348623157e308)]
    scores = [Score(own, 2, n == 1, 0, whole, 4) for n, (own, whole) in enumerate(floats)]
    requests = [*map(numbered, range(3)), Opening((1,), 4, frozenset())]
    fill(Cache(tmp_path, "m"), requests, [*scores, [70_000, 0, 3]])
    text = "“山”\u2028\r\n\ud800"
    Cache(tmp_path, "m").remember(["samples"], lambda: [text])
    cache = Cache(tmp_path, "m")
    assert fill(cache, requests, [None] * 4) == 0
    [kept, [ids]] = cache.answers([requests[:3], requests[3:]])
    assert repr(kept) == repr(scores) and ids == [70_000, 0, 3]  # NaN is not equal to itself
    cut = dataclasses.replace(requests[0], cut=9)
    assert cache.answers([[cut]]) == [[dataclasses.replace(scores[0], cut=9)]]
    assert cache.remember(["samples"], lambda: 1 / 0) == [text]
    assert cache.remember(["others"], lambda: 5) == 5


def test_answers_are_one_models(model, tmp_path):
    """A run that was trained again by the same settings has the same digest."""
    config, params = model.config, model.params
    [first, *_], tree = jax.tree.flatten(params)
    other = jax.tree.unflatten(tree, [first.at[(0,) * first.ndim].add(1e-3), *jax.tree.leaves(params)[1:]])
    models = [
        model,
        dataclasses.replace(model, digest="another"),
        dataclasses.replace(model, config=dataclasses.replace(config, dtype="bfloat16")),
        dataclasses.replace(model, config=dataclasses.replace(config, attention="flash")),
        dataclasses.replace(model, step=7),
        dataclasses.replace(model, step=7, params=other),
    ]
    assert len({model_mark(one) for one in models}) == len(models)
    assert model_mark(models[0]) == model_mark(dataclasses.replace(model, name="elsewhere"))
    unlike = model_mark(model)
    with jax.default_matmul_precision("bfloat16"):
        assert model_mark(model) != unlike
    fill(Cache(tmp_path, "a"), [numbered(1)], [SCORE])
    assert fill(Cache(tmp_path, "b"), [numbered(1)], [SCORE]) == 1


# ---- Files


@pytest.mark.parametrize(
    "harm",
    [
        *(lambda content: content[:-1], lambda content: content[: len(content) // 2], lambda content: b""),
        *(lambda content: content.replace(b"-1.5", b"-2.5", 1), lambda content: os.urandom(len(content))),
    ],
)
def test_a_damaged_file_costs_its_answers_and_is_named(tmp_path, capsys, harm):
    cache = Cache(tmp_path, "m")
    for n in range(3):
        fill(cache, [numbered(n), numbered(n + 10)], [SCORE, SCORE])
    victim = segments(tmp_path)[1]
    lost = [n for n in range(3) if numbered(n).name.hex().encode() in victim.read_bytes()]
    victim.write_bytes(harm(victim.read_bytes()))
    again = Cache(tmp_path, "m")
    assert f"{victim}: damaged; left out and deleted" in capsys.readouterr().err and not victim.exists()
    assert again.claim([[numbered(n)] for n in range(3)]).groups == [[numbered(n)] for n in lost] and len(lost) == 1
    Cache(tmp_path, "m")
    assert capsys.readouterr().err == ""


def test_a_file_that_cannot_be_read_is_left_out(tmp_path, capsys):
    fill(Cache(tmp_path, "m"), [numbered(1)], [SCORE])
    [path] = segments(tmp_path)
    path.unlink()
    path.mkdir()
    assert fill(Cache(tmp_path, "m"), [numbered(2)], [SCORE]) == 1
    assert f"{path}: left out (Is a directory)" in capsys.readouterr().err


def test_a_place_for_no_cache_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        Cache(tmp_path / "file", "m")
    with pytest.raises(UserError, match="must be on a local or shared file system"):
        Cache("gs://bucket/cache", "m")


WRITER = """
import pathlib, sys
sys.path.insert(0, "tests")
from test_eval_cache import Cache, SCORE, fill, numbered
cache = Cache({folder!r}, "m")
{before}
for n in range({start}, {start} + 60):
    fill(cache, [numbered(n)], [SCORE])
"""


def writer(folder, start: int, before: str = "") -> subprocess.Popen:
    """A process that answers sixty requests, a file each."""
    program = WRITER.format(folder=str(folder), start=start, before=before)
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})


@pytest.mark.slow  # three processes
def test_processes_share_a_folder_even_where_one_clears_up(tmp_path):
    """Two write at once, half of it the same; this one opens stages around the folder all the time."""
    writers = [writer(tmp_path, start) for start in (0, 30)]
    while any(process.poll() is None for process in writers):
        files.remove_temporaries(tmp_path)
        time.sleep(0.002)
    assert [process.returncode for process in writers] == [0, 0]
    assert fill(Cache(tmp_path, "m"), [numbered(n) for n in range(91)], [SCORE] * 91) == 1


def test_a_writer_that_is_killed_leaves_what_it_had_finished(tmp_path):
    """Killed with SIGKILL before its third file is renamed."""
    armed = """
import os, signal
kills = iter([False, False, True])
sys.addaudithook(lambda event, _: event == "os.rename" and next(kills) and os.kill(os.getpid(), signal.SIGKILL))
"""
    assert writer(tmp_path, 0, armed).wait() == -signal.SIGKILL
    [leftover] = (tmp_path / "m").glob(".*.part")
    assert fill(Cache(tmp_path, "m"), [numbered(n) for n in range(3)], [SCORE] * 3) == 1
    assert leftover.exists()  # it might be another process's
    os.utime(leftover, (0, time.time() - 7200))
    Cache(tmp_path, "m")
    assert not leftover.exists()


# ---- Claims


def test_each_request_is_asked_once_and_blocks_wait_for_those_before_them(tmp_path):
    cache = Cache(tmp_path, "m")
    a, b, c = map(numbered, range(3))
    first, second = cache.claim([[a, b], [a]]), cache.claim([[b], [c, a, c]])
    assert (first.groups, first.asked, first.missing) == ([[a, b]], 3, 2)
    assert (second.groups, second.asked, second.missing) == ([[c]], 4, 1)
    cache.answer(second, lambda groups: [[SCORE]])
    found = []
    waiting = threading.Thread(target=lambda: found.extend(cache.answers([[b, c]])))
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive() and not found
    other = dataclasses.replace(SCORE, sum_logprob=-9.0)
    cache.answer(first, lambda groups: [[SCORE, other]])
    waiting.join(60)
    assert found == [[other, SCORE]]


def test_blocks_do_not_wait_for_one_that_failed(tmp_path):
    cache = Cache(tmp_path, "m")
    claim = cache.claim([[numbered(1)]])

    def fails(groups):
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        cache.answer(claim, fails)
    with pytest.raises(ValueError, match="no memory"):
        cache.answers([[numbered(1)]])
    assert segments(tmp_path) == []


# ---- The verb


@pytest.fixture
def asked(monkeypatch):
    """(task, how many requests) of each block that the model is asked, on one device."""
    work, calls = eval_verb.answer, []

    def counted(model, block, groups, *rest):
        calls.append((block.benchmark.task.name, sum(map(len, groups))))
        return work(model, block, groups, *rest)

    monkeypatch.setattr(eval_verb, "on_each_device", lambda model: [model])
    monkeypatch.setattr(eval_verb, "answer", counted)
    return calls


def outputs(workdir) -> dict[str, bytes]:
    """What an evaluation leaves for its readers."""
    paths = [workdir / "scores.json", workdir / "samples.jsonl", *workdir.glob("parts/**/*")]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths if path.is_file()}


def near(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """The same logs, but for the last digits of log-probabilities."""
    assert found.keys() == expected.keys()
    for name in found:
        if name.endswith(".jsonl"):
            for ours, theirs in zip(found[name].splitlines(), expected[name].splitlines(), strict=True):
                ours, theirs = json.loads(ours), json.loads(theirs)
                for key in ("logprobs", "whole_logprobs"):
                    np.testing.assert_allclose(ours.pop(key, 0), theirs.pop(key, 0), atol=1e-4)
                assert [ours.pop("margins", 0) is None, ours] == [theirs.pop("margins", 0) is None, theirs]


def names_of(model, task: str, data, limit: int | None = None) -> set[bytes]:
    """The requests of a task's first items, each once."""
    found = load_benchmark(load_task(str(task)), str(data))
    blocks = [ask(model, found, subset, items[:limit], True) for subset, items in found.items.items()]
    return {request.name for block in blocks for group in block.groups for request in group}


@pytest.mark.slow  # many shapes are compiled
def test_a_folder_goes_on_with_other_limits_benchmarks_and_rules(model, tmp_path, asked, capsys):
    """After each command it holds what the same command leaves in an empty folder, and only what is new is asked."""
    choice, written = tmp_path / "choice.toml", tmp_path / "written.toml"
    choice.write_text(TASK.format(kind="lm_eval", mutual="true"), encoding="utf-8")
    written.write_text(WRITTEN, encoding="utf-8")
    steps = 0

    def go_on(*benchmarks, new: dict, **changes) -> None:
        nonlocal steps
        steps += 1
        names = tuple(map(str, benchmarks))
        config, fresh = config_of(tmp_path, model, benchmarks=names, prompts=("从前",), **changes), f"fresh{steps}"
        asked.clear()
        eval_verb.run(config, str(tmp_path / "grown"))
        assert {name: sum(n for task, n in asked if task == name) for name, _ in asked} == new
        eval_verb.run(config, str(tmp_path / fresh))
        near(outputs(tmp_path / "grown"), outputs(tmp_path / fresh))

    toy(tmp_path)  # the questions
    first, every = names_of(model, choice, tmp_path, 1), names_of(model, choice, tmp_path)
    assert len(every) < 9 * 6  # nine items of three options, each after its question and alone; some are the same
    go_on(choice, limit=1, new={"choice": len(first)})
    assert "goes on" not in capsys.readouterr().err
    go_on(choice, new={"choice": len(every - first)})
    assert "grown goes on with other settings (limit: 1 there, null now)" in capsys.readouterr().err
    go_on(choice, written, new={"written": 3})
    assert "choice: 54 requests, 54 of them answered before" in capsys.readouterr().err
    rule = WRITTEN.replace('extract.number = "gsm8k"', 'extract.letter = "first_capital"')
    written.write_text(rule, encoding="utf-8")
    go_on(choice, written, new={})
    assert '"letter"' in (tmp_path / "grown" / "parts" / "written" / "all-0000.jsonl").read_text(encoding="utf-8")
    written.write_text(rule.replace("max_tokens = 6", "max_tokens = 5"), encoding="utf-8")
    go_on(written, new={"written": 3})
    assert not (tmp_path / "grown" / "parts" / "choice").exists()
    go_on(choice, limit=2, new={})


@pytest.mark.slow  # two more shapes are compiled
def test_of_an_item_with_another_option_that_alone_is_asked(model, tmp_path, asked):
    task = pathlib.Path(toy(tmp_path, "lm_eval"))
    for text, new in ((TASK.replace(', "山"', ""), 18), (TASK, 9)):
        task.write_text(text.format(kind="lm_eval", mutual="false"), encoding="utf-8")
        asked.clear()
        eval_verb.run(config_of(tmp_path, model, benchmarks=(str(task),)), str(tmp_path / "w"))
        assert sum(count for _, count in asked) == new


def test_a_cache_is_shared_by_folders_of_one_model(model, tmp_path, asked):
    """Another benchmark of the same questions, another folder, another batch; not another model of the same shape."""
    task, shared = toy(tmp_path, "ppl"), str(tmp_path / "shared")
    twin = tmp_path / "twin.toml"
    twin.write_bytes(pathlib.Path(task).read_bytes())
    one = eval_verb.run(config_of(tmp_path, model, benchmarks=(task,), cache=shared), str(tmp_path / "one"))
    assert not (tmp_path / "one" / "cache").exists()
    assert sum(count for _, count in asked) == 27
    asked.clear()
    config = config_of(tmp_path, model, benchmarks=(str(twin), task), cache=shared, batch_tokens=64)
    two = eval_verb.run(config, str(tmp_path / "two"))
    assert not asked and two["benchmarks"]["toy_ppl"] == one["benchmarks"]["toy_ppl"]
    assert two["benchmarks"]["twin"]["scores"] == one["benchmarks"]["toy_ppl"]["scores"]

    others = init_params(model.config, jax.random.key(5))
    export(model.config, others, model.tokenizer, tmp_path / "other", "float32")
    config = config_of(tmp_path, model, benchmarks=(task,), cache=shared)
    eval_verb.run(dataclasses.replace(config, model=str(tmp_path / "other")), str(tmp_path / "three"))
    assert sum(count for _, count in asked) == 27 and len(list((tmp_path / "shared").iterdir())) == 2


@pytest.mark.parametrize("finished", [True, False])
def test_another_model_and_another_way_to_ask_are_refused(model, tmp_path, asked, finished):
    config, workdir = config_of(tmp_path, model, benchmarks=(toy(tmp_path, "ppl"),)), tmp_path / "w"
    eval_verb.run(config, str(workdir))
    if not finished:
        (workdir / "manifest.json").unlink()
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    export(model.config, init_params(model.config, jax.random.key(5)), model.tokenizer, tmp_path / "other", "float32")
    refused = [
        ({"bos": False}, "settings.bos: true there, false now"),
        ({"chat": True}, "settings.chat: false there, true now"),
        ({"dtype": "bfloat16"}, 'settings.dtype: null there, "bfloat16" now'),
        ({"model": str(tmp_path / "other")}, "inputs.model: "),
    ]
    for change, message in refused:
        with pytest.raises(UserError, match=message):
            eval_verb.run(dataclasses.replace(config, limit=1, **change), str(workdir))
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


@pytest.mark.slow  # some twenty evaluations
def test_interrupted_at_any_file_it_ends_in_the_bytes_of_an_undisturbed_evaluation(model, tmp_path, monkeypatch):
    """On two devices, whose blocks share requests; each is interrupted twice."""
    monkeypatch.setattr(eval_verb, "on_each_device", lambda model: on_each_device(model)[:2])
    choice, twin = toy(tmp_path, "lm_eval", "true"), tmp_path / "twin.toml"
    twin.write_text(pathlib.Path(choice).read_text().replace('"test"', '"dev"', 1), encoding="utf-8")
    config = config_of(tmp_path, model, benchmarks=(choice, str(twin)))
    replace, files_there = os.replace, []

    def until(most: int):
        left = threading.Semaphore(most)

        def replace_or_die(source, target):
            if not left.acquire(blocking=False):
                raise KeyboardInterrupt
            files_there.append(target)
            replace(source, target)

        return replace_or_die

    monkeypatch.setattr(files.os, "replace", until(1_000))
    eval_verb.run(config, str(tmp_path / "whole"))
    expected, count = outputs(tmp_path / "whole"), len(files_there)
    for most in range(1, count, 2):
        workdir = tmp_path / f"cut{most}"
        for allowed in (most, most // 2):
            monkeypatch.setattr(files.os, "replace", until(allowed))
            with pytest.raises(KeyboardInterrupt):
                eval_verb.run(config, str(workdir))
            assert not (workdir / "manifest.json").exists()
        monkeypatch.setattr(files.os, "replace", until(1_000))
        eval_verb.run(config, str(workdir))
        assert outputs(workdir) == expected
