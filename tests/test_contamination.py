"""Items of benchmarks in training data: units, n-grams, planted contamination, every kind of source."""

import dataclasses
import gzip
import importlib
import json
import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_corpus import ENGLISH, WORDS, jsonl, prose
from tiny_models import write_jsonl
from tiny_stages import documents, stages

from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.evaluate.declarations import load_benchmark, load_task
from ctllm_jax.evaluate.texts import item_texts
from data_pipeline import batches
from data_pipeline.contamination import clean
from data_pipeline.contamination import run as contamination
from data_pipeline.contamination.index import MOST_ITEMS, build_index
from data_pipeline.contamination.items import Item, read_items
from data_pipeline.contamination.search import find
from data_pipeline.contamination.sources import shards_of
from data_pipeline.contamination.units import characters_of, units_of
from data_pipeline.dedup.folding import fold

QUESTION = "下列哪一项关于黄河中游水土流失的说法最符合当地治理的实际情况和长期规划"
OPTIONS = ["植树造林", "修建水库", "退耕还草", "坡地改成梯田"]


def config(source, benchmarks):
    values = importlib.import_module("configs.contamination").get_config().to_dict()
    values["benchmarks"] |= benchmarks
    return build(contamination.ContaminationConfig, values | source)


def hits_of(folder):
    return [json.loads(line) for line in (folder / "hits.jsonl").read_text().splitlines()]


def test_survivors_are_looked_through_few_long_ones_at_a_time():
    class Finder:
        def hits(self, texts):
            held.append(sum(len(text.text) for text in texts))
            return [[] for _ in texts]

    held = []
    book = {"id": "a", "source": "zh_books", "text": "书" * batches.CHARACTERS, "file": "a.txt", "line": 1}
    assert len(list(clean._with_hits(iter([book] * 3), Finder()))) == 3 and max(held) == batches.CHARACTERS


# ---- Units


def count(text):
    return len(units_of([text]).hash_U)


def test_a_unit_is_a_chinese_character_or_a_word():
    assert count("黄河流经九省区。") == 7
    assert count("The Yellow River, 5464 km long") == 6
    assert count("黄河5464公里 (Yellow River)") == 2 + 1 + 2 + 2
    assert count("ＮＡＳＡ：naïve café") == 3 and count("…！？ \n") == 0
    same = [
        units_of([text]).hash_U.tolist() for text in ("資料庫 DATA-base", "资料库，data base", "資料庫ｄａｔａ base")
    ]
    assert same[0] == same[1] == same[2]
    apart = [units_of([text]).hash_U.tolist() for text in ("ab c", "a bc", "abc")]
    assert len({tuple(hashes) for hashes in apart}) == 3


def test_units_are_found_again_in_the_text_as_it_is():
    text = "——ＡＢＣ　def: 黄河（ Huánghé ）长5464 km。"
    for padded in (text, "。" * 70_000 + text):
        cut = [padded[begin:end] for begin, end in zip(*characters_of(padded), strict=True)]
        assert cut == ["ＡＢＣ", "def", "黄", "河", "Huánghé", "长", "5464", "km"]
    assert [len(places) for places in characters_of("。")] == [0, 0]


def reference(items, text, n):
    """What a text covers of each item, by sets of strings."""

    def grams(units):
        return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]

    own, found = set(grams(units_of([text]).hash_U.tolist())), {}
    for number, item in enumerate(items):
        units = units_of([item.text]).hash_U.tolist()
        covered = np.zeros(len(units), bool)
        for place, gram in enumerate(grams(units)):
            if gram in own:
                covered[place : place + n] = True
        if covered.any():
            found[number] = covered.tolist()
    return found


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_the_search_finds_what_sets_of_ngrams_find(n):
    rng = random.Random(n)
    alphabet = ["水", "土", "a ", "b ", "ab", "。", "1"]

    def text(size):
        return "".join(rng.choice(alphabet) for _ in range(rng.randrange(size)))

    items = [Item("t", str(i), text(60)) for i in range(20)]
    texts = [text(200) for _ in range(20)] + [items[0].text * 3, "", items[3].text + "。" + items[4].text]
    index = build_index(items, n)
    for own, matches in zip(texts, find(texts, index), strict=True):
        assert {item: match.covered_U.tolist() for item, match in matches.items()} == reference(items, own, n)
        for match in matches.values():
            runs = "".join("x" if covered else " " for covered in match.covered_U).split()
            assert match.longest == max(map(len, runs))


