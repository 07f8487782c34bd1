"""A user's documents, evaluation sets and instruction records as SeqIO tasks."""

import gzip
import json
import pathlib

import pytest
import seqio
from tiny_models import tiny_tokenizer, write_jsonl
from tiny_records import say
from tiny_stages import SAMPLE, dataset_of

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.chat import CtllmTemplate
from ctllm_jax.evaluate.benchmark import judged
from ctllm_jax.evaluate.declarations import load_benchmark, load_task
from ctllm_jax.evaluate.extract import extracted, until_stop
from ctllm_jax.evaluate.prompts import head, option_prompts
from ctllm_jax.evaluate.scoring import encode_pairs
from data_pipeline import adapters
from data_pipeline.splits import is_held_out

# ---- Own folders


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Two files of documents under keys of the user's, with bad lines and documents without an id between them."""
    lines = [json.dumps({"key": f"d{i}", "body": f"文档 {i}: a document", "url": 3}).encode() for i in range(40)]
    bad = [b"not json", b'{"key": "x"}', b'{"key": "y", "body": " "}', b'{"key": "z", "body": "\xff"}', b"[]"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines[:20], *bad, b""]))
    nameless = json.dumps({"body": "no id", "source": "blog", "": 0}).encode()  # as of a CSV file with an index
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join([*lines[20:], nameless])))
    return tmp_path


def folder_task(folder, **changes) -> str:
    values = {"patterns": [str(folder / "*.jsonl*")], "text_field": "body", "id_field": "key", "share": 0.25}
    return adapters.folder_task("mine", tokenizer=tiny_tokenizer(), **values | changes)


def test_a_folder_is_a_task_whose_bad_lines_are_told(folder, capsys):
    name, trained = folder_task(folder), tiny_tokenizer()
    found = {split: {e["id"].decode(): e for e in dataset_of(name, split)} for split in ("train", "validation")}
    everything = found["train"] | found["validation"]
    assert not found["train"].keys() & found["validation"].keys()
    assert everything.keys() == {f"d{i}" for i in range(40)} | {"b:21"}
    held = {identity for identity in everything if is_held_out(identity, 0.25)}
    assert found["validation"].keys() == held and 0 < len(held) < 41
    for identity, example in everything.items():
        text = "no id" if identity == "b:21" else f"文档 {identity[1:]}: a document"
        assert example["targets"].tolist() == [trained.bos_id, *trained.encode(text), trained.eos_id]
        assert example["bytes"] == len(text.encode())
    source = seqio.get_mixture_or_task(name).source
    first = {"invalid_json": 1, "no_text": 1, "empty_text": 1, "invalid_utf8": 1, "not_an_object": 1}
    assert source.rejected == {str(folder / "a.jsonl"): first, str(folder / "b.jsonl.gz"): {}}
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1  # two splits were read, and told once
    assert told[0].startswith(f"{folder}/a.jsonl: no documents: 1 invalid_json, 1 no_text") and "line 21" in told[0]


def test_a_folders_files_are_its_shards(folder):
    name = folder_task(folder)
    parts = [dataset_of(name, "train", shard_info=seqio.ShardInfo(i, 2)) for i in range(2)]
    names = [{example["id"].decode() for example in part} for part in parts]
    assert names[0] <= {f"d{i}" for i in range(20)} and names[1] <= {f"d{i}" for i in range(20, 40)} | {"b:21"}
    assert names[0] | names[1] == {example["id"].decode() for example in dataset_of(name, "train")}


