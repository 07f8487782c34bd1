"""What a corpus tells of itself afterwards: signals in columns, thresholds swept, documents explained, the page."""

import dataclasses
import gzip
import importlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_corpus import WORDS, examples, jsonl, make_inputs, prose, rejected
from test_corpus import config as corpus_config
from test_optional_filters import MODEL
from tiny_models import write_jsonl

from ctllm_jax.common import html
from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from data_pipeline import corpus, explain, sweep
from data_pipeline.filters.quality import QualityConfig
from data_pipeline.filters.rules import broken
from data_pipeline.shards import Layout
from data_pipeline.signals import bin_edge, bin_of, histogram, signal_files

HOSTILE = '<script>alert("x")</script>\x1b[31m\u202e'
LATER = {"duplicate_id", "duplicate_exact", "duplicate_near", "contaminated"}  # no rules of the filters
EVIL = '"><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A corpus with duplicates, a benchmark's item, dropped lines, a model of quality and hostile documents: (folder,
    result, config)."""
    folder, random = tmp_path_factory.mktemp("report"), np.random.default_rng(11)
    inputs = make_inputs(folder)
    sentence, item = "".join(WORDS[:12]), prose(random, 30)
    hostile = [
        {"id": "hostile", "url": f"http://x/{EVIL}", "text": HOSTILE + prose(random)},
        {"id": "hostile reject", "text": HOSTILE},
        {"id": "lines", "text": f"{sentence}。{prose(random)}。{sentence}。"},
        {"id": "seen", "text": f"{prose(random)}。{item}"},
        {"id": "script copy", "text": HOSTILE + prose(np.random.default_rng(5)) + "完。"},
        {"id": EVIL, "text": HOSTILE + prose(np.random.default_rng(5)) + "终。"},
        {"id": "script copy 3", "text": HOSTILE + prose(np.random.default_rng(5)) + "了。"},
    ]
    inputs.append(jsonl(folder / "5.jsonl", hostile))
    write_jsonl(folder / "items.jsonl", [{"id": "the item", "text": item}])
    settings = corpus_config(inputs)
    settings = dataclasses.replace(
        settings,
        benchmarks=dataclasses.replace(settings.benchmarks, items=(str(folder / "items.jsonl"),)),
        dedup=dataclasses.replace(settings.dedup, similar_lines="paper"),
        filters=dataclasses.replace(settings.filters, quality=QualityConfig(MODEL, "zh", 0.001, ("zh_cc",), False)),
    )
    return folder / "corpus", corpus.run(settings, str(folder / "corpus")), settings


# ---- Signals


def rows(folder):
    """Every well-formed document's signals: {(file, line): row}."""
    found = {}
    for files in signal_files(str(folder)).values():
        for path in files:
            file = pq.read_schema(path).metadata[b"file"].decode()
            found |= {(file, row["line"]): row for row in pq.read_table(path).to_pylist()}
    return found


def test_every_well_formed_document_has_its_signals_in_columns(built):
    folder, result, _ = built
    found = rows(folder)
    assert len(found) == result["totals"]["well_formed"]
    told = {(record["file"], record["line"]): record for record in rejected(folder) if "signals" in record}
    assert len(told) > 5
    for place, record in told.items():
        row = found[place]
        assert row["id"] == record["id"]
        assert {name: row[name] for name in record["signals"]} == record["signals"]
        broken_rules = [r["rule"] for r in record["reasons"] if r["rule"] not in LATER]
        assert [rule for rule in row["failed"].split(",") if rule] == broken_rules
    for subset in ("zh_cc", "code"):
        for identity, document in examples(folder, subset).items():
            signals = json.loads(document["signals"])
            assert any(
                row["id"] == identity and row["failed"] == "" and {n: row[n] for n in signals} == signals
                for row in found.values()
            )


@pytest.mark.parametrize("number", [*range(0, 101, 7), 100, 101, 119, 120, 121, 240])
def test_a_value_falls_between_the_edges_of_its_bin(number):
    edge, following = bin_edge(number), bin_edge(number + 1)
    for value, where in ((edge, number), ((edge + following) / 2, number), (following, number + 1)):
        assert histogram(np.array([value, value])) == {str(where): 2}
    assert bin_of(edge) == pytest.approx(number)


def test_histograms_count_every_document(built):
    report = json.loads((built[0] / "report.json").read_text())
    for subset, measures in report["histograms"].items():
        assert {
            sum(measures[name].values()) for name in ("characters", "digits", "punctuation") if name in measures
        } == {report["subsets"][subset]["well_formed"]}


