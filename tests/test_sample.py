"""The sample is what its script writes, its key is complete, the corpus stage finds all that was planted."""

import collections
import gzip
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from ctllm_jax.common.config import build
from ctllm_jax.data.chat import check_messages

ROOT = pathlib.Path(__file__).parent.parent
SAMPLE = ROOT / "sample"
KEY = json.loads((SAMPLE / "planted.json").read_bytes())


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def json_lines(path: pathlib.Path) -> list[dict]:
    opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    with opened as stream:
        return [json.loads(line) for line in stream]


@pytest.fixture(scope="module")
def plant():
    return load(SAMPLE / "plant.py")


def documents(plant) -> list[dict]:
    """Every record of documents/ that the key does not call broken."""
    found = []
    for subset in plant.SUBSETS:
        for number, line in enumerate((SAMPLE / "documents" / f"{subset}.jsonl").read_bytes().splitlines(), 1):
            if f"{subset}.jsonl:{number}" not in KEY:
                found.append(json.loads(line))
    return found


def test_files_are_what_the_script_writes():
    done = subprocess.run([sys.executable, SAMPLE / "plant.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_check_finds_a_changed_file(plant, tmp_path):
    (tmp_path / "planted.json").write_bytes(plant.planted_files()["planted.json"] + b" ")
    assert not plant.same(tmp_path / "planted.json", plant.planted_files()["planted.json"])
    assert not plant.same(tmp_path / "absent.json", b"")


def test_sample_is_small():
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 2_000_000


def test_readme_holds_the_counts(plant):
    assert plant.table(plant.planted_files()) in (SAMPLE / "README.md").read_text(encoding="utf-8")


def test_documents_are_whole_and_their_ids_unique(plant):
    found = documents(plant)
    for document in found:
        assert set(document) == {"id", "url", "source", "text"}
        assert all(isinstance(value, str) and value for value in document.values())
        assert document["id"].startswith(document["source"] + "-")
    for name in ("id", "url"):
        assert len({document[name] for document in found}) == len(found)


def test_key_names_what_is_there(plant):
    ids = {document["id"] for document in documents(plant)}
    natural = ids - set(KEY)
    for name, entry in KEY.items():
        group = entry["kind"].split(":")[0]
        if group == "broken":
            file, line = name.split(":")
            assert 1 <= int(line) <= (SAMPLE / "documents" / file).read_bytes().count(b"\n")
        else:
            assert name in ids
            assert ("of" in entry) == (group == "duplicate")
            assert entry.get("of") is None or entry["of"] in natural


def test_natural_texts_share_no_sentence(plant):
    """Only planted copies may be duplicates: an accidental one would make the key untrue."""
    seen = {}
    for document in documents(plant):
        if document["id"] in KEY or document["source"] == "code":
            continue
        for sentence in map(str.strip, plant.sentences(document["text"])):
            if len(sentence) >= 20:
                assert seen.setdefault(sentence, document["id"]) == document["id"], sentence


def test_conversations_are_valid():
    for item in json_lines(SAMPLE / "sft.jsonl"):
        assert check_messages(item["messages"]) is None
        assert item["messages"][-1]["role"] == "assistant"
    for item in json_lines(SAMPLE / "preference.jsonl"):
        assert check_messages(item["prompt"]) is None
        assert item["prompt"][-1]["role"] == "user"
        assert item["chosen"].strip() and item["rejected"].strip() and item["chosen"] != item["rejected"]


def test_choices_have_one_answer_each_spread_evenly():
    items = json_lines(SAMPLE / "choice.jsonl")
    for item in items:
        assert len(set(item["choices"])) == len(item["choices"]) == 4
        assert 0 <= item["answer"] < 4
    places = collections.Counter(item["answer"] for item in items)
    assert max(places.values()) - min(places.values()) <= 1


def test_no_id_is_used_twice_in_the_instruction_data():
    for name in ("sft", "preference", "choice"):
        ids = [item["id"] for item in json_lines(SAMPLE / f"{name}.jsonl")]
        assert len(set(ids)) == len(ids)


# --- the corpus stage on the sample


@pytest.fixture(scope="module")
def config():
    values = load(ROOT / "configs" / "corpus.py").get_config()
    values.input = (str(SAMPLE / "documents" / "*.jsonl"),)
    return values.to_dict()


@pytest.fixture(scope="module")
def rejected(config, tmp_path_factory) -> list[dict]:
    """Every rejection, each with the `name` by which the key would know it."""
    corpus = pytest.importorskip("data_pipeline.corpus", reason="the corpus side's packages are not installed")
    workdir = tmp_path_factory.mktemp("corpus")
    corpus.run(build(corpus.CorpusConfig, config), str(workdir))
    found = [record for path in sorted(workdir.glob("rejected/*.jsonl.gz")) for record in json_lines(path)]
    for record in found:
        place = f"{pathlib.PurePath(record['file']).name}:{record['line']}"
        record["name"] = place if place in KEY else record["id"]
    return found


@pytest.fixture(scope="module")
def fate(rejected) -> dict[str, dict]:
    by_name = {record["name"]: record for record in rejected}
    assert len(by_name) == len(rejected)
    return by_name


@pytest.mark.parametrize("name", [name for name, entry in KEY.items() if "of" not in entry])
def test_junk_and_broken_records_are_rejected_for_the_expected_reason(fate, name):
    assert KEY[name]["expect"] in {reason["rule"] for reason in fate[name]["reasons"]}


@pytest.mark.parametrize("name", [name for name, entry in KEY.items() if "of" in entry])
def test_of_an_original_and_its_copy_one_stays(fate, name):
    pair = {name, KEY[name]["of"]}
    (removed,) = pair & set(fate)
    assert [reason["rule"] for reason in fate[removed]["reasons"]] == [KEY[name]["expect"]]
    assert {removed, fate[removed]["duplicate_of"]} == pair


def test_nothing_natural_is_rejected_unless_a_copy_of_it_stays(fate):
    originals = {entry["of"] for entry in KEY.values() if "of" in entry}
    assert set(fate) - set(KEY) <= originals


def test_every_rule_fires_on_the_sample(config, rejected):
    fired = collections.defaultdict(set)
    for record in rejected:
        family = {"en": "english", "code": "code"}.get(record["source"], "chinese")
        fired[family] |= {reason["rule"] for reason in record["reasons"]}
    for family, rules in config["filters"]["rules"].items():
        assert set(rules) <= fired[family]
    for family in ("chinese", "english"):
        assert {"language_label", "language_score"} <= fired[family]