def test_a_folder_without_files_or_with_a_broken_one_is_told(folder, capsys):
    with pytest.raises(UserError, match="no file matches"):
        folder_task(folder, patterns=[str(folder / "*.txt")])
    packed = (folder / "b.jsonl.gz").read_bytes()
    (folder / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    dataset_of(folder_task(folder), "train")
    assert f"{folder}/b.jsonl.gz: no documents: 1 damaged" in capsys.readouterr().err


# ---- Evaluation and instruction sets


def check_choices(declaration: str) -> int:
    """How many examples there are, each what `ctllm eval` asks."""
    trained, found = tiny_tokenizer(), load_benchmark(load_task(declaration), "")
    examples = dataset_of(adapters.choice_task(declaration, trained), "test")
    items = [item for own in found.items.values() for item in own]
    for example, item in zip(examples, items, strict=True):
        opening = head(found, item.subset, found.task.shots.count if found.task.shots else 0)
        prompt = option_prompts(found.task, item, opening)[item.gold]
        pair = prompt.context, prompt.delimiter + prompt.continuation
        [(inputs, targets)] = encode_pairs(trained, [pair], bos=True)
        assert (example["inputs"].tolist(), example["targets"].tolist()) == (inputs, [*targets, trained.eos_id])
        assert example["id"].decode() == item.id
        assert example["inputs_pretokenized"].decode() == prompt.context
    return len(examples)


def test_a_declared_choice_task_reads_as_ctllm_eval_reads_it():
    assert check_choices(str(SAMPLE / "choice.toml")) == 60


TASK = r"""
source = "this test"
kind = "lm_eval"
split = "test"
prefix = "Choose.\n\n"
prepare = "choices"
question = "Q: {question}\n{listed}\nAnswer:"
delimiter = " "
options = ["A", "B", "C"]
labels = ["A", "B", "C"]
offered = "{offered}"
gold = "{answer}"

[files]
folder = "./"
about = "these questions"
splits.test = ["questions.jsonl"]
splits.dev = ["shots.jsonl"]

[shots]
count = 2
split = "dev"
"""


def declared(folder: pathlib.Path, questions: list[dict], text: str = TASK) -> str:
    """A declaration with shots and letters, in a folder of its own."""
    write_jsonl(folder / "questions.jsonl", questions)
    shot = {"question": "Which?", "choices": ["this", "that"], "answer": 1}
    write_jsonl(folder / "shots.jsonl", [{**shot, "id": i} for i in range(3)])
    (folder / "letters.toml").write_text(text)
    return str(folder / "letters.toml")


QUESTIONS = [{"question": f"Number {i}?", "choices": ["one", "two", "three"], "answer": "ABC"[i % 3]} for i in range(9)]


def test_shots_options_and_letters_too(tmp_path):
    assert check_choices(declared(tmp_path, QUESTIONS)) == 9


@pytest.mark.parametrize(
    ("question", "text", "message"),
    [
        ({"answer": 3}, TASK, "answer 3 names none of its choices"),
        ({}, TASK.replace("count = 2", "count = 4"), "4 examples wanted, the file has 3"),
        ({}, TASK.replace("{question}", "{moon}"), "template .*moon.*; fields"),
    ],
)
def test_a_declaration_that_cannot_be_read_is_refused(tmp_path, question, text, message):
    with pytest.raises(UserError, match=message):
        adapters.choice_task(declared(tmp_path, [{**QUESTIONS[0], **question}], text), tiny_tokenizer())


@pytest.mark.parametrize("kind", ["ppl", "ll"])
def test_options_that_are_whole_texts_part_where_they_begin_to_differ(tmp_path, kind):
    trained = tiny_tokenizer()
    declaration = declared(tmp_path, QUESTIONS, TASK.replace('"lm_eval"', f'"{kind}"'))
    found = load_benchmark(load_task(declaration), "")
    examples = dataset_of(adapters.choice_task(declaration, trained), "test")
    for example, item in zip(examples, found.items[""], strict=True):
        texts = [prompt.text for prompt in option_prompts(found.task, item, head(found, "", 2))]
        whole, inputs = trained.encode_batch(texts), example["inputs"].tolist()
        assert [*inputs, *example["targets"]] == [*trained.start_ids, *whole[item.gold], trained.eos_id]
        shared = inputs[len(trained.start_ids) :]
        assert all(ids[: len(shared)] == shared for ids in whole) and len({ids[len(shared)] for ids in whole}) > 1
        given, answer = (example[f"{name}_pretokenized"].decode() for name in ("inputs", "targets"))
        assert given + answer == texts[item.gold] and answer == "ABC"[item.gold]


WRITTEN = r"""
source = "this test"
kind = "generate"
split = "test"
question = "Q: {question}\nA:"
gold = "{answer}"
max_tokens = 16
stop = ["\n", "Q:"]
extract.accuracy = "gsm8k"
match = "number"

[files]
folder = "./"
about = "these questions"
splits.test = ["questions.jsonl"]
"""


def test_seqios_evaluator_reads_written_answers_as_ctllm_eval_does(tmp_path):
    trained = tiny_tokenizer()
    declaration = declared(tmp_path, [{"question": f"{n} and 1?", "answer": str(n + 1)} for n in range(4)], WRITTEN)
    name = adapters.written_task(declaration, trained)
    example = dataset_of(name, "test")[2]
    assert example["inputs"].tolist() == [*trained.start_ids, *trained.encode("Q: 2 and 1?\nA:")]
    assert example["targets"].tolist() == [*trained.encode("3"), trained.eos_id]
    said = [" The answer is 1", " The answer is 9", " It is 3\nNo, 7", "4 Q: 5"]  # right, wrong, right, right
    evaluator = seqio.Evaluator(name, seqio.EncDecFeatureConverter(pack=False), eval_split="test")

    def predict(dataset, *_):
        ids = [trained.encode(text) for text in said]
        rows = [own + [trained.eos_id] * (40 - len(own)) for own in ids]  # SeqIO wants them of one length
        return [(int(number), rows[int(number)]) for number, _ in dataset.as_numpy_iterator()]

    metrics, _ = evaluator.evaluate(compute_metrics=True, step=0, predict_fn=predict, score_fn=None)
    benchmark = load_benchmark(load_task(declaration), "")
    answers = [extracted("gsm8k", until_stop(text, benchmark.task.stop), ()) for text in said]
    right = judged(benchmark.task, "accuracy", benchmark.items[""], answers, isolate=True)
    assert right == [1, 0, 1, 1] and metrics.result()[name] == {"accuracy": pytest.approx(0.75)}


def test_tasks_of_another_kind_are_refused(tmp_path):
    choice, written = declared(tmp_path, QUESTIONS), tmp_path / "written.toml"
    written.write_text(WRITTEN)
    with pytest.raises(UserError, match="letters is of kind lm_eval; a written task is of kind generate"):
        adapters.written_task(choice, tiny_tokenizer())
    with pytest.raises(UserError, match="written is of kind generate; choices are of kind lm_eval, ppl or ll"):
        adapters.choice_task(str(written), tiny_tokenizer())


def test_seqios_evaluator_scores_a_choice_task(tmp_path):
    name = adapters.choice_task(declared(tmp_path, QUESTIONS), tiny_tokenizer())
    evaluator = seqio.Evaluator(name, seqio.EncDecFeatureConverter(pack=False), eval_split="test")

    def predict(dataset, *_):
        # Answers A to everything; a third of the answers are.
        answer = [*tiny_tokenizer().encode(" A"), tiny_tokenizer().eos_id, 7]
        return [(int(number), answer) for number, _ in dataset.as_numpy_iterator()]

    metrics, _ = evaluator.evaluate(compute_metrics=True, step=0, predict_fn=predict, score_fn=None)
    assert metrics.result()[name]["exact_match"] == pytest.approx(1 / 3)


def test_instructions_are_prompts_and_answers():
    trained = tiny_tokenizer()
    system = {"role": "system", "content": "好"}
    records = [{"id": f"c{i}", "language": "zh-CN", "messages": say(f"问{i}", f"答{i}")} for i in range(20)]
    records += [{"id": "turns", "source": "talk", "messages": [system, *say("one", "two", "three", "four")]}]
    names = adapters.instruction_tasks(records, trained, 0.25)
    assert names == {"zh-CN": "instruction_zh.CN", "talk": "instruction_talk"}
    found = {split: dataset_of(names["zh-CN"], split) for split in ("train", "validation")}
    assert {e["id"].decode() for own in found.values() for e in own} == {f"c{i}" for i in range(20)}
    for split, own in found.items():
        for example in own:
            record = records[int(example["id"].decode()[1:])]
            assert is_held_out(record["id"], 0.25) == (split == "validation")
            assert example["inputs"].tolist() == CtllmTemplate(trained).render_prompt(record["messages"][:1])
            assert [*example["inputs"], *example["targets"]] == CtllmTemplate(trained).render(record["messages"])[0]
            assert example["targets_pretokenized"].decode() == record["messages"][1]["content"]
    first, second = [e for split in found for e in dataset_of(names["talk"], split)]  # an example for each answer
    messages = records[-1]["messages"]
    assert [*first["inputs"], *first["targets"]] == CtllmTemplate(trained).render(messages[:3])[0]
    assert [*second["inputs"], *second["targets"]] == CtllmTemplate(trained).render(messages)[0]
    assert second["inputs"].tolist() == CtllmTemplate(trained).render_prompt(messages[:4])


# ---- Converters


LENGTHS = {"inputs": 48, "targets": 16}


@pytest.mark.parametrize("pack", [True, False])
def test_all_of_them_work_with_the_standard_converters(folder, pack):
    def get(name: str, split: str, converter: type, lengths: dict[str, int]) -> list[dict]:
        return list(seqio.get_dataset(name, lengths, converter(pack=pack), split).as_numpy_iterator())

    examples = get(folder_task(folder), "train", seqio.DecoderFeatureConverter, {"targets": 64})
    assert all(len(values) == 64 for values in examples[0].values()) and examples[0]["decoder_loss_weights"].any()
    assert not pack or examples[0]["decoder_segment_ids"].max() > 1
    records = [{"id": f"c{i}", "messages": say(f"问{i}", f"答{i}")} for i in range(30)]
    (instructions,) = adapters.instruction_tasks(records, tiny_tokenizer(), 0.25).values()
    questions = adapters.choice_task(str(SAMPLE / "choice.toml"), tiny_tokenizer())
    for name, split in ((instructions, "train"), (questions, "test")):
        whole = dataset_of(name, split)[0]
        cut = {key: whole[key][:length].tolist() for key, length in LENGTHS.items()}
        prefix = get(name, split, seqio.DecoderFeatureConverter, LENGTHS)[0]
        joined = cut["inputs"] + cut["targets"]
        assert prefix["decoder_target_tokens"][: len(joined)].tolist() == joined
        weights = prefix["decoder_loss_weights"][: len(joined)].tolist()
        assert weights == [0] * len(cut["inputs"]) + [1] * len(cut["targets"])
        both = get(name, split, seqio.EncDecFeatureConverter, LENGTHS)[0]
        assert both["encoder_input_tokens"][: len(cut["inputs"])].tolist() == cut["inputs"]
        assert both["decoder_target_tokens"][: len(cut["targets"])].tolist() == cut["targets"]