# ---- Sweep


def test_swept_shares_are_those_of_judging_again(built):
    folder, result, settings = built
    asked = ("characters.min=1,50,200", "digits.max=0.01,0.3", "han.min=0.9", "language_score.min=0.4")
    asked += ("quality_score.min=0.9",)
    found = sweep.run(sweep.SweepConfig(asked, False), str(folder))
    own = [row for row in rows(folder).values() if "han" in row]
    limits = settings.filters.rules["chinese"]
    assert found["zh_cc"]["documents"] == len(own)
    for rule in found["zh_cc"]["rules"]:
        for share in rule["thresholds"]:
            judged = [_judge(row, rule["measure"], rule["bound"], share["threshold"], limits) for row in own]
            alone, together = (round(sum(good) / len(own), 6) for good in zip(*judged, strict=True))
            assert (share["alone"], share["together"]) == (alone, together), (rule, share)
    assert {rule["measure"] for rule in found["code"]["rules"]} == {"characters"}


def _judge(row, measure, bound, threshold, limits):
    value = row[measure]
    good = value is None or (value >= threshold if bound == "min" else value <= threshold)
    failed = set(filter(None, row["failed"].split(",")))
    rest = {name: limit for name, limit in limits.items() if name in failed - {measure}}
    if measure in limits:
        rest[measure] = dataclasses.replace(limits[measure], **{bound: None})
    others = not broken(row, rest) and not {rule for rule in failed - {measure} if rule not in limits}
    return good, good and others


def test_without_rules_every_limit_is_swept_and_now_is_what_was(built, capsys):
    folder, result, settings = built
    found = sweep.run(sweep.SweepConfig((), False), str(folder))
    told = capsys.readouterr().out
    values = result["subsets"]["zh_cc"]
    for rule in found["zh_cc"]["rules"]:
        (now,) = [share for share in rule["thresholds"] if share["threshold"] == rule["now"]]
        assert now["together"] == round(values["passed_language"] / values["well_formed"], 6)
    limits = settings.filters.rules["chinese"].values()
    bounds = sum(bound is not None for limit in limits for bound in dataclasses.astuple(limit))
    assert len(found["zh_cc"]["rules"]) == bounds + 2  # and the scores of language and quality
    assert "*50: " in told and told.startswith("zh_cc: ")
    sweep.run(sweep.SweepConfig(("han.min=0.5",), True), str(folder))
    assert json.loads(capsys.readouterr().out.splitlines()[0])["measure"] == "han"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("top_2gram=0.1", "not written as"),
        ("top_2gram.most=0.1", "not written as"),
        ("top_2gram.max=a", "not written as"),
        ("top_2gram.max=nan", "not written as"),
        ("top_7gram.max=0.1", "no subset"),
    ],
)
def test_rules_that_cannot_be_swept_are_named(built, rule, message):
    with pytest.raises(UserError, match=message):
        sweep.run(sweep.SweepConfig((rule,), False), str(built[0]))


# ---- Explain


def story(folder, identity, **changes):
    values = importlib.import_module("configs.explain").get_config().to_dict()
    return explain.run(build(explain.ExplainConfig, values | {"documents": [identity], **changes}), str(folder))[
        identity
    ]


def test_a_kept_documents_story(built, capsys):
    folder = built[0]
    (told,) = story(folder, "doc3")
    assert (told["outcome"], told["source"], told["line"], told["file"][-7:]) == ("kept", "zh_cc", 4, "0.jsonl")
    assert told["text"] == examples(folder, "zh_cc")["doc3"]["text"] and told["url"] == "http://x/doc3"
    assert [(copy["id"], copy["kind"]) for copy in told["repeated_by"]] == [("near", "near")]
    rules = {rule["rule"]: rule for rule in told["rules"]}
    assert (rules["characters"]["min"], rules["characters"]["broken"]) == (50, False)
    assert rules["characters"]["value"] == len(told["text"]) and "max" not in rules["han"]
    assert (rules["quality_score"]["min"], rules["quality_score"]["broken"]) == (0.001, False)
    assert told["reasons"] == [] and told["repeats"] is None
    out = capsys.readouterr().out
    assert out.startswith("doc3: kept\n") and "repeated by near (near, similarity 0." in out


