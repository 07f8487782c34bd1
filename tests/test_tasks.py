"""Tokenizer, SeqIO tasks and token store, through the stages themselves: nothing lost, nothing moved, same bytes."""

import collections
import json
import pathlib
import re

import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from tiny_models import tiny_tokenizer, write_jsonl
from tiny_records import CHAT_REASONS, PAIR_REASONS, chats, contents, joined, pairs, pieces, say, segments

from configs import corpus as corpus_config
from configs import tokenize as tokenize_config
from configs import tokenizer as tokenizer_config
from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.data.chat import render
from ctllm_jax.data.store import open_store
from ctllm_jax.data.tokenizer import ASSISTANT, CHAT_PIECES, END, load_tokenizer
from data_pipeline import chat_tasks, corpus, map_cc, tasks, token_store, tokenizer
from data_pipeline.splits import is_held_out

SAMPLE = pathlib.Path(__file__).resolve().parent.parent / "sample"
LENGTH = 64  # shorter than most documents, so that they are cut
SUBSETS = {"zh_cc": 30, "en": 20, "code": 8}  # documents of the sample that are read


# ---- Made once


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    """A folder with a corpus, a tokenizer and the three kinds of store, made from a part of the sample."""
    folder = tmp_path_factory.mktemp("stages")
    for subset, count in SUBSETS.items():
        lines = (SAMPLE / "documents" / f"{subset}.jsonl").read_bytes().split(b"\n")[:count]
        (folder / f"{subset}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    values = corpus_config.get_config().to_dict() | {"input": [str(folder / "*.jsonl")]}
    corpus.run(build(corpus.CorpusConfig, values), str(folder / "corpus"))
    changes = {"corpus": str(folder / "corpus"), "vocab_size": 1500, "character_coverage": 0.98}
    values = tokenizer_config.get_config().to_dict() | changes
    tokenizer.run(build(tokenizer.TokenizerConfig, values), str(folder / "tokenizer"))
    write_jsonl(folder / "chats.json", chats())
    write_jsonl(folder / "pairs.json", pairs())
    for kind in ("pretrain", "chat", "preference"):
        token_store.run(config_of(folder, kind), str(folder / kind))
    return folder


def config_of(root: pathlib.Path, store: str, **changes) -> token_store.TokenizeConfig:
    values = tokenize_config.get_config(store).to_dict()
    made_from = {
        "pretrain": {"corpus": str(root / "corpus")},
        "chat": {"input": [str(root / "chats.json")]},
        "preference": {"input": [str(root / "pairs.json")]},
    }[store]
    own = {"tokenizer": str(root / "tokenizer"), "sequence_length": LENGTH, "validation_share": 0.25}
    return build(token_store.TokenizeConfig, values | made_from | own | changes)


def documents(root) -> dict[str, dict[str, str]]:
    """{subset: {id: text}} as TFDS reads them."""
    found = {}
    for subset, folder in map_cc.subset_folders(root / "corpus").items():
        dataset = tfds.builder_from_directory(folder).as_dataset(split="train").as_numpy_iterator()
        found[subset] = {example["id"].decode(): example["text"].decode() for example in dataset}
    return found


# ---- Tokenizer


def test_the_tokenizer_gives_every_text_back(root):
    trained = load_tokenizer(root / "tokenizer")
    texts = [text for own in documents(root).values() for text in own.values()]
    texts += ["  two  spaces\t\n\n\nlines  ", "", "𠮷野家 ＡＢＣ １２３ é\u0301", "</s><|user|>"]
    for text, ids in zip(texts, trained.encode_batch(texts), strict=True):
        assert trained.decode(ids) == text
        assert not set(ids) & {trained.bos_id, trained.eos_id, *map(trained.piece_id, CHAT_PIECES)}


def test_the_tokenizers_report_counts_what_is_there(root):
    report = json.loads((root / "tokenizer" / "report.json").read_text())
    assert report["vocab_size"] == load_tokenizer(root / "tokenizer").vocab_size == 1500
    for subset, own in documents(root).items():
        entry = report["subsets"][subset]
        assert entry["documents"] == len(own) and entry["round_trip_failures"] == 0
        assert entry["bytes"] == sum(len(text.encode()) for text in own.values())
    assert report["subsets"]["zh_cc"]["han_covered"] / report["subsets"]["zh_cc"]["han_characters"] > 0.9


def test_digits_are_tokens_of_their_own(root):
    assert len(load_tokenizer(root / "tokenizer").encode("20240417")) >= 8


def test_the_same_corpus_gives_the_same_tokenizer_with_any_number_of_threads(root, tmp_path):
    changes = {"corpus": str(root / "corpus"), "vocab_size": 1500, "character_coverage": 0.98, "threads": 1}
    values = tokenizer_config.get_config().to_dict() | changes
    tokenizer.run(build(tokenizer.TokenizerConfig, values), str(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(root / "tokenizer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 1_000_000}, "tokenizer: SentencePiece could not train"),
        ({"weights": {"zh_moon": 1.0}}, "weight given for 'zh_moon', the corpus has code, en, zh_cc"),
        ({"corpus": "nowhere"}, "nowhere"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained_is_refused(root, tmp_path, change, message):
    values = tokenizer_config.get_config().to_dict() | {"corpus": str(root / "corpus"), "vocab_size": 1500} | change
    with pytest.raises(UserError, match=message):
        tokenizer.run(build(tokenizer.TokenizerConfig, values), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


# ---- Documents


def dataset_of(task: str, split: str) -> list[dict]:
    """A task through SeqIO's front door."""
    return list(
        seqio.get_dataset(
            task,
            task_feature_lengths=dict.fromkeys(seqio.get_mixture_or_task(task).output_features, 100_000),
            feature_converter=seqio.PassThroughFeatureConverter(),
            dataset_split=split,
            shuffle=False,
        ).as_numpy_iterator()
    )


@pytest.fixture(scope="module")
def seqio_examples(root) -> dict[str, dict[str, list[dict]]]:
    """{split: {subset: examples}} of the corpus tasks."""
    folders = map_cc.subset_folders(root / "corpus")
    names = tasks.corpus_tasks(folders, load_tokenizer(root / "tokenizer"), 0.25)
    assert names.keys() == SUBSETS.keys()
    return {
        split: {subset: dataset_of(task, split) for subset, task in names.items()} for split in ("train", "validation")
    }


@pytest.mark.parametrize("split", ["train", "validation"])
def test_seqio_gives_the_tokens_that_the_store_holds(root, seqio_examples, split):
    found = pieces(open_store(root / "pretrain"), split)
    for subset, examples in seqio_examples[split].items():
        own = found.get(subset, {})
        assert own.keys() == {example["id"].decode() for example in examples}
        assert all(joined(own[example["id"].decode()], example["targets"]) for example in examples)
    assert max(len(parts) for own in found.values() for parts in own.values()) > 3


def test_a_document_is_its_text_between_start_and_end(root, seqio_examples):
    trained, texts = load_tokenizer(root / "tokenizer"), documents(root)
    for subset, own in texts.items():
        examples = [e for split in seqio_examples.values() for e in split[subset]]
        assert len(examples) == len(own)
        for example in examples:
            text = own[example["id"].decode()]
            assert example["targets"].tolist() == [trained.bos_id, *trained.encode(text), trained.eos_id]
            assert example["bytes"] == len(text.encode())


def test_every_document_is_in_one_split_which_its_id_alone_decides(root, seqio_examples, tmp_path):
    ids = {
        split: {example["id"].decode() for examples in own.values() for example in examples}
        for split, own in seqio_examples.items()
    }
    assert not ids["train"] & ids["validation"]
    assert ids["train"] | ids["validation"] == {name for own in documents(root).values() for name in own}
    assert ids["validation"] and len(ids["validation"]) < len(ids["train"])
    # The same id among other records, in another kind of store, falls into the same split.
    records = [{"id": name, "messages": say("问", "答")} for name in sorted(ids["train"] | ids["validation"])]
    names = chat_tasks.chat_tasks(records, load_tokenizer(root / "tokenizer"), 0.25)
    for split, expected in ids.items():
        assert {example["id"].decode() for example in dataset_of(names["chat"], split)} == expected


def test_the_held_out_documents_of_a_larger_share_include_those_of_a_smaller_one_and_never_change():
    names = [f"doc{i}" for i in range(4000)]
    held = {share: {n for n in names if is_held_out(tf.constant(n), share)} for share in (0.01, 0.1, 0.25)}
    assert held[0.01] < held[0.1] < held[0.25]
    assert all(abs(len(own) / 4000 - share) < 4 * (share / 4000) ** 0.5 for share, own in held.items())
    # Another hash would move documents of old stores between the splits.
    assert [i for i in range(40) if f"doc{i}" in held[0.25]] == [9, 14, 16, 21, 24, 31, 36, 37]


def test_the_store_counts_documents_tokens_and_bytes(root, seqio_examples):
    store = open_store(root / "pretrain")
    for split, own in seqio_examples.items():
        for subset, examples in own.items():
            entry = store.info["splits"][split][subset]
            assert entry["documents"] == len(examples)
            rows = list(store.rows(split, subset)) if entry["rows"] else []
            assert entry["rows"] == len(rows)
            assert entry["tokens"] == sum(len(row.tokens) for row in rows)
            assert entry["bytes"] == sum(row.bytes for row in rows) == sum(int(e["bytes"]) for e in examples)
            predicted = sum(len(row.tokens) - len(row.lengths) for row in rows)
            assert predicted == sum(len(example["targets"]) - 1 for example in examples)
            assert entry["truncated"] == entry["dropped"] == 0
            assert all(len(row.tokens) <= LENGTH for row in rows)


def test_seqio_mixes_the_subsets(root, seqio_examples):
    seqio.MixtureRegistry.remove("sample_mixture")
    seqio.MixtureRegistry.add("sample_mixture", [("map_cc_zh_cc", 3), ("map_cc_en", 1)])
    dataset = seqio.get_dataset(
        "sample_mixture",
        {"targets": 32},
        seqio.LMFeatureConverter(pack=True),
        dataset_split="train",
        num_epochs=None,
        shuffle=False,
    )
    example = next(iter(dataset.as_numpy_iterator()))
    assert example["decoder_target_tokens"].shape == (32,)


# ---- Conversations and pairs


def test_a_conversation_in_the_store_is_as_the_template_renders_it(root):
    trained, store = load_tokenizer(root / "tokenizer"), open_store(root / "chat")
    records = {str(record["id"]): record for record in reversed(chats()) if "id" in record}
    records["chats:34"] = chats()[33]  # it has no id: file and line name it
    seen = []
    for split in ("train", "validation"):
        for source in store.sources(split):
            for row in store.rows(split, source):
                for name, tokens, mask in segments(row):
                    record = records[name]
                    ids, learned = render(record["messages"], trained)
                    assert tokens.tolist() == ids[:LENGTH] and mask.tolist() == learned[:LENGTH]
                    assert (record["language"] or "chat") == source
                    seen.append(name)
    expected = [f"c{i}" for i in range(30)] + ["system", "long", "chats:34", "7"]
    assert sorted(seen) == sorted(expected)


def test_only_answers_and_their_ends_are_learned(root):
    trained = load_tokenizer(root / "tokenizer")
    ids, mask = render([{"role": "system", "content": "好"}, *say("问", "答", "再问", "再答")], trained)
    answer, end = trained.piece_id(ASSISTANT), trained.piece_id(END)
    learned = [token for token, flag in zip(ids, mask, strict=True) if flag]
    assert learned == [*trained.encode("答"), end, *trained.encode("再答"), end] and answer not in learned


def test_text_that_looks_like_a_marker_is_text(root):
    trained = load_tokenizer(root / "tokenizer")
    ids, _ = render(say("<|end|><|assistant|>", "</s>"), trained)
    assert ids.count(trained.piece_id(END)) == 2 and ids.count(trained.piece_id(ASSISTANT)) == 1
    assert trained.eos_id not in ids


def test_a_pair_in_the_store_is_a_row_of_two_whole_sequences(root):
    trained, store = load_tokenizer(root / "tokenizer"), open_store(root / "preference")
    records, seen = {record["id"]: record for record in pairs()}, []
    for split in ("train", "validation"):
        for source in store.sources(split):
            for row in store.rows(split, source):
                assert len(row.lengths) == 2 and row.ids[0] == row.ids[1]
                record = records[row.ids[0]]
                assert record["language"] == source
                seen.append(row.ids[0])
                given = len(render(record["prompt"], trained)[0]) + 1  # and the marker of the answer
                for side, (_, tokens, mask) in zip(("chosen", "rejected"), segments(row), strict=True):
                    turn = [*record["prompt"], {"role": "assistant", "content": record[side]}]
                    ids, _ = render(turn, trained)
                    assert tokens.tolist() == ids[:LENGTH]
                    assert mask.tolist() == [int(i >= given) for i in range(len(ids))][:LENGTH]
    assert sorted(seen) == sorted([f"p{i}" for i in range(20)] + ["turns", "cut"])


@pytest.mark.parametrize(
    ("kind", "reasons", "documents", "truncated"),
    [("chat", CHAT_REASONS, 35, 2), ("preference", PAIR_REASONS, 23, 2)],
)
def test_what_is_rejected_truncated_and_dropped_is_counted(root, kind, reasons, documents, truncated):
    info = open_store(root / kind).info
    rejected = json.loads((root / kind / "rejected.json").read_text())
    assert collections.Counter(entry["reason"] for entry in rejected) == reasons
    assert info["rejected_records"] == len(rejected) == sum(reasons.values())
    records = chats() if kind == "chat" else pairs()
    for entry in rejected:
        assert entry["file"] == str(root / ("chats.json" if kind == "chat" else "pairs.json"))
        assert 20 < entry["line"] <= len(records)
    totals = collections.Counter()
    for split in info["splits"].values():
        for entry in split.values():
            totals.update({name: entry[name] for name in ("documents", "truncated", "dropped")})
    assert totals == {"documents": documents, "truncated": truncated, "dropped": 1}


def test_lines_that_are_no_records_are_rejected_with_their_place(root, tmp_path):
    good = [json.dumps({"id": f"g{i}", "messages": say("问", "答")}, ensure_ascii=False).encode() for i in range(12)]
    lines = [*good, b"not json", b"[1]", b'{"messages": "\xff"}', b"", b'{"id": ["x"], "messages": []}']
    (tmp_path / "chats.json").write_bytes(b"\r\n".join(lines))
    config = config_of(root, "chat", input=[str(tmp_path / "chats.json")])
    result = token_store.run(config, str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "rejected.json").read_text())
    assert [(entry["line"], entry["reason"]) for entry in found] == [
        (13, "not valid JSON"),
        (14, "not a JSON object"),
        (15, "not UTF-8"),
        (17, "messages is not a list, or empty"),
    ]
    assert result["rejected_records"] == 4
    assert sum(entry["documents"] for split in result["splits"].values() for entry in split.values()) == 12


# ---- The same bytes


@pytest.mark.parametrize("kind", ["pretrain", "chat", "preference"])
def test_two_runs_write_the_same_bytes_with_any_number_of_workers(root, tmp_path, kind):
    options = ["--direct_running_mode=multi_threading", "--direct_num_workers=2"]
    token_store.run(config_of(root, kind, beam={"runner": "local", "options": options}), str(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(root / kind)


@pytest.mark.parametrize("kind", ["pretrain", "chat"])
def test_a_store_killed_half_way_ends_in_the_same_bytes(root, tmp_path, kind):
    folder = tmp_path / "store"
    token_store.run(config_of(root, kind), str(folder))
    (folder / "manifest.json").unlink()
    notes = sorted((folder / "shards").iterdir())
    for number, note in enumerate(notes):
        shard = folder / note.stem
        if number % 3 == 0:  # never begun
            note.unlink()
            shard.unlink(missing_ok=True)
        elif number % 3 == 1:  # killed between a shard and its note
            note.unlink()
            if shard.exists():
                shard.write_bytes(shard.read_bytes()[:100])
    (folder / f".{notes[0].stem}.0123.tmp").write_bytes(b"half")  # killed inside a shard
    kept = {note: note.stat().st_mtime_ns for note in notes if note.exists()}
    assert kept
    token_store.run(config_of(root, kind), str(folder))
    assert contents(folder) == contents(root / kind)
    assert all(note.stat().st_mtime_ns == time for note, time in kept.items())  # not done again


def test_a_finished_store_returns_at_once(root, monkeypatch):
    monkeypatch.setattr(token_store, "make_pipeline", lambda _: pytest.fail("ran again"))
    before = contents(root / "pretrain")
    result = token_store.run(config_of(root, "pretrain"), str(root / "pretrain"))
    assert result == open_store(root / "pretrain").info and contents(root / "pretrain") == before


def test_another_seed_packs_the_same_documents_otherwise(root, tmp_path):
    token_store.run(config_of(root, "pretrain", seed=1), str(tmp_path / "other"))
    ours, theirs = open_store(root / "pretrain"), open_store(tmp_path / "other")
    assert ours.fingerprint != theirs.fingerprint

    def rows(store):
        return [row.tokens.tolist() for source in store.sources("train") for row in store.rows("train", source)]

    assert rows(ours) != rows(theirs)
    assert sum(map(sum, rows(ours))) == sum(map(sum, rows(theirs)))


# ---- What is refused


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("pretrain", {"sequence_length": 65}, r"settings\.sequence_length: 64 there, 65 now"),
        ("chat", {"validation_share": 0.5}, r"settings\.validation_share: 0\.25 there, 0\.5 now"),
    ],
)
def test_another_store_is_refused_in_the_same_folder(root, kind, change, message):
    with pytest.raises(UserError, match=message):
        token_store.run(config_of(root, kind, **change), str(root / kind))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("chat", {"kind": "story"}, "kind 'story' is unknown; there are: pretrain, chat, preference"),
        ("chat", {"corpus": "somewhere"}, "corpus"),
        ("chat", {"input": []}, "input"),
        ("pretrain", {"corpus": None}, "corpus"),
        ("pretrain", {"input": ["x"]}, "input"),
        ("pretrain", {"validation_share": 0.0}, "validation_share 0.0 must lie between 0 and 1"),
        ("pretrain", {"validation_share": 1.0}, "validation_share 1.0 must lie between 0 and 1"),
        ("pretrain", {"sequence_length": 1}, "sequence_length 1 must be at least 2"),
    ],
)
def test_contradictions_in_a_config_are_refused(root, kind, change, message):
    with pytest.raises(UserError, match=message):
        config_of(root, kind, **change)


def test_inputs_that_cannot_be_used_are_refused(root, tmp_path):
    def run(kind, **change):
        token_store.run(config_of(root, kind, **change), str(tmp_path / "out"))

    with pytest.raises(UserError, match="no file matches '/nowhere/"):
        run("chat", input=["/nowhere/*.jsonl"])
    with pytest.raises(UserError, match="nowhere"):
        run("pretrain", corpus="/nowhere")
    with pytest.raises(UserError, match="nowhere"):
        run("pretrain", tokenizer="/nowhere")
    assert not (tmp_path / "out").exists()
    useless = write_jsonl(tmp_path / "useless.json", [{"id": "a"}, {"id": "b"}])
    with pytest.raises(UserError, match=f"{re.escape(str(useless))}: no usable chat record among 2"):
        run("chat", input=[str(useless)])


def test_a_vocabulary_without_chat_markers_is_refused(root, tmp_path, monkeypatch):
    plain = tiny_tokenizer()
    monkeypatch.setattr(type(plain), "piece_id", lambda self, piece: None)
    with pytest.raises(UserError, match=re.escape(f"the vocabulary has no {CHAT_PIECES[0]}")):
        token_store.run(config_of(root, "chat", tokenizer=str(plain.file)), str(tmp_path / "out"))


def test_a_store_with_nothing_to_train_on_is_refused(root, tmp_path):
    one = write_jsonl(tmp_path / "one.json", [{"id": "x", "messages": say("a long question " * 60, "answer")}])
    with pytest.raises(UserError, match="nothing is left to train on"):
        token_store.run(config_of(root, "chat", input=[str(one)]), str(tmp_path / "out"))
