"""`ctllm corpus` end to end on Beam and TFDS: nothing lost, duplicates named, same bytes however it ran."""

import dataclasses
import gzip
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from data_pipeline import corpus
from data_pipeline.dedup.store import open_hashes
from data_pipeline.documents import find_inputs
from data_pipeline.filters.urls import UrlConfig
from data_pipeline.runner import BeamConfig, make_runner

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data" / "corpus"
WORDS = (
    "我们 他们 学生 老师 城市 农村 河流 山脉 历史 文化 经济 发展 研究 方法 "
    "问题 答案 时间 空间 技术 社会 人民 国家 世界 和平 环境 保护 水利 工程 "
    "粮食 生产 市场 价格 政府 政策 教育 医院 医生 病人 健康 食品 安全 交通 "
    "铁路 公路 飞机 机场 船舶 港口 贸易 银行 货币 投资 公司 员工 管理 质量 "
    "标准 产品 设计 艺术 音乐 电影 文学 小说 诗歌 语言 文字 书籍 报纸 新闻 "
    "记者 调查 统计 数据 模型 计算 网络 电脑 手机 软件 硬件 能源 电力 石油 "
    "煤炭 太阳 月亮 星球 宇宙 科学 实验 理论 物理 化学 生物 认为 发现 提出 "
    "解决 分析 比较 说明 表示 需要 可以 应该 能够 已经 正在 开始 继续 完成 "
    "增加 减少 改变 提高 支持 反对 选择 "
).split()
ENGLISH = (
    "The old mill stood by the river for two hundred years, and the people of the valley brought "
    "their corn to it. In summer the wheel turned slowly because there was little water. After heavy "
    "rain it ran so fast that the miller had to close the gate. When the railway came, cheap flour "
    "from the coast arrived with every train, and nobody needed a small mill any more. Today it is a "
    "museum where children can grind a handful of wheat. "
)


def config(inputs, **changes):
    values = importlib.import_module("configs.corpus").get_config().to_dict()
    return build(corpus.CorpusConfig, values | {"input": [str(path) for path in inputs]} | changes)


def prose(random, words=120):
    """Text that passes every rule: random common words, a mark now and then."""
    marks = random.choice(list("，。，；。！"), words)
    return "".join(
        word + (mark if i % 6 == 5 else "")
        for i, (word, mark) in enumerate(zip(random.choice(WORDS, words), marks, strict=True))
    )


