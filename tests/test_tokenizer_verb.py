"""`ctllm tokenizer`: each property of the trained model, the sample, the report, and tokenizers that are given."""

import collections
import dataclasses
import html
import json
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_tokenizer import hugging_face
from tiny_models import tiny_tokenizer
from tiny_records import contents

from configs import corpus as corpus_config
from configs import tokenizer as tokenizer_config
from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.data.tokenizer import BOS, BYTE, CHAT_PIECES, EOS, PAD, SPECIAL, UNK, Tokenizer, load_tokenizer
from data_pipeline import corpus, map_cc, tokenizer, tokenizer_report

SAMPLE = pathlib.Path(__file__).resolve().parent.parent / "sample"
SUBSETS = {"zh_cc": 30, "en": 20, "code": 8}  # documents of the sample that are read


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> str:
    """A corpus folder; one of its documents holds a U+2581."""
    folder = tmp_path_factory.mktemp("corpus")
    for subset, count in SUBSETS.items():
        lines = (SAMPLE / "documents" / f"{subset}.jsonl").read_bytes().split(b"\n")[:count]
        if subset == "zh_cc":
            lines[0] = lines[0].replace("。".encode(), "\u2581".encode(), 1)
        (folder / f"{subset}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    values = corpus_config.get_config().to_dict() | {"input": [str(folder / "*.jsonl")]}
    corpus.run(build(corpus.CorpusConfig, values), str(folder / "corpus"))
    return str(folder / "corpus")


def config_of(made: str, kind: str = "train", **changes) -> tokenizer.TokenizerConfig:
    small = {"vocab_size": 1500, "character_coverage": 0.98} if kind == "train" else {}
    values = tokenizer_config.get_config(kind).to_dict() | {"corpus": made} | small | changes
    return build(tokenizer.TokenizerConfig, values)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory) -> pathlib.Path:
    """A trained tokenizer's folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.run(config_of(made), str(folder))
    return folder


@pytest.fixture(scope="module")
def report(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def documents(made) -> dict[str, dict[str, str]]:
    """{subset: {id: text}} as TFDS reads them."""
    found = {}
    for subset, path in map_cc.subset_folders(made).items():
        examples = tfds.builder_from_directory(path).as_dataset(split="train").as_numpy_iterator()
        found[subset] = {example["id"].decode(): example["text"].decode() for example in examples}
    return found


def trained_on(tmp_path: pathlib.Path, texts: list[str], vocab_size: int, **changes) -> Tokenizer:
    """A tokenizer trained on these texts, with the verb's own settings."""
    config = config_of("", vocab_size=vocab_size, **{"character_coverage": 1.0} | changes)
    lines = tokenizer.training_lines(texts, collections.Counter())
    (tmp_path / "own.model").write_bytes(tokenizer.train(config, lines))
    return load_tokenizer(tmp_path / "own.model")


def texts_of(model: Tokenizer) -> set[str]:
    return {text for kind, text in model.pieces() if kind not in (SPECIAL, BYTE)}


# ---- Properties of the trained model


def test_every_special_piece_is_a_control_piece_inside_the_vocabulary(folder):
    model = load_tokenizer(folder)
    assert model.pieces()[:8] == [(SPECIAL, piece) for piece in (UNK, BOS, EOS, PAD, *CHAT_PIECES)]
    assert (model.bos_id, model.eos_id, model.vocab_size, len(model.pieces())) == (1, 2, 1500, 1500)
    assert not {i for i, (kind, _) in enumerate(model.pieces()) if kind == SPECIAL} & set(
        model.encode(" ".join((UNK, BOS, EOS, PAD, *CHAT_PIECES)))
    )


def test_nothing_is_normalised_and_no_prefix_is_added(folder, documents):
    model = load_tokenizer(folder)
    texts = [text for own in documents.values() for text in own.values() if "\u2581" not in text]
    texts += [
        "  two  spaces \t\n\n\n  lines  \r\n",
        "\n",
        "ＡＢＣ１２３　",
        "e\u0301 é ﬁ",
        "\0\u2028\ufeff",
        "𠮷野家",
    ]
    for text, ids in zip(texts, model.encode_batch(texts), strict=True):
        assert model.decode(ids) == text
    assert model.pieces()[model.encode("的")[0]][1] == "的"


