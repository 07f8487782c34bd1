"""Questions and samples while a run trains: as `ctllm eval` and `ctllm generate` have them, and without a trace."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
from tiny_models import tiny_config, write_jsonl
from tiny_runs import compiled_once, config_of, params_of  # noqa: F401 (a fixture)
from tiny_stores import tiny_store

from ctllm_jax import train
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_jsonl
from ctllm_jax.data.batches import held_out
from ctllm_jax.data.chat import own_template
from ctllm_jax.evaluate.benchmark import evaluate_block, summary
from ctllm_jax.evaluate.declarations import load_benchmark, load_task
from ctllm_jax.evaluate.in_loop import HeldOut, InLoopConfig, Questions, Samples, SamplesLog, make_probes
from ctllm_jax.loading import load_model
from ctllm_jax.metrics import definitions, read_metrics
from ctllm_jax.model import abstract_params, logical_axes
from ctllm_jax.objectives import make_objective
from ctllm_jax.samples import sample
from ctllm_jax.sampling import SamplingConfig
from ctllm_jax.sharding import MeshConfig, make_mesh, shardings

PROMPTS = ("从前有座山，", "The quick", "水")
WORDS = ("庙", "山", "北京", "fox", "dog", "a city", "和尚", "0123")


TASK = r"""
source = "this test"
kind = "lm_eval"
split = "test"
prepare = "choices"
question = "{question}\n"
options = ["{A}", "{B}", "{C}", "{D}"]
labels = ["A", "B", "C", "D"]
offered = "{offered}"
gold = "{answer}"

[files]
folder = "./"
about = "these questions"
splits.test = ["NAME.jsonl"]
"""


def task(folder: pathlib.Path, name: str = "toy", choices: int = 2, count: int = 24) -> str:
    """A task of questions with so many choices at least."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        own = [WORDS[(number + place) % len(WORDS)] for place in range(choices + number % 2)]
        rows.append({"question": f"{WORDS[number % 5]}在哪里 {number}?", "choices": own, "answer": number % len(own)})
    write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / f"{name}.toml").write_text(TASK.replace("NAME", name), encoding="utf-8")
    return str(folder / f"{name}.toml")


def in_loop(**changes) -> InLoopConfig:
    values = {"every": 3, "batches": 1, "tasks": (), "items": 20, "prompts": (), "sample_tokens": 8}
    return InLoopConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return [task(folder, "toy"), task(folder, "more", choices=3, count=5)]


@pytest.fixture(scope="module")
def settings(store, tasks):
    """Changes to the config of tiny_runs's run, whose step is compiled once for both."""
    looked_at = {"tasks": tasks, "items": 20, "prompts": PROMPTS, "sample_tokens": 8}
    return {f"eval__{name}": value for name, value in looked_at.items()}


