"""Declared tasks: OpenCompass's prompts to the newline, and files in their published schemas."""

import dataclasses
import functools
import gzip
import json
import zipfile

import pytest
from tiny_models import NO_REFERENCE, REFERENCE, write_jsonl

from ctllm_jax.common.errors import UserError
from ctllm_jax.evaluate.declarations import load_benchmark, load_task, shipped
from ctllm_jax.evaluate.prompts import head, open_prompt, option_prompts

needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)
DATA = REFERENCE.parent / "eval"

OPENCOMPASS = {
    "hellaswag": "hellaswag_ppl",
    "copa-zh": "xcopa_zh_ppl",
    "boolq": "boolq_ppl_314797",
    "piqa": "piqa_ppl",
    "siqa": "siqa_ppl",
    "arc-c": "arc_c_ppl",
    "winogrande": "winogrande_ll",
    "c3": "c3_m_ppl",
    "afqmc": "afqmc_ppl",
    "ocnli": "ocnli_ppl",
    "csl": "csl_ppl",
    "gsm8k": "gsm8k_gen",
    "humaneval": "humaneval_gen",
    "humaneval-base": "humaneval_base_gen",
    "triviaqa": "triviaqa_gen",
    "nq": "nq_gen",
    "lambada": "lambada_gen",
    "squad2": "squad2_gen",
    "mbpp": "mbpp_gen_830460",
    "math": "math_gen",
    "ceval-gen": "ceval_gen",
}
# What the reference runs read instead of a task's own split or files.
READ = {
    "copa-zh": {"split": "validation"},
    "math": {"files": ("test", ["math500.jsonl"])},
    "lambada": {"files": ("test", ["lambada_like.jsonl"]), "folder": "lm_eval_tasks"},
}


@functools.cache
def benchmark(name: str, subset: str = "", changes: str = "{}"):
    """One subset of a shipped task on the shared files, with the changes that a reference run made."""
    task, changes = load_task(name), json.loads(changes)
    if subset:
        changes |= {"subsets": {"": (f"{subset} {task.titles[subset]}",)}, "averages": {}}
    data = DATA
    if "files" in changes:
        split, names = changes.pop("files")
        folder = changes.pop("folder", task.files.folder)
        data = REFERENCE / folder if folder == "lm_eval_tasks" else DATA
        files = {"folder": "data" if folder == "lm_eval_tasks" else folder, "splits": {split: tuple(names)}}
        changes["files"] = dataclasses.replace(task.files, **files)
    return load_benchmark(dataclasses.replace(task, **changes), str(data))


def shots(task) -> int:
    return task.shots.count if task.shots else 0


def opencompass(task: str):
    """(our benchmark, subset) of a reference task's name."""
    base, _, variant = task.partition("@")
    for family in ("ceval", "cmmlu", "mmlu"):
        if base.startswith(f"{family}-") and task not in OPENCOMPASS:
            name = f"{family}_ppl_041cbf" if variant == "041cbf" else f"{family}_ppl"
            subset = base.removeprefix(f"{family}-")
            return benchmark(name, subset), subset
    subset = "computer_network" if task == "ceval-gen" else ""
    return benchmark(OPENCOMPASS[task], subset, json.dumps(READ.get(task, {}))), subset