def jsonl(path, records):
    lines = [item if isinstance(item, bytes) else json.dumps(item, ensure_ascii=False).encode() for item in records]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def make_inputs(folder):
    """Three good files with planted duplicates and bad records, one cut short, one empty."""
    random = np.random.default_rng(0)
    texts = {f"doc{i}": prose(random) for i in range(60)}
    records = [{"id": name, "url": f"http://x/{name}", "text": text, "score": 1} for name, text in texts.items()]
    edited = texts["doc3"].replace("学生", "校长", 1) + "结束。"
    code = "\n".join(f"def f{i}(x):\n    return x + {i}" for i in range(5))
    first = [*records[:30], b"not json", {"id": "short", "text": "太短。"}]
    second = [
        *records[30:],
        {"id": "exact", "text": texts["doc7"].replace("。", " ！\n").replace("，", ",")},
        {"id": "near", "text": edited},
        {"id": "doc5", "text": prose(random)},
        {
            "id": "foreign",
            "text": "The river rises in the mountains and flows through nine provinces to the sea. " * 3,
        },
    ]
    third = [
        {"id": "code", "source": "code", "text": code},
        {"id": "../../../evil", "source": "en", "text": ENGLISH},
        [1],
    ]
    inputs = [
        jsonl(folder / "0.jsonl", first),
        jsonl(folder / "1.jsonl.gz", second),
        jsonl(folder / "2.jsonl", third),
    ]
    cut = jsonl(folder / "3.jsonl.gz", [{"text": prose(random)} for _ in range(40)])
    cut.write_bytes(cut.read_bytes()[:-3000])
    (folder / "4.jsonl").write_bytes(b"")
    return [*inputs, cut, folder / "4.jsonl"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def built(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "corpus"
    return workdir, corpus.run(config(inputs), str(workdir))


def contents(workdir):
    """Every file below a finished work folder; the manifest without its timing."""
    found = {str(p.relative_to(workdir)): p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    found["manifest.json"] = json.loads(found["manifest.json"]) | {"seconds": None}
    return found


def rejected(workdir):
    lines = [line for path in sorted((workdir / "rejected").iterdir()) for line in gzip.open(path)]
    return [json.loads(line) for line in lines]


def examples(workdir, subset):
    import tensorflow_datasets as tfds

    source = tfds.load(f"map_cc/{subset}", data_dir=str(workdir), split="train")
    return {row["id"].decode(): {k: v.decode() for k, v in row.items()} for row in tfds.as_numpy(source)}


def test_every_record_is_kept_or_rejected(built):
    workdir, result = built
    totals, found = result["totals"], rejected(workdir)
    assert totals["read"] == totals["kept"] + len(found)
    assert totals["malformed"] == {"invalid_json": 1, "not_an_object": 1}
    kept = {name: len(examples(workdir, name)) for name in ("zh_cc", "en", "code")}
    assert kept == {name: result["subsets"][name]["kept"] for name in kept}
    assert not (workdir / "map_cc" / "zh_books").exists()
    with pytest.raises(UserError, match="no such subset"):
        examples(workdir, "zh_books")


def test_planted_duplicates_name_what_they_repeat(built):
    found = {record["id"]: record for record in rejected(built[0]) if "duplicate_of" in record}
    assert set(found) == {"exact", "near", "doc5"}
    assert (found["exact"]["kind"], found["exact"]["duplicate_of"], found["exact"]["similarity"]) == (
        "exact",
        "doc7",
        1,
    )
    assert (found["near"]["kind"], found["near"]["duplicate_of"]) == ("near", "doc3")
    assert 0.7 <= found["near"]["similarity"] < 1
    assert (found["doc5"]["kind"], found["doc5"]["file"][-10:]) == ("id", "1.jsonl.gz")
    totals = built[1]["totals"]
    assert [totals[f"duplicate_{kind}"] for kind in ("id", "exact", "near")] == [1, 1, 1]


def test_rejections_carry_reasons_values_thresholds_and_signals(built):
    found = {record.get("id"): record for record in rejected(built[0])}
    reason = next(r for r in found["short"]["reasons"] if r["rule"] == "characters")
    assert (reason["value"], reason["threshold"]) == (3, 50) and found["short"]["text"] == "太短。"
    assert {r["rule"] for r in found["foreign"]["reasons"]} >= {"language_label"}
    assert found["near"]["signals"]["language"] == "zh"
    bad = next(r for r in rejected(built[0]) if r["reasons"][0]["rule"] == "invalid_json")
    assert bad["line"] == 31 and bad["file"].endswith("0.jsonl") and bad["excerpt"] == "not json"


def test_tfds_reads_documents_as_they_were(built, inputs):
    import tensorflow_datasets as tfds

    raw = json.loads(inputs[0].read_text().splitlines()[4])
    row = examples(built[0], "zh_cc")["doc4"]
    assert (row["text"], row["url"], row["source"]) == (raw["text"], raw["url"], "zh_cc")
    assert json.loads(row["meta"]) == {"score": 1} and json.loads(row["signals"])["language"] == "zh"
    builder = tfds.builder_from_directory(str(built[0] / "map_cc" / "zh_cc" / "1.0.0"))
    assert builder.info.splits["train"].num_examples == built[1]["subsets"]["zh_cc"]["kept"]


def test_an_index_is_merged_in_memory_that_is_bounded(tmp_path, monkeypatch):
    from data_pipeline import map_cc

    random = np.random.default_rng(0)
    entries = np.zeros(1000, map_cc._ENTRY)
    entries["hash"] = random.integers(0, 1 << 64, 1000, np.uint64, endpoint=False)
    entries["hash"][::9] = [0, (1 << 64) - 1] * 56  # equal ones, and the ends
    entries["shard"], entries["offset"] = np.arange(1000) // 300, np.arange(1000)
    parts = []
    for number in range(4):
        part = entries[entries["shard"] == number]
        parts.append(tmp_path / f"{number}.npy")
        np.save(parts[-1], part[np.argsort(part["hash"], kind="stable")])
    for size in (7, 1 << 20):
        monkeypatch.setattr(map_cc, "_MERGED", size)
        map_cc._merge(parts, tmp_path / "index.npy")
        assert np.array_equal(np.load(tmp_path / "index.npy"), np.sort(entries, order=["hash", "shard", "offset"]))


def test_documents_are_found_by_id(built):
    from data_pipeline import map_cc

    folder = built[0] / "map_cc"
    for name in ("doc0", "doc59", "3:1", "code", "../../../evil"):
        found = map_cc.find(folder, name)
        assert found.id == name and found.signals["characters"] > 0
    assert map_cc.find(folder / "zh_cc", "near") is None
    assert not list(folder.parents[2].rglob("*evil*"))  # an id is never a path
    with pytest.raises(UserError, match="no MAP-CC subset"):
        map_cc.find(built[0] / "rejected", "doc0")


def test_damaged_and_empty_files_are_reported(built, capsys, tmp_path, inputs):
    result = built[1]
    (damaged,) = result["damaged_files"]
    assert damaged["file"].endswith("3.jsonl.gz") and damaged["records"] == result["subsets"]["zh_cc"]["read"] - 65
    assert [pathlib.Path(path).name for path in result["empty_files"]] == ["4.jsonl"]


def test_the_report_holds_funnel_and_examples(built):
    report = json.loads((built[0] / "report.json").read_text())
    for values in (report["totals"], *report["subsets"].values()):
        left = [count for _, count in values["funnel"]]
        assert left == sorted(left, reverse=True)
        assert (left[0], left[-1]) == (values["read"], values["kept"])
    example = report["examples"]["characters"][0]
    assert (example["id"], example["excerpt"], example["threshold"]) == ("short", "太短。", 50)
    assert all(len(found) <= 3 for found in report["examples"].values())
    assert "duplicate_near" in (built[0] / "report.html").read_text()


def test_a_finished_run_does_nothing_again_and_leaves_no_temporary_files(built, inputs, monkeypatch):
    before = contents(built[0])
    monkeypatch.setattr(corpus, "_filter", lambda *_: pytest.fail("filtered again"))
    assert corpus.run(config(inputs), str(built[0])) == built[1]
    assert contents(built[0]) == before
    assert not [name for name in before if name.startswith("work/") or ".tmp" in name]


def test_another_configuration_is_refused_in_the_same_folder(built, inputs):
    with pytest.raises(UserError, match="max_record_bytes"):
        corpus.run(config(inputs, max_record_bytes=1000), str(built[0]))
    with pytest.raises(UserError, match="other inputs"):
        corpus.run(config(inputs[:2]), str(built[0]))


def test_a_later_corpus_is_compared_with_an_earlier_one_and_loses_its_similar_lines(built, inputs, tmp_path):
    texts = [json.loads(line)["text"] for line in inputs[0].read_text().splitlines()[:10]]
    sentence = "".join(WORDS[:10])
    fresh = f"{sentence}。{prose(np.random.default_rng(8))}。{sentence[:-1]}。"
    records = [
        {"id": "copy", "text": texts[7]},
        {"id": "like", "text": texts[3] + "结束。"},
        {"id": "doc5", "text": prose(np.random.default_rng(7))},
        {"id": "fresh", "text": fresh},
        {"id": "fresh copy", "text": fresh},
    ]
    path, workdir = jsonl(tmp_path / "later.jsonl", records), tmp_path / "corpus"
    settings = config([path])
    dedup = dataclasses.replace(settings.dedup, earlier=(str(built[0]),), similar_lines="released")
    result = corpus.run(dataclasses.replace(settings, dedup=dedup), str(workdir))
    found = {r["id"]: (r["kind"], r["duplicate_of"]) for r in rejected(workdir) if "kind" in r}
    expected = {"copy": ("exact", "doc7"), "like": ("near", "doc3"), "doc5": ("id", "doc5")}
    assert found == expected | {"fresh copy": ("exact", "fresh")}
    assert (result["totals"]["kept"], result["totals"]["similar_lines"]) == (1, 1)
    (line,) = [record for record in rejected(workdir) if "repeats" in record]
    assert (line["id"], line["file"], line["distance"]) == ("fresh", str(path), 1)
    assert examples(workdir, "zh_cc")["fresh"]["text"] == fresh.replace(line["sentence"], "")
    assert len(open_hashes(workdir / "hashes" / "00000")) == 1


def test_corpora_whose_signatures_differ_are_not_compared(built, inputs, tmp_path):
    settings = config(inputs)
    for change, message in (
        ({"earlier": (str(built[0]),), "rows": 5}, "signatures with rows 6, not 5"),
        ({"earlier": (str(tmp_path),)}, "not a finished folder"),
    ):
        changed = dataclasses.replace(settings, dedup=dataclasses.replace(settings.dedup, **change))
        with pytest.raises(UserError, match=message):
            corpus.run(changed, str(tmp_path / "corpus"))


def test_two_workers_write_the_same_bytes(built, inputs, tmp_path):
    beam = {"runner": "local", "options": ["--direct_running_mode=multi_threading", "--direct_num_workers=2"]}
    corpus.run(config(inputs, beam=beam), str(tmp_path / "corpus"))
    assert contents(tmp_path / "corpus") == contents(built[0])


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(built, inputs, tmp_path):
    beam = {
        "runner": "local",
        "options": ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
    }
    corpus.run(config(inputs, beam=beam), str(tmp_path / "corpus"))
    assert contents(tmp_path / "corpus") == contents(built[0])


KILL_POINTS = {
    "between files": "work/filtered/00001.json",
    "inside deduplication": "work/exact/00000.npy",
    "between subsets": "map_cc/en/*incomplete*",
}


@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed_at_any_point_and_run_again_gives_the_same_bytes(built, inputs, tmp_path, point):
    workdir = tmp_path / "corpus"
    program = (
        "import sys; sys.path.insert(0, 'tests'); import test_corpus as t; "
        f"t.corpus.run(t.config({[str(path) for path in inputs]!r}), {str(workdir)!r})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not list(workdir.glob(KILL_POINTS[point])):
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (workdir / "manifest.json").exists()
    corpus.run(config(inputs), str(workdir))
    assert contents(workdir) == contents(built[0])


def test_another_spelling_of_a_path_is_another_input_where_it_is_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, same in (("a.txt", False), ("a.jsonl", True)):
        (tmp_path / name).write_text("x")
        (short,), (long,) = find_inputs([name]), find_inputs([str(tmp_path / name)])
        assert (corpus._input_of(short) == corpus._input_of(long)) is same


def test_no_surviving_document_is_an_error_that_says_why(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "太短。"}, b"{"])
    for _ in range(2):  # a second run says the same
        with pytest.raises(UserError, match=r"no document survived.*characters \(1\)"):
            corpus.run(config([path]), str(tmp_path / "corpus"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": []}, "no files named"),
        ({"input": ["/nowhere/*.jsonl"]}, "no file matches"),
        ({"default_source": "zh_mars"}, "default_source"),
        ({"max_record_bytes": 0}, "max_record_bytes"),
        ({"beam": {"runner": "NoSuchRunner", "options": []}}, "NoSuchRunner"),
        ({"beam": {"runner": "DaskRunner", "options": []}}, "DaskRunner"),
    ],
)
def test_what_the_user_got_wrong_is_said_before_anything_is_written(inputs, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        corpus.run(config(inputs, **change), str(tmp_path / "corpus"))
    assert not (tmp_path / "corpus").exists()


def test_a_list_that_is_not_there_is_said_before_anything_is_written(inputs, tmp_path):
    settings = config(inputs)
    filters = dataclasses.replace(settings.filters, urls=UrlConfig("/nowhere", (), "prefix"))
    with pytest.raises(UserError, match="filters.urls.folder: there is no folder /nowhere$"):
        corpus.run(dataclasses.replace(settings, filters=filters), str(tmp_path / "corpus"))
    assert not (tmp_path / "corpus").exists()


def test_local_is_beams_in_process_runner_and_not_a_download():
    assert type(make_runner(BeamConfig("local"))).__name__ == "FnApiRunner"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the shared corpus is not here")
def test_on_real_text_junk_goes_and_prose_stays(tmp_path):
    result = corpus.run(config([SHARED / "*.jsonl.gz"]), str(tmp_path / "corpus"))
    totals = result["totals"]
    assert totals["read"] == 19_351 and totals["malformed"] == {}
    assert 0.94 < totals["passed_language"] / totals["read"] < 0.97
    assert totals["duplicate_exact"] > 400 and totals["duplicate_near"] > 400