def test_what_very_many_items_share_tells_none_of_them():
    opening = "请阅读下面这段材料然后回答后面的问题"
    for shared, found in ((MOST_ITEMS, True), (MOST_ITEMS + 1, False)):
        items = [Item("t", str(i), f"{opening}{i}") for i in range(shared)]
        assert bool(find([opening], build_index(items, 13))[0]) == found


AWKWARD = "黄河水資库かハ한글ก ab1é\u0301\u3099。、_㎏ﬁ①ⅫİςΣ🀄\ud800\x00\u200b\u3000"


@settings(max_examples=60, deadline=None)
@given(st.text(st.one_of(st.sampled_from(AWKWARD), st.characters())))
def test_units_are_those_of_the_rule_in_plain_python(text):
    units, inside = [], False
    for character in unicodedata.normalize("NFKC", text):
        points, _ = fold([character], [False])
        if not len(points):
            inside = False
        elif unicodedata.category(chr(points[0])) == "Lo":
            units.append(chr(points[0]))
            inside = False
        elif inside:
            units[-1] += chr(points[0])
        else:
            units.append(chr(points[0]))
            inside = True
    hashes = units_of([text]).hash_U.tolist()
    assert [units.index(unit) for unit in units] == [hashes.index(value) for value in hashes]


# ---- What items say


def test_an_items_text_has_what_is_its_own_and_not_its_tasks_wording(tmp_path):
    row = {"ctx": "C", "gold": 1, **dict(zip("ABCD", ("first", "second", "third", "fourth"), strict=True))}
    declarations = {
        "lettered": 'question = "Exam of {title}: {ctx}\\nA. {A}\\nB. {B}\\nAnswer: "\noptions = ["A", "B"]',
        "ending": 'question = "Go on: {ctx!t}"\ndelimiter = " "\noptions = ["{A}", "{B}"]',
        "whole": 'question = "Is this right? {option}"\ncontinuation = "Yes."\noptions = ["{A}.", "{B}."]',
    }
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "rows.jsonl", [row])
    said = {}
    for name, body in declarations.items():
        files = '[files]\nfolder = "folder"\nabout = "rows"\nsplits.test = ["rows.jsonl"]\n'
        path = tmp_path / f"{name}.toml"
        path.write_text(f'source = "test"\nkind = "ppl"\nsplit = "test"\ngold = "{{gold}}"\n{body}\n{files}')
        said[name] = dict(item_texts(load_benchmark(load_task(str(path)), str(tmp_path))))
    assert said == {"lettered": {"0": "C\nA. first\nB. second"}, "ending": {"0": "C second"}, "whole": {"0": "second."}}


