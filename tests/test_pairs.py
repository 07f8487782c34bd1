"""`ctllm pairs`: a model's own answers, ranked by a function or a judge; nothing is sampled or asked twice."""

import dataclasses
import pathlib

import pytest
from rude_judge import Judge, mark, serve
from test_judge import CALLS
from tiny_models import tiny_model, widened, write_jsonl
from tiny_records import say

from ctllm_jax import convert, pairs, samples
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_jsonl
from ctllm_jax.evaluate.judged import prompts
from ctllm_jax.evaluate.judged.client import JudgeConfig
from ctllm_jax.evaluate.judged.collect import BudgetConfig, CallConfig
from ctllm_jax.pairs import PairsConfig, pair_of
from ctllm_jax.sampling import SamplingConfig
from data_pipeline.records import check_preference, read_records

RECORDS = [
    {"id": "sum", "source": "math", "language": "zh", "messages": say("二加二？", "四")},
    {"id": "talk", "messages": [{"role": "system", "content": "简短"}, *say("山里有什么？", "庙。", "庙里有什么？")]},
    {"id": "pair", "prompt": "Say it", "chosen": "it", "rejected": "no"},
    {"id": "long", "messages": say("老和尚对小和尚说。" * 20, "好")},
    {"id": "open", "messages": [{"role": "assistant", "content": "你好"}]},
]
REWARD = """
def exact(prompt, answer, reference):
    assert prompt[-1]["role"] == "user"
    return -len(answer) if reference is None else float(answer.strip() == reference)

def lost(prompt, answer, reference):
    return float("nan")
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    convert.write_run(tiny_model(max_length=64), folder / "run", "float32")
    (folder / "mine.py").write_text(REWARD)
    return PairsConfig(
        model=str(folder / "run"),
        step=None,
        dtype=None,
        tensor=1,
        input=(str(widened(write_jsonl(folder / "asked.jsonl", RECORDS))),),
        answers=3,
        slots=2,
        sampling=SamplingConfig(max_tokens=6, temperature=1.0, top_k=0, top_p=1.0, seed=1),
        earlier=None,
        judges={},
        samples=1,
        references=True,
        calls=CallConfig(**CALLS, keep_refused=False),
        budget=BudgetConfig(None, None),
        reward=None,
        margin=0.5,
    )


@pytest.fixture(scope="module")
def sampled(config, tmp_path_factory):
    """(folder, result) of answers alone."""
    folder = tmp_path_factory.mktemp("sampled") / "run"
    return folder, pairs.run(config, str(folder))


def scripted(texts: dict[str, list[str]]):
    """A stand-in for the sampler; an answer that ends in an ellipsis was cut off."""

    def sample_kept(path, model, encoded, *_):
        flat = [text for own in texts.values() for text in own]
        assert list(encoded) == list(range(len(flat)))
        return {
            i: {"text": text, "tokens": len(text), "finished": not text.endswith("…")} for i, text in enumerate(flat)
        }

    return sample_kept


@pytest.fixture
def answered(config, monkeypatch, tmp_path):
    """A folder of answers alone, of known ones."""
    texts = {"sum": ["五", " 四", "三"], "talk": ["和尚，老和尚", "庙", "…"], "pair": ["same", "same", "cut…"]}
    monkeypatch.setattr(pairs, "sample_kept", scripted(texts))
    pairs.run(config, str(tmp_path / "answers"))
    return tmp_path / "answers"


def ranked(config, answered, **changes) -> PairsConfig:
    return dataclasses.replace(config, model="", input=(), earlier=str(answered), **changes)


# ---- Answers


def test_each_prompt_gets_several_answers_and_what_is_no_prompt_is_named(sampled):
    folder, result = sampled
    rows = read_jsonl(folder / "answers.jsonl")
    assert [row["id"] for row in rows] == ["sum", "talk", "pair"]
    assert rows[0]["prompt"] == say("二加二？") and rows[0]["reference"] == "四" and rows[0]["source"] == "math"
    assert rows[1]["prompt"] == RECORDS[1]["messages"] and rows[1]["reference"] is None
    assert rows[2]["prompt"] == say("Say it") and rows[2]["reference"] is None
    assert all(len({answer["text"] for answer in row["answers"]}) == 3 for row in rows)
    assert (result["prompts"], result["answers"], result["rejected"]) == (3, 9, 2) and "pairs" not in result
    rejected = read_jsonl(folder / "rejected.jsonl")
    assert rejected[0]["line"] == 5 and "not user and assistant in turn" in rejected[0]["reason"]
    assert rejected[1]["id"] == "long" and "there must be 1 to 63" in rejected[1]["reason"]
    assert not (folder / "partial.jsonl").exists() and not (folder / "pairs.jsonl").exists()


def test_a_run_that_was_cut_short_ends_in_the_same_answers(sampled, config, tmp_path, monkeypatch):
    right = samples.sample_each

    def dying(*arguments):
        for number, entry in enumerate(right(*arguments)):
            if number == 4:
                raise KeyboardInterrupt
            yield entry

    with monkeypatch.context() as patch:
        patch.setattr(samples, "sample_each", dying)
        with pytest.raises(KeyboardInterrupt):
            pairs.run(config, str(tmp_path / "run"))
    asked = []
    monkeypatch.setattr(
        samples, "sample_each", lambda model, rows, *rest: asked.extend(rows) or right(model, rows, *rest)
    )
    assert pairs.run(config, str(tmp_path / "run")) == sampled[1]
    assert len(asked) == 5
    assert read_jsonl(tmp_path / "run" / "answers.jsonl") == read_jsonl(sampled[0] / "answers.jsonl")


def test_prompts_that_changed_within_a_file_are_another_input(sampled, config, tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text(pathlib.Path(config.input[0]).read_text().replace("庙里有什么？", "山里有什么？"))
    with pytest.raises(UserError, match=r"inputs\.input"):
        pairs.run(dataclasses.replace(config, input=(str(file),)), str(sampled[0]))


# ---- Ranks


def test_a_function_ranks_answers_that_ended(config, answered, tmp_path, monkeypatch, capsys):
    reward = f"{config.model[:-3]}mine.py:exact"
    result = pairs.run(ranked(config, answered, reward=reward), str(tmp_path / "pairs"))
    found = read_records([str(tmp_path / "pairs" / "pairs.jsonl")], check_preference)
    assert not found.rejected
    assert found.kept == [
        {"id": "sum", "language": "zh", "source": "math", "prompt": say("二加二？"), "chosen": "四", "rejected": "五"},
        {"id": "talk", "prompt": RECORDS[1]["messages"], "chosen": "庙", "rejected": "和尚，老和尚"},
    ]
    marks = {row["id"]: row["marks"] for row in read_jsonl(tmp_path / "pairs" / "marks.jsonl")}
    assert marks == {"sum": [0.0, 1.0, 0.0], "talk": [-6.0, -1.0, None], "pair": [-4.0, -4.0, None]}
    assert (result["pairs"], result["level"], result["too few marks"], result["cut"]) == (2, 1, 0, 2)
    assert (result["chosen_characters"], result["rejected_characters"], result["rejected"]) == (1.0, 3.5, 2)
    assert "2 pairs; of the other prompts: 0 too few marks, 1 level" in capsys.readouterr().out

    wider = ranked(config, tmp_path / "pairs", margin=2.0)  # its marks, another margin
    monkeypatch.setattr(pairs, "_rewarded", lambda *_: pytest.fail("ranked again"))
    result = pairs.run(wider, str(tmp_path / "wider"))
    assert (result["pairs"], result["level"], result["rejected"]) == (1, 2, 2)
    with pytest.raises(UserError, match=r"settings\.margin: 2\.0 there, 0\.5 now"):
        pairs.run(dataclasses.replace(wider, margin=0.5), str(tmp_path / "wider"))


def test_marks_that_are_no_numbers_are_none(config, answered, tmp_path):
    reward = f"{config.model[:-3]}mine.py:lost"
    result = pairs.run(ranked(config, answered, reward=reward), str(tmp_path / "lost"))
    assert (result["pairs"], result["too few marks"]) == (0, 3)


def test_judges_are_shown_the_reference_and_asked_once(config, answered, tmp_path):
    one = {"url": "", "model": "m", "key": "", "temperature": 0.0, "max_tokens": 100, "limit_name": "max_tokens"}
    judge = Judge()
    with serve(judge) as url:
        judges = {"j": JudgeConfig(**one | {"url": url}), "unused": JudgeConfig(**one | {"url": url, "model": ""})}
        asking = ranked(config, answered, judges=judges)
        result = pairs.run(asking, str(tmp_path / "pairs"))
        assert pairs.run(asking, str(tmp_path / "pairs")) == result
    assert len(judge.paid) == 6 and set(judge.paid.values()) == {1}  # 3 + 2 + one text that came twice
    first = {"turns": ["二加二？"], "answers": ["五"], "references": ["四"]}
    talk = {"turns": ["山里有什么？", "庙里有什么？"], "answers": ["庙。", "庙"], "system": "简短"}
    shown = prompts.grade(talk, 1)[1]["content"]
    assert shown.startswith("【系统提示开始】\n简短\n") and shown.index("庙。") > shown.index("山里有什么？")
    marks = {row["id"]: row["marks"] for row in read_jsonl(tmp_path / "pairs" / "marks.jsonl")}
    assert marks["sum"][0] == mark(prompts.grade(first, 0)[1]["content"])
    assert marks["talk"][1] == mark(shown) and marks["talk"][2] is None


def test_the_best_and_the_worst_are_a_pair():
    row = {"id": "x", "prompt": say("?"), "answers": [{"text": text} for text in ("a", " b ", "c", "d")]}
    assert pair_of(row, [3.0, 7.0, None, 7.0], 1.0) == {
        "id": "x",
        "prompt": say("?"),
        "chosen": "b",
        "rejected": "a",
        "marks": [7.0, 3.0],
    }
    assert pair_of(row, [None, 5.0, None, None], 0.0) == "too few marks"
    assert pair_of(row, [5.0, 5.0, None, None], 0.0) == "level"
    assert pair_of(row, [5.0, 5.9, None, None], 1.0) == "level"


# ---- Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"earlier": "DIR"}, "give model and input, or earlier"),
        ({"input": ()}, "model and input go together"),
        ({"answers": 1}, "answers are at least 2"),
        ({"margin": -1.0}, "margin -1.0 must not be negative"),
        ({"sampling": SamplingConfig(6, 0.0, 0, 1.0, 0)}, "temperature 0 gives the same answer"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_what_is_missing_is_named(config, answered, tmp_path):
    for reward, message in (("mine", "no such file"), (f"{__file__}:nothing", "has no function nothing")):
        with pytest.raises(UserError, match=message):
            pairs.run(ranked(config, answered, reward=reward), str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"has no marks\.jsonl: give judges or a reward"):
        pairs.run(ranked(config, answered), str(tmp_path / "other"))