@pytest.fixture(scope="module")
def finished(store, settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train.run(config_of(store.folder, **settings), str(workdir))
    return workdir


def test_the_accuracy_is_that_of_ctllm_eval_and_chance_is_said_once(finished, tasks):
    looks = read_metrics(finished, "eval")
    assert all(definitions.find("eval", key) for look in looks for key in look)
    assert [entry["step"] for entry in looks] == [0, 4, 8, 12]
    model = load_model(str(finished))
    for path, items in zip(tasks, (20, 5), strict=True):
        found = load_benchmark(load_task(path), "")
        own = found.items[""]
        spread = [own[number * len(own) // items] for number in range(items)]
        result = summary(found, {"": evaluate_block(model, found, "", spread, True, 512)})
        assert looks[-1][f"accuracy/{found.task.name}"] == result["scores"]["sum"]["micro"]["mean"]
    assert looks[0]["chance/toy"] == pytest.approx((12 / 2 + 8 / 3) / 20)
    assert looks[0]["chance/more"] == pytest.approx((3 / 3 + 2 / 4) / 5)
    assert not any(name.startswith("chance/") for entry in looks[1:] for name in entry)


def test_the_samples_are_what_generation_with_a_cache_gives(finished):
    samples = read_jsonl(finished / "samples.jsonl")
    assert [(entry["step"], entry["prompt"]) for entry in samples] == [(s, p) for s in (0, 4, 8, 12) for p in PROMPTS]
    greedy = SamplingConfig(max_tokens=8, temperature=0.0, top_k=0, top_p=1.0, seed=0)
    expected = sample(load_model(str(finished)), PROMPTS, False, greedy)
    assert [entry["text"] for entry in samples[-3:]] == [entry["text"] for entry in expected]
    assert len({entry["text"] for entry in samples}) > 3


@pytest.mark.parametrize("looking", [True, False])
def test_a_run_that_goes_on_says_the_same_and_learns_the_same_without(finished, store, settings, tmp_path, looking):
    """Taken up at step 10, with the lines of step 12 already there; what is looked at may change on the way."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    changes = settings if looking else {**settings, "eval__tasks": [], "eval__prompts": []}
    train.run(config_of(store.folder, **changes), str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "run"), params_of(finished))
    samples, whole = (read_jsonl(folder / "samples.jsonl") for folder in (tmp_path / "run", finished))
    assert samples == [entry for entry in whole if looking or entry["step"] <= 10]
    last, before = (read_metrics(folder, "eval")[-1] for folder in (tmp_path / "run", finished))
    assert last["loss"] == before["loss"]
    assert last.get("accuracy/toy") == (before["accuracy/toy"] if looking else None)


def test_any_mesh_gives_the_same(finished, store, tasks):
    model = load_model(str(finished))
    probes = make_probes(in_loop(tasks=tasks, prompts=PROMPTS), store, model.config.max_length)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, context=2))
    layout = shardings(mesh, abstract_params(model.config), logical_axes(model.config))
    params = jax.device_put(model.params, layout)
    with jax.set_mesh(mesh):
        accuracies = Questions(probes, model.config, mesh).accuracies(params)
        samples = Samples(probes, model.config, mesh).generate(params)
    look = read_metrics(finished, "eval")[-1]
    assert accuracies == {name: look[name] for name in ("accuracy/toy", "accuracy/more")}
    assert [{"step": 12, **entry} for entry in samples] == read_jsonl(finished / "samples.jsonl")[-3:]


def test_held_out_data_takes_the_memory_of_a_microbatch_and_has_the_same_figures(finished, store):
    config, params = config_of(store.folder, batch_size=32), params_of(finished)
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    objective = make_objective(config.objective, config.model, 2)
    figures, memory = [], []
    with jax.set_mesh(mesh):
        for microbatches in (1, 8):
            look = HeldOut(config.eval, store, 32, microbatches, True, mesh, objective)
            figures.append(look.evaluate(params, None))
            (_, _, batch), *_ = held_out(store, "validation", 32, 1, True, mesh)
            compiled = look._sums.lower(params, None, batch).compile()
            memory.append(compiled.memory_analysis().temp_size_in_bytes)
    assert figures[1] == pytest.approx(figures[0], rel=1e-6)
    assert memory[1] < memory[0] / 3


def test_a_store_of_conversations_has_the_prompts_in_its_template(tmp_path):
    store = tiny_store(tmp_path / "store", "chat")
    probes = make_probes(in_loop(prompts=("山里有什么？",), sample_tokens=1000), store, 64)
    template = own_template(store.tokenizer)
    (prompt,) = probes.prompts
    assert prompt.ids == template.render_prompt([{"role": "user", "content": "山里有什么？"}])
    assert prompt.room == 64 - len(prompt.ids)  # no further than the model's context
    assert {*template.end_ids, store.tokenizer.eos_id} == probes.stop_ids


def test_a_model_of_more_ids_than_the_tokenizer_writes_none_of_them(store):
    """Its head prefers an id that no text can hold."""
    probes = make_probes(in_loop(prompts=("山",)), store, 64)
    config = tiny_config(vocab_size=384)
    assert store.tokenizer.vocab_size < 384
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype) / 9, abstract_params(config))
    params["head"][:, 380] = 1.0
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1, context=1))
    with jax.set_mesh(mesh):
        (sample,) = Samples(probes, config, mesh).generate(params)
    assert sample["prompt"] == "山" and isinstance(sample["text"], str)


def test_a_continuation_ends_before_its_stop(store, monkeypatch):
    probes = make_probes(in_loop(prompts=("山", "庙里")), store, 64)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1, context=1))
    samples = Samples(probes, tiny_config(), mesh)
    words = store.tokenizer.encode("山里有座庙")
    tokens_BL = np.zeros((2, 64), np.int32)
    for row, prompt in enumerate(probes.prompts):
        new = [words[0], store.tokenizer.eos_id, words[1]] if row else words
        tokens_BL[row, len(prompt.ids) :][: len(new)] = new
    monkeypatch.setattr(samples, "_go_on", lambda *_: tokens_BL)
    first, second = (entry["text"] for entry in samples.generate({}))
    assert first.startswith("山里有座庙") and second == store.tokenizer.decode(words[:1])


def test_only_the_first_process_writes_samples(tmp_path):
    SamplesLog(tmp_path, 0, writes=False).write(1, [{"prompt": "a", "text": "b"}])
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval__tasks": ["nowhere.toml"]}, "task .nowhere.toml.: no such file"),
        ({"eval__tasks": ["toy", "toy"]}, "two tasks are called toy"),
        ({"eval__prompts": ["山" * 40]}, "eval.prompts: '山+' has .* tokens; the model takes 32, and nothing is left"),
        ({"eval__items": 0}, "items and sample_tokens must be at least 1"),
        ({"eval__sample_tokens": 0}, "items and sample_tokens must be at least 1"),
    ],
)
def test_what_cannot_be_asked_is_said_before_the_folder_is_claimed(store, tasks, tmp_path, change, message):
    change = {name: [tasks[0] if entry == "toy" else entry for entry in value] if name == "eval__tasks" else value
              for name, value in change.items()}  # fmt: skip
    with pytest.raises(UserError, match=message):
        train.run(config_of(store.folder, **change), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_choice_longer_than_the_model_is_named(store, tmp_path):
    path = task(tmp_path, "long", count=1)
    write_jsonl(tmp_path / "long.jsonl", [{"question": "?", "choices": ["山" * 80, "庙"], "answer": 0}])
    with pytest.raises(UserError, match="long, question 0: a choice of .* tokens; the model takes 32"):
        make_probes(in_loop(tasks=(path,)), store, 32)


def test_tasks_that_cannot_be_asked_while_training_are_refused(store, tmp_path):
    path = pathlib.Path(task(tmp_path))
    path.write_text(path.read_text(encoding="utf-8").replace('"lm_eval"', '"ppl"'), encoding="utf-8")
    with pytest.raises(UserError, match="toy is of kind ppl; while training only lm_eval can be asked"):
        make_probes(in_loop(tasks=(str(path),)), store, 32)


def test_a_context_that_is_too_long_loses_its_beginning(store, tmp_path):
    probes = make_probes(in_loop(tasks=(task(tmp_path),), items=1), store, 8)
    (question,) = probes.questions["toy"]
    row = question.rows[0]
    assert (
        row.mask.tolist() == [0] * 7 + [1] * 2
    )  # the newline before the choice is the choice's, as in lm-eval-harness
    assert row.tokens[-1:].tolist() == store.tokenizer.encode(WORDS[0])


def test_the_shipped_task_is_found_from_anywhere(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    probes = make_probes(in_loop(tasks=("sample/choice.toml",), items=60), store, 64)
    assert len(probes.questions["sample_choice"]) == 60 and probes.chance == {"chance/sample_choice": 0.25}