def reference(name: str) -> list[dict]:
    with gzip.open(REFERENCE / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@needs_reference
def test_choice_prompts_are_opencompass_to_the_newline():
    entries = reference("opencompass/ppl.jsonl.gz")
    for entry in entries:
        found, subset = opencompass(entry["task"])
        item, task = found.items[subset][entry["idx"]], found.task
        prompts = option_prompts(task, item, head(found, subset, shots(task)))
        assert [prompt.text for prompt in prompts] == entry["prompts"], entry["task"]
        assert list(task.names) == entry["labels"]
        assert task.names[item.gold] == entry["gold"]
    assert len(entries) == 19 * 12


@needs_reference
def test_generation_prompts_are_opencompass_to_the_newline():
    entries = reference("opencompass/gen_prompts.jsonl.gz")
    for entry in entries:
        found, subset = opencompass(entry["task"])
        items = found.items[subset][:20]
        if entry["task"] == "lambada":  # the samples are questions of GSM8K
            texts = [item.fields["question"] for item in benchmark("gsm8k_gen").items[""][:20]]
            items = [dataclasses.replace(items[0], fields={"context": text.rpartition(" ")[0]}) for text in texts]
        prompts = [open_prompt(found.task, item, head(found, subset, shots(found.task))) for item in items]
        if entry["task"] == "squad2":  # its samples are not the first rows
            assert entry["prompt"] in prompts
        else:
            assert prompts[entry["idx"]] == entry["prompt"], entry["task"]
        assert entry["max_out_len"] in (None, found.task.max_tokens)
    assert len(entries) == 51


# ---- Published schemas of benchmarks whose files are not at hand

CHOICES = [{"text": text, "label": label} for text, label in zip(("red", "blue", "green", "grey"), "ABCD", strict=True)]
FIXTURES = {
    "cb_ppl": ("CB/val.jsonl", {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment", "idx": 0}),
    "rte_ppl": ("RTE/val.jsonl", {"premise": "It rains.", "hypothesis": "It is dry.", "label": "not_entailment"}),
    "copa_ppl": (
        "COPA/val.jsonl",
        {"premise": "He fell.", "choice1": "He ran.", "choice2": "He bled.", "question": "effect", "label": 1},
    ),
    "wic_ppl": ("WiC/val.jsonl", {"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "label": False}),
    "boolq_ppl": ("BoolQ/val.jsonl", {"question": "is it", "passage": "Title -- Text -- more.", "label": True}),
    "arc_e_ppl": ("ARC-Easy-Dev.jsonl", {"question": {"stem": "Sky?", "choices": CHOICES}, "answerKey": "B"}),
    "obqa_ppl": ("Main/test.jsonl", {"question": {"stem": "Sky?", "choices": CHOICES}, "answerKey": "B"}),
    "hellaswag_ppl": (
        "hellaswag_val.jsonl",
        {
            "activity_label": "Baking",
            "ctx_a": "[header] Mix: it [title] Now",
            "ctx_b": "she",
            "ctx": "unused",
            "endings": ["stirs.", "[step] runs.", "eats.", "waits."],
            "label": 2,
        },
    ),
    "lambada_lm_eval": ("lambada_test_en.jsonl", {"text": "the end of the road"}),
    "lambada_gen": ("test.jsonl", {"prompt": "the end of the", "label": "road"}),
    "multirc_ppl": (
        "MultiRC/val.jsonl",
        {
            "passage": {
                "text": "T",
                "questions": [{"question": "Q", "answers": [{"text": "a", "label": 0}, {"text": "b", "label": 1}]}],
            }
        },
    ),
}
EXPECTED = {
    "cb_ppl": (
        "It rains.\nIt is wet.\nWhat is the relation between the two sentences?\n",
        ["Contradiction", "Entailment", "Neutral"],
        1,
    ),
    "rte_ppl": ("It rains.\nIt is dry.\nIs the sentence below entailed by the sentence above?\n", ["Yes", "No"], 1),
    "copa_ppl": ("He fell.\nQuestion: What may be the effect?\nAnswer:\n", ["He ran.", "He bled."], 1),
    "wic_ppl": (
        "Sentence 1: A bank.\nSentence 2: The bank.\n'bank' in the above two sentenses are ",
        ["different.", "the same."],
        0,
    ),
    "boolq_ppl": ("Title -- Text -- more.\nQuestion: is it?\n", ["No", "Yes"], 1),
    "arc_e_ppl": ("Question: Sky?\nAnswer: \n", ["red", "blue", "green", "grey"], 1),
    "obqa_ppl": ("Question: Sky?\nA. red\nB. blue\nC. green\nD. grey\nAnswer:\n", ["A", "B", "C", "D"], 1),
    "hellaswag_ppl": ("it. Now She\n", ["stirs.", " runs.", "eats.", "waits."], 2),
    "lambada_lm_eval": ("the end of the ", ["road"], None),
    "multirc_ppl": ("T\nQuestion: Q\nAnswer: a\nIs it true?\n", ["No, it is false.", "Yes, it is true."], 0),
}


def loaded(tmp_path, name: str, rows: list[dict] | None = None, changes: dict | None = None):
    file, row = FIXTURES[name]
    task = dataclasses.replace(load_task(name), **(changes or {}))
    path = tmp_path / task.files.folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows or [row])
    return load_benchmark(task, str(tmp_path))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_published_schemas_give_the_prompts_of_their_protocol(name, tmp_path):
    found = loaded(tmp_path, name)
    context, options, gold = EXPECTED[name]
    prompts = option_prompts(found.task, found.items[""][0], head(found, "", 0))
    assert [prompt.text for prompt in prompts] == [context + option for option in options]
    assert found.items[""][0].gold == gold
    assert len(found) == (2 if name == "multirc_ppl" else 1)


def test_open_questions_keep_all_their_answers(tmp_path):
    found = loaded(tmp_path, "lambada_gen")
    assert found.items[""][0].answers == ("road",)
    assert open_prompt(found.task, found.items[""][0], "").endswith("sentence:\nthe end of the")
    task = load_task("nq_gen")
    (tmp_path / "nq").mkdir()
    (tmp_path / "nq" / "nq-test.qa.csv").write_text("who was it\t['A. Man', \"B's\"]\n")
    [item] = load_benchmark(task, str(tmp_path)).items[""]
    assert item.answers == ("A. Man", "B's") and item.fields["question"] == "who was it"


def test_tables_archives_and_label_files_are_read(tmp_path):
    (tmp_path / "theoremqa").mkdir()
    (tmp_path / "theoremqa" / "test.csv").write_text('Question,Answer,Answer_type\n"What, now?",True,bool\n')
    found = load_benchmark(load_task("theoremqa_gen"), str(tmp_path))
    prompt = open_prompt(found.task, found.items[""][0], head(found, "", 0))
    assert prompt.startswith("You are a mathematician,") and "(a), (b), (c), (d)\n\nQuestion: What, now?\n" in prompt
    (tmp_path / "piqa").mkdir()
    write_jsonl(tmp_path / "piqa" / "valid.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b"}] * 2)
    (tmp_path / "piqa" / "valid-labels.lst").write_text("1\n0\n")
    found = load_benchmark(load_task("piqa_ppl"), str(tmp_path))
    assert [item.gold for item in found.items[""]] == [1, 0]
    (tmp_path / "mmlu").mkdir()
    subjects = load_task("mmlu_ppl").titles
    assert len(subjects) == 57 and subjects["us_foreign_policy"] == "us foreign policy"
    with zipfile.ZipFile(tmp_path / "mmlu" / "data.zip", "w") as archive:
        for subject in subjects:
            for split in ("dev", "test"):
                archive.writestr(f"data/{split}/{subject}_{split}.csv", 'Why?,"1, 2",b,c,d,C\n' * 5)
    found = load_benchmark(load_task("mmlu_ppl"), str(tmp_path))
    assert len(found) == 57 * 5
    text = option_prompts(found.task, found.items["virology"][0], head(found, "virology", 1))[3].text
    question = "Why?\nA. 1, 2\nB. b\nC. c\nD. d\nAnswer: "
    prefix = "The following are multiple choice questions (with answers) about  virology.\n\n"
    assert text == f"{prefix}{question}C\n\n{question}D"
    assert head(found, "virology", 0) == prefix + "\n"  # where not one example fits


def test_groups_cover_their_benchmarks():
    for name, sizes in {
        "ceval_ppl": {"stem": 20, "social-science": 10, "humanities": 11, "other": 11, "hard": 8},
        "cmmlu_ppl": {"stem": 17, "social-science": 22, "humanities": 13, "other": 15, "china-specific": 15},
        "mmlu_ppl": {"stem": 19, "social-science": 12, "humanities": 13, "other": 13},
    }.items():
        task = load_task(name)
        assert {group: len(subsets) for group, subsets in task.groups.items()} == sizes
        assert {subset for subsets in task.groups.values() for subset in subsets} == set(task.titles)


def test_every_shipped_task_is_sound_and_says_whose_it_is():
    names = shipped()
    assert len(names) > 45
    for name in names:
        task = load_task(name)
        assert task.name == name and task.source and task.files.about


LETTERS = r"""
source = "this test"
kind = "lm_eval"
split = "test"
prefix = "Choose.\n\n"
prepare = "choices"
question = "Q: {question}\n{listed}\nAnswer:"
delimiter = " "
options = ["A", "B", "C", "D"]
labels = ["A", "B", "C", "D"]
offered = "{offered}"
gold = "{answer}"

[files]
folder = "./"
about = "own questions"
splits.test = ["questions.jsonl"]
splits.dev = ["shots.jsonl"]

[shots]
count = 1
split = "dev"
"""


def own_questions(folder, rows: list[dict]):
    (folder / "own.toml").write_text(LETTERS, encoding="utf-8")
    write_jsonl(folder / "questions.jsonl", rows)
    write_jsonl(folder / "shots.jsonl", [{"question": "Which?", "choices": ["this", "that"], "answer": 1}])
    return load_benchmark(load_task(str(folder / "own.toml")), "")


def test_own_questions_lie_beside_their_declaration_and_may_have_any_number_of_choices(tmp_path):
    rows = [
        {"question": "One?", "choices": ["a", "b {x}"], "answer": 0},
        {"question": "Two?", "choices": ["a", "b", "c"], "answer": "C"},
    ]
    found = own_questions(tmp_path, rows)
    first, second = found.items[""]
    assert (first.gold, second.gold) == (0, 2)
    prompts = option_prompts(found.task, first, head(found, "", 1))
    assert len(option_prompts(found.task, second, "")) == 3
    shot = "Choose.\n\nQ: Which?\nA. this\nB. that\nAnswer: B\n\n"
    assert [prompt.text for prompt in prompts] == [f"{shot}Q: One?\nA. a\nB. b {{x}}\nAnswer: {x}" for x in "AB"]
    again = tmp_path / "elsewhere"
    again.mkdir()
    assert own_questions(again, rows).protocol == found.protocol  # wherever they lie
    with pytest.raises(UserError, match="answer 'C' is none of A, B"):
        load_benchmark(dataclasses.replace(found.task, offered="2"), "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 3}, "answer 3 names none of its choices"),
        ({"answer": "D"}, "answer 'D' names none"),
        ({"answer": True}, "answer True names none"),
        ({"choices": "ab"}, "choices must be a list of 2 to 26 texts"),
        ({"choices": ["a"]}, "choices must be a list"),
        ({"choices": ["a", ""]}, "a choice is not a text, or is empty"),
    ],
)
def test_faulty_own_questions_are_refused(changes, message, tmp_path):
    row = {"question": "One?", "choices": ["a", "b", "c"], "answer": 0}
    with pytest.raises(UserError, match=message):
        own_questions(tmp_path, [row | changes])


def test_the_protocol_hash_changes_with_declaration_and_rows(tmp_path):
    row = FIXTURES["rte_ppl"][1]
    base = loaded(tmp_path, "rte_ppl").protocol
    assert loaded(tmp_path, "rte_ppl").protocol == base
    assert loaded(tmp_path, "rte_ppl", changes={"delimiter": " "}).protocol != base
    assert loaded(tmp_path, "rte_ppl", [row, row]).protocol != base


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"premise": "x", "hypothesis": "y", "label": "maybe"}], {}, "answer 'maybe' is none of entailment"),
        ([{"premise": "x"}], {}, "lacks what the task needs .KeyError: 'label'"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, rows, changes, message):
    with pytest.raises(UserError, match=message):
        loaded(tmp_path, "rte_ppl", rows, changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind = 'guess'", "kind 'guess' is unknown"),
        ("kind = 'ppl'", "at least two options"),
        ("kind = 'ppl'\noptions = ['a', 'b']\nlabels = ['A']", "1 labels for 2 options"),
        ("kind = 'generate'", "needs max_tokens and extract"),
        ("kind = 'rolling'\nprepare = 'magic'", "prepare 'magic' is unknown"),
        ("kind = 'rolling'\nsplit = 'train'", "split 'train' has no files"),
        ("kind = 'rolling'\nsurplus = 1", "unknown key 'surplus'"),
        ("kind = ", "cannot be read"),
    ],
)
def test_faulty_declarations_are_refused(tmp_path, text, message):
    split = "" if "split" in text else "split = 'test'\n"
    rest = "[files]\nfolder = 'f'\nabout = 'x'\nsplits.test = ['t.jsonl']\n"
    path = tmp_path / "own.toml"
    path.write_text(f"source = 'us'\n{split}{text}\n{rest}")
    with pytest.raises(UserError, match=message):
        load_task(str(path))