# ---- Planted contamination


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """40 items, and documents that hold some of them: (items' file, documents' file, {document: item})."""
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(3)
    items = [{"id": f"q{i}", "text": f"{prose(rng, 20)}\nA. {WORDS[i]}\nB. {WORDS[i + 1]}"} for i in range(39)]
    items += [{"id": "english", "text": " ".join(ENGLISH.split()[3:33])}]
    texts, truth = {f"clean{i}": prose(rng) for i in range(150)}, {}
    copies = {
        "as it is": lambda text: text,
        "form": lambda text: text.replace("，", " , ").replace("\n", "").translate({ord("A"): "Ａ", ord("B"): "ｂ"}),
        "an edit": lambda text: text[:20] + "某" + text[21:],
        "three quarters": lambda text: text[: len(text) * 3 // 4],
    }
    for number, item in enumerate(items):
        kind = list(copies)[number % len(copies)]
        texts[f"{kind} {number}"] = f"{prose(rng, 60)}。{copies[kind](item['text'])}。{prose(rng, 60)}"
        truth[f"{kind} {number}"] = item["id"]
    write_jsonl(folder / "items.jsonl", items)
    jsonl(folder / "documents.jsonl", [{"id": name, "text": text} for name, text in texts.items()])
    return folder / "items.jsonl", folder / "documents.jsonl", truth


def test_planted_items_are_found_and_nothing_else(planted, tmp_path):
    items, texts, truth = planted
    wanted = {"items": [str(items)]}
    result = contamination.run(config({"documents": [str(texts)]}, wanted), str(tmp_path / "out"))
    found = hits_of(tmp_path / "out")
    assert {hit["document"]: hit["item"] for hit in found} == truth and len(found) == len(truth)
    entry = {"items": 40, "too_short": 0, "seen": 40, "documents": 40}
    looked_through = {"texts": 190, "unreadable": 0, "damaged_files": []}
    assert result == {**looked_through, "documents": 40, "hits": 40, "tasks": {"items": entry}}
    said = {record["id"]: record["text"] for record in map(json.loads, texts.read_text().splitlines())}
    for hit in found:
        assert said[hit["document"]][hit["begin"] : hit["end"]].startswith(hit["found"])
        assert hit["file"] == str(texts) and 0.5 <= hit["coverage"] <= 1 and hit["longest"] <= hit["units"]
        if hit["document"].startswith(("as it is", "form")):
            assert hit["coverage"] == 1 and hit["longest"] == hit["units"]
    assert sum(hit["coverage"] < 1 for hit in found) == 20
    before = (tmp_path / "out" / "hits.jsonl").read_bytes()
    assert contamination.run(config({"documents": [str(texts)]}, wanted), str(tmp_path / "out")) == result
    assert (tmp_path / "out" / "hits.jsonl").read_bytes() == before and not (tmp_path / "out" / "work").exists()


def test_a_shard_that_was_searched_is_not_read_again(planted, tmp_path):
    items, texts, _ = planted
    settings = config({"documents": [str(texts)]}, {"items": [str(items)]})
    (shard,), _ = shards_of(settings)
    contamination.make_index(read_items(settings.benchmarks)[0], 13, tmp_path)
    contamination.search([shard], settings, tmp_path)
    gone = dataclasses.replace(shard, file="/nowhere")
    contamination.search([gone, dataclasses.replace(gone, index=1)], settings, tmp_path)
    kept, read = (json.loads(contamination._counts(tmp_path, index).read_text()) for index in range(2))
    assert kept["texts"] and not kept["unreadable"]
    assert read == {"texts": 0, "unreadable": 1, "damage": "/nowhere: no such file (after 0 records)"}  # looked for


def test_what_could_not_be_looked_through_is_said_and_kept(planted, tmp_path, capsys):
    items, texts, _ = planted
    packed = gzip.compress(texts.read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    jsonl(tmp_path / "bad.jsonl", [b"{", {"id": "no text"}, {"id": "a", "text": "文"}])
    settings = config({"documents": [f"{tmp_path}/*.jsonl*"]}, {"items": [str(items)]})
    result = contamination.run(settings, str(tmp_path / "out"))
    (entry,) = result["damaged_files"]
    assert entry["file"] == f"{tmp_path}/cut.jsonl.gz" and "EOFError" in entry["damage"]
    assert result["unreadable"] == 3 and 1 < result["texts"] < 190
    told = capsys.readouterr().err
    assert f"cut.jsonl.gz is damaged: {entry['damage']}; read up to there" in told
    assert "contamination: 3 records hold no text that can be read" in told


def test_coverage_decides_from_its_threshold_on(tmp_path):
    item = "".join(WORDS[:10])  # 20 characters
    write_jsonl(tmp_path / "items.jsonl", [{"text": item}])
    for shared, share in ((13, 0.65), (12, None), (16, 0.8)):
        jsonl(tmp_path / "documents.jsonl", [{"id": "d", "text": f"某某{item[:shared]}某某"}])
        for least, hit in ((0, share), (share or 0, share), ((share or 0) + 0.0001, None)):
            out = tmp_path / f"{shared} {least}"
            wanted = {"items": [str(tmp_path / "items.jsonl")], "min_coverage": least}
            contamination.run(config({"documents": [str(tmp_path / "documents.jsonl")]}, wanted), str(out))
            assert [found["coverage"] for found in hits_of(out)] == ([] if hit is None else [hit])


def test_conversations_pairs_and_what_is_no_record(tmp_path):
    asked = f"{QUESTION}？" + "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", OPTIONS, strict=True))
    write_jsonl(tmp_path / "items.jsonl", [{"id": "q", "text": asked}])
    records = [
        {"id": "chat", "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "D"}]},
        {"instruction": "写一首诗", "output": "好的。"},
        {"id": "pair", "prompt": "提问", "chosen": f"题目：{asked}", "rejected": "不知道"},
        b"{",
        {"id": "strange", "messages": [7]},
    ]
    path = jsonl(tmp_path / "records.jsonl", records)
    out = tmp_path / "out"
    wanted = {"items": [str(tmp_path / "items.jsonl")]}
    result = contamination.run(config({"records": [str(path)]}, wanted), str(out))
    assert [(hit["document"], hit["line"], hit["coverage"]) for hit in hits_of(out)] == [("chat", 1, 1), ("pair", 3, 1)]
    assert (result["texts"], result["unreadable"]) == (3, 2)


def test_a_corpus_and_the_token_store_made_of_it_tell_the_same(tmp_path):
    """Documents of the store are cut into rows of 64 tokens; what an item has in several rows counts together."""
    root = stages()
    texts = {name: text for own in documents(root).values() for name, text in own.items()}
    chosen = sorted(texts, key=lambda name: len(texts[name]))[-12:]
    write_jsonl(tmp_path / "items.jsonl", [{"id": name, "text": texts[name]} for name in chosen])
    found = {}
    for kind, place in (("corpus", "corpus"), ("store", "pretrain")):
        out = tmp_path / kind
        wanted = {"items": [str(tmp_path / "items.jsonl")]}
        contamination.run(config({kind: str(root / place)}, wanted), str(out))
        found[kind] = {hit["document"]: hit for hit in hits_of(out) if hit["document"] == hit["item"]}
        assert set(found[kind]) == set(chosen)
    assert all(hit["coverage"] == 1 for hit in found["corpus"].values())
    cut = [hit["coverage"] for hit in found["store"].values()]
    assert min(cut) > 0.8 and min(cut) < 1  # n-grams across a cut are lost
    assert {hit["split"] for hit in found["store"].values()} <= {"train", "validation"}


def test_an_item_may_be_a_list_of_texts(tmp_path):
    turns = [QUESTION, "".join(OPTIONS)]
    write_jsonl(tmp_path / "items.jsonl", [{"id": 7, "turns": turns}, {"turns": turns[:1]}])
    wanted = config({"corpus": "x"}, {"items": [str(tmp_path / "items.jsonl")], "field": "turns"}).benchmarks
    found = read_items(wanted)[0]
    assert [(item.id, item.text) for item in found] == [("7", "\n".join(turns)), ("2", QUESTION)]


@pytest.mark.parametrize(
    ("source", "wanted", "message"),
    [
        ({}, {"items": ["x"]}, "exactly one of"),
        ({"corpus": "a", "store": "b"}, {"items": ["x"]}, "exactly one of"),
        ({"corpus": "a"}, {"tasks": ["ceval_ppl"]}, "name the folder"),
        ({"corpus": "a"}, {"min_coverage": 2}, "min_coverage"),
        ({"corpus": "a"}, {"ngram": 0}, "ngram"),
        ({"corpus": "a"}, {}, "no items to look for"),
        ({"corpus": "/nowhere"}, {"items": ["ITEMS"]}, "not a finished folder"),
        ({"corpus": "a"}, {"items": ["ITEMS"], "field": "ask"}, "no text under 'ask'"),
    ],
)
def test_what_the_user_got_wrong_is_said(source, wanted, message, tmp_path):
    write_jsonl(tmp_path / "items.jsonl", [{"text": QUESTION}])
    wanted = wanted | {"items": [str(tmp_path / "items.jsonl") if i == "ITEMS" else i for i in wanted.get("items", [])]}
    with pytest.raises(UserError, match=message):
        contamination.run(config(source, wanted), str(tmp_path / "out"))