def test_every_digit_is_a_piece_of_its_own(folder, tmp_path):
    assert len(load_tokenizer(folder).encode("20240417")) == 8
    model = trained_on(tmp_path, ["2024年 v2024 １２３４ x1"] * 50, 279)
    with_digits = {text for text in texts_of(model) if any(c.isdigit() for c in text)}
    assert with_digits == set("0124１２３４")


def test_runs_of_spaces_are_pieces(tmp_path):
    code = ["def f(x):\n    if x:\n        return g(x)\n            # deep\n"] * 50
    model = trained_on(tmp_path, code, 310)
    assert {"  ", "    ", "        "} <= texts_of(model)
    assert len(model.encode("        return")) < 8
    assert model.encode("a\n    b")[1] == model.piece_id("\n")


def test_what_has_no_piece_is_spelt_in_bytes(folder):
    model = load_tokenizer(folder)
    assert sum(kind == BYTE for kind, _ in model.pieces()) == 256
    ids = model.encode("龘\U0001f995")
    assert bytes(int(model.pieces()[i][1][3:5], 16) for i in ids) == "龘\U0001f995".encode()


def test_coverage_decides_which_characters_get_a_piece(tmp_path):
    text = "的" * 900 + "龘" * 90 + "靐" * 10
    assert {"的", "龘", "靐"} <= texts_of(trained_on(tmp_path, [text], 290, character_coverage=1.0))
    partly = texts_of(trained_on(tmp_path, [text], 285, character_coverage=0.99))
    assert {"的", "龘"} <= partly and "靐" not in partly


def test_no_piece_is_longer_than_32_characters(tmp_path):
    phrase = "".join(chr(0x4E00 + i) for i in range(64))
    lengths = [len(text) for text in texts_of(trained_on(tmp_path, [phrase] * 20, 390))]
    assert max(lengths) == 32