def test_stories_of_what_went(built):
    folder = built[0]
    (short,) = story(folder, "short")
    assert (short["outcome"], short["text"]) == ("rejected", "太短。")
    assert {"rule": "characters", "value": 3, "broken": True, "min": 50, "max": 10_000_000} in short["rules"]
    (near,) = story(folder, "near")
    assert near["outcome"] == "duplicate" and near["repeats"]["duplicate_of"] == "doc3" and near["repeated_by"] == []
    first, second = sorted(story(folder, "doc5"), key=lambda told: told["outcome"])
    assert (first["outcome"], first["repeats"]["kind"], second["outcome"]) == ("duplicate", "id", "kept")
    (seen,) = story(folder, "seen")
    assert seen["outcome"] == "contaminated" and [hit["item"] for hit in seen["benchmarks"]] == ["the item"]
    (lines,) = story(folder, "lines")
    assert lines["outcome"] == "kept" and lines["dropped_lines"][0]["sentence"] == "".join(WORDS[:12]) + "。"


def test_json_is_a_line_a_story_and_text_steers_no_terminal(built, capsys):
    folder = built[0]
    (told,) = story(folder, "hostile", json=True)
    assert json.loads(capsys.readouterr().out) == told and HOSTILE in told["text"]
    story(folder, "hostile")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "alert" in out


def test_what_cannot_be_explained_is_said(built, tmp_path):
    with pytest.raises(UserError, match="no well-formed document is called 'nobody'"):
        story(built[0], "nobody")
    with pytest.raises(UserError, match="not a finished folder"):
        story(tmp_path, "doc3")
    with pytest.raises(UserError, match="name an id"):
        build(explain.ExplainConfig, {"documents": [], "text_chars": 1, "json": False})


# ---- The page


def test_the_page_shows_all_and_escapes_all(built):
    page = (built[0] / "report.html").read_text()
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert html.quote(EVIL)[5:-6] in page
    for heading in ("Beside the paper", "Signals", "Kept documents", "Rejected documents", "Duplicates", "Benchmarks"):
        assert f"{heading}</h" in page
    for share in (38, 26, 19, 15):
        assert f">{share}</td>" in page
    assert "characters (min 50, max 1e+07): " in page and ">min 50</text>" in page
    assert "quality_score (min 0.001): " in page
    assert "script copy: stays" in page and "near duplicate, similarity 0." in page and "<mark>" in page


def test_the_funnel_beside_the_papers_is_of_chinese_documents(built):
    report = json.loads((built[0] / "report.json").read_text())
    funnel = dict(report["subsets"]["zh_cc"]["funnel"])
    page = (built[0] / "report.html").read_text()
    table = page[page.index("Beside the paper") : page.index("Why documents were rejected")]
    assert "<td>unknown</td>" in page and "unknown" not in table and ">en<" not in table
    for stage in ("language", "exact dedup", "near dedup"):
        assert f">{html._text(round(100 * funnel[stage] / funnel['read'], 1))}</td>" in table


def test_clusters_show_what_a_removed_document_repeats(built):
    found = json.loads((built[0] / "report.json").read_text())["duplicates"]
    told = {(c["kind"], c["first"]["id"], *(copy["id"] for copy in c["copies"])) for c in found}
    # near ones of one file, and as no exact ones are, exact ones of two
    assert told == {("near", "script copy", EVIL, "script copy 3"), ("exact", "doc7", "exact")}
    near = next(cluster for cluster in found if cluster["kind"] == "near")
    assert all(copy["excerpt"] != near["first"]["excerpt"] for copy in near["copies"])
    assert [copy["similarity"] for copy in near["copies"]] == sorted(copy["similarity"] for copy in near["copies"])


def test_what_holds_an_item_of_a_benchmark_is_left_out_and_counted(built):
    folder, result, _ = built
    with gzip.open(Layout(str(folder)).rejected(5, "benchmarks")) as lines:
        (record,) = map(json.loads, lines)
    (reason,) = record["reasons"]
    assert (record["id"], reason["rule"], reason["value"], reason["item"]) == ("seen", "contaminated", 1, "the item")
    kept = [document for subset in ("zh_cc", "en", "code") for document in examples(folder, subset).values()]
    totals = result["totals"]
    assert (len(kept), sum(len(document["text"]) for document in kept)) == (totals["kept"], totals["characters"])
    assert totals["contaminated"] == 1 and "seen" not in {document["id"] for document in kept}
    assert totals["funnel"][-2:] == [["near dedup", totals["kept"] + 1], ["no benchmark", totals["kept"]]]
    assert (folder / "hits.jsonl").read_text().count("\n") == result["benchmarks"]["hits"] == 1