def test_missing_files_say_what_belongs_where(tmp_path):
    with pytest.raises(UserError, match="found none of CB/val.jsonl, val.jsonl. It should hold CB of SuperGLUE"):
        load_benchmark(load_task("cb_ppl"), str(tmp_path))
    with pytest.raises(UserError, match="shipped tasks: afqmc_ppl"):
        load_task("unheard_of")
    (tmp_path / "cb").mkdir()
    (tmp_path / "cb" / "val.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="cb/val.jsonl: cannot be read"):
        load_benchmark(load_task("cb_ppl"), str(tmp_path))


def test_damaged_and_empty_files_are_refused_by_name(tmp_path):
    def refused(name: str, content: bytes, message: str, task: str = "cb_ppl"):
        folder = tmp_path / name / load_task(task).files.folder
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_benchmark(load_task(task), str(tmp_path / name))

    packed = bytearray(gzip.compress(b'{"premise": "x"}\n' * 1000))
    packed[10:20] = b"\xff" * 10
    refused("val.jsonl.gz", bytes(packed), "val.jsonl.gz: cannot be read")
    (tmp_path / "val.jsonl").write_text('{"premise": "x"}\n' * 1000)
    with zipfile.ZipFile(tmp_path / "whole.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "val.jsonl", "val.jsonl")
    whole = (tmp_path / "whole.zip").read_bytes()
    refused("a.zip", whole.replace(whole[39:49], b"\xff" * 10), "a.zip: cannot be read")
    locked = bytearray(whole)
    for place in (6, whole.index(b"PK\x01\x02") + 8):  # the flags of the member, in both of its headers
        locked[place] |= 1
    refused("b.zip", bytes(locked), "b.zip: cannot be read")
    refused("test.csv", b"", "no questions", "theoremqa_gen")


def test_values_that_cannot_be_taken_apart_are_refused_with_their_row(tmp_path):
    with pytest.raises(UserError, match=r"lacks what the task needs \(AttributeError"):
        loaded(tmp_path, "boolq_ppl", [{"passage": None, "question": "q", "label": True}])
    (tmp_path / "nq").mkdir()
    (tmp_path / "nq" / "nq-test.qa.csv").write_text("who was it\t['A. Man'\n")
    with pytest.raises(UserError, match=r"lacks what the task needs \(SyntaxError"):
        load_benchmark(load_task("nq_gen"), str(tmp_path))