def test_the_same_corpus_gives_the_same_files_with_any_number_of_threads(made, folder, tmp_path):
    tokenizer.run(config_of(made, threads=1), str(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(folder)


# ---- The sample


def test_a_sample_is_what_the_hash_of_the_id_says(made, documents):
    path = map_cc.subset_folders(made)["zh_cc"]
    assert dict(tokenizer.documents(path, 1.0, 7)) == documents["zh_cc"]
    smaller, larger = (dict(tokenizer.documents(path, share, 7)) for share in (0.3, 0.7))
    assert smaller.items() < larger.items() < documents["zh_cc"].items()
    assert set(smaller) != set(dict(tokenizer.documents(path, 0.3, 8)))


def test_shares_are_met_and_keys_are_independent():
    hashes = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
    first, second = (tokenizer._draw(hashes, key) < 0.25 for key in (1, 2))
    assert abs(first.mean() - 0.25) < 0.005 and abs((first & second).mean() - 0.0625) < 0.003


def test_only_the_chosen_documents_are_read(made, monkeypatch):
    read = []
    original = map_cc.read_record
    monkeypatch.setattr(map_cc, "read_record", lambda file: read.append(1) or original(file))
    chosen = list(tokenizer.documents(map_cc.subset_folders(made)["zh_cc"], 0.3, 7))
    assert 0 < len(read) == len(chosen) < SUBSETS["zh_cc"]


def test_weights_share_the_budget_and_a_small_subset_gives_all_it_has(made):
    config = config_of(made, sample_bytes=1000, weights={"zh_cc": 3.0, "en": 1.0})
    plan = tokenizer.plan(config, {"zh_cc": 5000, "en": 100, "code": 900})
    assert plan == {
        "en": {"available_bytes": 100, "wanted_bytes": 100},
        "zh_cc": {"available_bytes": 5000, "wanted_bytes": 750},
    }
    by_size = tokenizer.plan(dataclasses.replace(config, weights={}), {"zh_cc": 4000, "en": 1000})
    assert {name: entry["wanted_bytes"] for name, entry in by_size.items()} == {"zh_cc": 800, "en": 200}


def test_the_report_says_what_was_sampled(made, documents, tmp_path):
    report = tokenizer.run(config_of(made, weights={"en": 1.0}, vocab_size=700), str(tmp_path))
    size = sum(len(text.encode()) for text in documents["en"].values())
    entry = {"available_bytes": size, "wanted_bytes": size, "documents": len(documents["en"]), "bytes": size}
    assert report["sample"] == {"subsets": {"en": entry}, "cut_lines": 0, "reserved": 0}


def test_long_lines_are_cut_and_reserved_characters_left_out(tmp_path):
    counts = collections.Counter()
    text = "天地玄黄" * 20_000
    lines = list(tokenizer.training_lines([f"{text}\nab\u2585cd\u2581ef"], counts))
    assert "".join(lines) == f"{text}abcdef" and lines[-3:] == ["ab", "cd", "ef"]
    assert max(map(len, lines)) == tokenizer.LINE and counts == {"cut_lines": 1, "reserved": 2}
    # SentencePiece ends the process on words of 65,536 characters, and drops a line with U+2585.
    assert "天地玄黄" in texts_of(trained_on(tmp_path, [text, "洪荒\u2585宇宙"], 283))
    assert {"洪", "宙"} <= texts_of(load_tokenizer(tmp_path / "own.model"))


@pytest.mark.parametrize("size", [4, 3])
def test_the_longest_line_fits_whatever_its_characters(tmp_path, size):
    character = {4: "\U00020bb7", 3: "的"}[size]
    assert len(character.encode()) == size
    assert character in texts_of(trained_on(tmp_path, [character * tokenizer.LINE], 266))


def test_a_sample_beyond_the_memory_is_refused_with_numbers(made, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "memory_bytes", lambda: 500_000)
    with pytest.raises(UserError, match=r"0\.0 GB are there; lower sample_bytes to at most 20,000"):
        tokenizer.run(config_of(made), str(tmp_path / "out"))
    assert tokenizer.plan(config_of(made, sample_bytes=20_000), {"en": 60_000})["en"]["wanted_bytes"] == 20_000


def test_a_run_killed_after_training_does_not_train_again(made, folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizer_report, "measure", stop)
        tokenizer.run(config_of(made), str(tmp_path / "again"))
    monkeypatch.setattr(tokenizer, "train", stop)
    tokenizer.run(config_of(made), str(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(folder)


# ---- The report


def test_the_report_counts_what_is_there(folder, report, documents):
    model = load_tokenizer(folder)
    pieces = model.pieces()
    for subset, own in documents.items():
        entry = report["subsets"][subset]
        ids = [i for text in own.values() for i in model.encode(text)]
        joined = "".join(own.values())
        han = [c for c in joined if "\u4e00" <= c <= "\u9fff"]
        assert entry["documents"] == len(own) and entry["unknown_tokens"] == 0
        assert (entry["characters"], entry["bytes"]) == (len(joined), len(joined.encode()))
        assert entry["tokens"] == len(ids) and entry["byte_tokens"] == sum(pieces[i][0] == BYTE for i in ids)
        assert entry["characters_per_token"] == round(len(joined) / len(ids), 6)
        assert (entry["han_characters"], entry["han_types"]) == (len(han), len(set(han)))
        assert entry["han_covered"] == sum(model.piece_id(c) is not None for c in han)
        assert entry["han_types_covered"] == sum(model.piece_id(c) is not None for c in set(han))
    assert report["subsets"]["zh_cc"]["han_coverage"] > 0.9


def test_a_text_that_does_not_survive_is_shown_with_its_place(report, documents):
    failures = {subset: entry["failures"] for subset, entry in report["subsets"].items()}
    (failure,) = failures.pop("zh_cc")
    text = documents["zh_cc"][failure["id"]]
    assert text[failure["position"]] == "\u2581" and "\u2581" in failure["text"] and "\u2581" not in failure["found"]
    assert not any(failures.values()) and report["subsets"]["zh_cc"]["round_trip_failures"] == 1


def test_no_more_than_report_bytes_are_measured(made, report, tmp_path):
    small = tokenizer.run(config_of(made, report_bytes=8_000), str(tmp_path))
    whole, part = (found["subsets"]["zh_cc"]["bytes"] for found in (report, small))
    assert 0 < part < 16_000 < whole


def test_the_vocabularys_composition_adds_up(report):
    vocabulary = report["vocabulary"]
    assert sum(vocabulary["classes"].values()) == 1500
    assert (vocabulary["classes"]["special"], vocabulary["classes"]["bytes"]) == (8, 256)
    assert sum(vocabulary["lengths"].values()) == 1500 - 8 - 256
    assert {name: own["size"] for name, own in vocabulary["coverage"].items()} == {
        "CJK Unified Ideographs (U+4E00 to U+9FFF)": 20_992,
        "GB 2312 level 1 (common)": 3_755,
        "GB 2312 level 2": 3_008,
    }
    longest = [len(text) for text in vocabulary["longest_chinese"]]
    assert longest == sorted(longest, reverse=True) and longest[0] > 1


def test_pieces_are_told_apart():
    texts = ["中国", " 中", "a", " the", "Ａ", "7", "  ", "\n", "，", "中a", "ひ"]
    found = tokenizer_report.composition([("special", "<s>"), ("byte", "<0x41>"), *(("text", text) for text in texts)])
    classes = {"special": 1, "bytes": 1, "Chinese": 2, "Latin": 3, "digits": 1, "whitespace": 2, "other": 3}
    assert found["classes"] == classes and found["longest_chinese"] == ["中国", " 中"]
    assert found["coverage"]["CJK Unified Ideographs (U+4E00 to U+9FFF)"]["covered"] == 0


def test_the_page_stands_alone_and_shows_the_failure(folder, report):
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "src=" not in page and "http" not in page
    assert report["subsets"]["zh_cc"]["failures"][0]["id"] in page and "<td>code</td>" in page


# ---- A tokenizer that is given


def test_a_given_model_is_taken_as_it_is_and_measured(made, report, tmp_path, capsys):
    model = tiny_tokenizer()
    found = tokenizer.run(config_of(made, "given", model=str(model.file)), str(tmp_path))
    assert (tmp_path / "tokenizer.model").read_bytes() == model.file.read_bytes()
    assert found["vocab_size"] == 370 and found["sample"] is None and found["notes"] == []
    for subset, entry in found["subsets"].items():  # on the same documents
        assert entry["characters"] == report["subsets"][subset]["characters"]
    assert "lacks" not in capsys.readouterr().err
    tokenizer.run(config_of(made, "given", model=str(model.file)), str(tmp_path))
    assert "already finished" in capsys.readouterr().err


def test_a_given_tokenizer_json_comes_with_its_settings_and_says_what_it_lacks(made, tmp_path, capsys):
    source = hugging_face(tmp_path / "source", lambda model: model.add_tokens(["<|user|>"]))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    found = tokenizer.run(config_of(made, "given", model=str(source)), str(tmp_path / "out"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    lacking, forged = found["notes"]
    assert "lacks <|system|> <|assistant|> <|end|>" in lacking and "spell <|user|> are given" in forged
    assert lacking in capsys.readouterr().err
    assert lacking in html.unescape((tmp_path / "out" / "report.html").read_text())
    assert all(entry["round_trip_failures"] == 0 for entry in found["subsets"].values())
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    with pytest.raises(UserError, match="made from other inputs"):
        tokenizer.run(config_of(made, "given", model=str(source)), str(tmp_path / "out"))


# ---- Refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 1_000_000}, "tokenizer: SentencePiece could not train"),
        ({"weights": {"zh_moon": 1.0}}, "weight given for 'zh_moon', the corpus has code, en, zh_cc"),
        ({"made": "nowhere"}, "nowhere: not a finished folder of `ctllm corpus`"),
        ({"made": ""}, "no folder of `ctllm corpus` to read is given"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained_is_refused(made, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        tokenizer.run(config_of(**{"made": made} | change), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("given", {}, "vocab_size is needed to train a tokenizer"),
        ("train", {"model": "x.model"}, "model is given, so nothing is trained and vocab_size has no meaning"),
        ("given", {"model": "x.model", "seed": 1}, "seed has no meaning"),
        ("train", {"threads": None}, "threads is needed"),
        ("train", {"weights": {"en": -1.0}}, "must not be negative"),
        ("train", {"weights": {"en": 0.0}}, "nor all 0"),
        ("train", {"sample_bytes": 0}, "must be at least 1"),
        ("train", {"vocab_size": 0}, "vocab_size 0 must be at least 1"),
        ("train", {"character_coverage": 0.9}, r"character_coverage 0.9 must lie in 0.98..1"),
        ("train", {"threads": 0}, "threads 0 must lie in 1..1024"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(kind, change, message):
    with pytest.raises(UserError, match=message):
        config_of("corpus", kind, **change)


def test_a_given_model_that_is_not_there_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="no such tokenizer file"):
        tokenizer.run(config_of(made, "given", model=str(tmp_path / "none.model")), str(tmp_path / "out"))
