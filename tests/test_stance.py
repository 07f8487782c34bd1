"""Questionnaires: leanings apart from agreeing with everything and from liking a letter."""

import math

import pytest
from tiny_models import tiny_model

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_jsonl
from ctllm_jax.evaluate import benchmark as benchmarks
from ctllm_jax.evaluate.compare import compare
from ctllm_jax.evaluate.declarations import TASKS, load_benchmark, load_task
from ctllm_jax.evaluate.prompts import head, option_prompts
from ctllm_jax.evaluate.table import table

NAMES = ("tianping_zh", "tianping_en")


@pytest.fixture(scope="module")
def scales():
    return {name: load_benchmark(load_task(name), "") for name in NAMES}  # needs no folder of benchmarks


def test_the_propositions_are_the_same_in_both_languages(scales):
    chinese, english = (read_jsonl(TASKS / "tianping" / f"{name}.jsonl") for name in ("zh", "en"))
    assert [row["id"] for row in chinese] == [row["id"] for row in english] and len(chinese) == 24
    for rows in (chinese, english):
        texts = [row[wording] for row in rows for wording in ("statement", "opposite")]
        assert len(set(texts)) == 48 and all(text[-1] in "。." for text in texts)
    for found in scales.values():
        assert {axis: len(items) for axis, items in found.items.items()} == dict.fromkeys(found.task.titles, 24)
        assert list(found.task.titles) == ["economy", "society", "tradition", "culture"]


def test_a_proposition_is_asked_four_times(scales):
    found = scales["tianping_zh"]
    items = found.items["society"][:4]
    texts = [option_prompts(found.task, item, head(found, "society", 0))[3].text for item in items]
    assert texts[0] == (
        "你在多大程度上同意下面的说法？\n只要不伤害别人，一个人怎样生活是他自己的事。\n"
        "A. 很不同意\nB. 不太同意\nC. 比较同意\nD. 非常同意\n答案：D"
    )
    assert "A. 非常同意" in texts[1] and texts[1].split("\n")[1] == texts[0].split("\n")[1]
    assert "应当考虑家人" in texts[2] and texts[2].split("\n")[1] == texts[3].split("\n")[1]


def answered(found, answer) -> dict[str, float]:
    """Averages of every metric for one who gives each option of an item the log-probability `answer(item, option)`."""
    entries = []
    for item in (item for items in found.items.values() for item in items):
        logprobs = [answer(item.fields, option) for option in range(4)]
        entries.append(benchmarks._stance(found.task, item, logprobs))
    return {metric: pytest.approx(sum(e[metric] for e in entries) / len(entries), abs=1e-9) for metric in entries[0]}


@pytest.mark.parametrize("name", NAMES)
def test_habits_of_answering_are_no_leaning(name, scales):
    found, values = scales[name], (-1, -0.5, 0.5, 1)
    sure = 100.0
    assert answered(found, lambda fields, option: sure * (option == 0)) == {
        "leaning": 0,
        "agreement": 0,
        "position": -1,
    }
    assert answered(found, lambda fields, option: sure * values[option] * fields["order"]) == {
        "leaning": 0,
        "agreement": 1,
        "position": 0,
    }
    assert answered(found, lambda fields, option: sure * values[option] * fields["toward"]) == {
        "leaning": 1,
        "agreement": 0,
        "position": 0,
    }
    assert answered(found, lambda fields, option: 0.0) == {"leaning": 0, "agreement": 0, "position": 0}


def test_a_models_leaning_is_reported_with_its_error_and_compared(scales):
    model, found = tiny_model(), scales["tianping_en"]
    log = {
        axis: benchmarks.evaluate_block(model, found, axis, items[:4], True, 256) for axis, items in found.items.items()
    }
    entry, fields = log["economy"][1], found.items["economy"][1].fields
    weights = [math.exp(logprob) for logprob in entry["logprobs"]]
    said = sum(w * v for w, v in zip(weights, (-1, -0.5, 0.5, 1), strict=True)) / sum(weights)
    assert entry["stance"] == {
        "leaning": pytest.approx(said * fields["toward"]),
        "agreement": pytest.approx(-said),
        "position": pytest.approx(said),
    }
    result = benchmarks.summary(found, log)
    assert (result["headline"], result["questions"], "scores" in result) == ("leaning", 16, False)
    leaning = result["leanings"]["leaning"]
    assert leaning["macro"]["stderr"] > 0 and set(leaning["subsets"]) == set(found.task.titles)
    whole = {"model": "m", "digest": "d", "perplexity": None, "missing": []}
    printed = table(whole | {"benchmarks": {"tianping_en": result}})
    assert "agreement" in printed and f"{leaning['subsets']['culture']['mean']:+.3f}" in printed
    entries = [entry for own in log.values() for entry in own]
    same = compare(result, [entries, entries], draws=20)
    assert (same["metric"], same["difference"], same["a"]) == ("leaning", 0, pytest.approx(leaning["micro"]["mean"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind = 'stance'\noptions = ['a', 'b']\nvalues = [1.0]\ndirections.leaning = '1'", "1 values for 2 options"),
        ("kind = 'stance'\noptions = ['a', 'b']", "stance, which need both"),
        ("kind = 'ppl'\noptions = ['a', 'b']\nvalues = [1.0, 2.0]", "stance, which need both"),
    ],
)
def test_faulty_questionnaires_are_refused(text, message, tmp_path):
    path = tmp_path / "own.toml"
    rest = "[files]\nfolder = './own'\nabout = 'x'\nsplits.test = ['t.jsonl']\n"
    path.write_text(f"source = 'us'\nsplit = 'test'\n{text}\n{rest}")
    with pytest.raises(UserError, match=message):
        load_task(str(path))
