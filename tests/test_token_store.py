"""Token stores, through the stage itself: nothing lost, nothing twice, every count exact, the same bytes."""

import collections
import gzip
import itertools
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import seqio
from tiny_models import tiny_tokenizer, write_jsonl
from tiny_records import CHAT_REASONS, PAIR_REASONS, chats, contents, pairs, say, segments
from tiny_stages import LENGTH, assembled, config_of, dataset_of, documents, stages

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import identity
from ctllm_jax.data.batches import row_arrays
from ctllm_jax.data.chat import CtllmTemplate
from ctllm_jax.data.record import ID_ENTRY, Row, id_hash, ids_name
from ctllm_jax.data.store import open_store
from ctllm_jax.data.tokenizer import ASSISTANT, CHAT_PIECES, END, load_tokenizer
from data_pipeline import chat_tasks, map_cc, records, tasks, token_store
from data_pipeline.packing import chunks, pack


@pytest.fixture(scope="module")
def root() -> pathlib.Path:
    return stages()


# ---- Documents


@pytest.fixture(scope="module")
def seqio_examples(root) -> dict[str, dict[str, list[dict]]]:
    """{split: {subset: examples}} of the corpus tasks."""
    folders = map_cc.subset_folders(root / "corpus")
    names = tasks.corpus_tasks(folders, load_tokenizer(root / "tokenizer"), 0.25)
    return {split: {subset: dataset_of(task, split) for subset, task in names.items()} for split in tasks.SPLITS}


def same_documents(store, split: str, examples: dict[str, list[dict]], repeated: int = 1) -> None:
    """That a split of a store holds exactly the documents that SeqIO gives, token by token."""
    found = assembled(store, split, repeated)
    for subset, own in examples.items():
        assert found.get(subset, {}).keys() == {example["id"].decode() for example in own}
        for example in own:
            np.testing.assert_array_equal(found[subset][example["id"].decode()], example["targets"])


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_seqio_gives_document_by_document_the_tokens_that_the_store_holds(root, seqio_examples, split):
    store = open_store(root / "pretrain")
    same_documents(store, split, seqio_examples[split])
    assert max(max(row.starts, default=0) for row in store.rows("train", "zh_cc")) > 3 * LENGTH


def test_a_store_made_with_a_hugging_face_tokenizer_holds_what_seqio_gives(root, tmp_path):
    trained = load_tokenizer(root / "hugging_face")
    token_store.run(config_of(root, "pretrain", tokenizer=str(root / "hugging_face")), str(tmp_path / "store"))
    names = tasks.corpus_tasks(map_cc.subset_folders(root / "corpus"), trained, 0.25)
    store = open_store(tmp_path / "store")
    for split in tasks.SPLITS:
        same_documents(store, split, {subset: dataset_of(task, split) for subset, task in names.items()})
    assert store.tokenizer.digest == trained.digest
    name, text = next(iter(documents(root)["en"].items()))
    held = {**assembled(store, "train")["en"], **assembled(store, "validation").get("en", {})}
    assert store.tokenizer.decode(held[name].tolist()) == text and held[name][-1] == trained.eos_id

    shutil.copytree(root / "hugging_face", tmp_path / "other")  # the same vocabulary, but documents end otherwise
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    with pytest.raises(UserError, match=r"inputs\.tokenizer"):
        token_store.run(config_of(root, "pretrain", tokenizer=str(tmp_path / "other")), str(tmp_path / "store"))


@pytest.mark.parametrize("shards", [3, 9])
def test_any_number_of_shards_holds_every_document_once(root, seqio_examples, tmp_path, shards):
    token_store.run(config_of(root, "pretrain", shards=shards), str(tmp_path / "store"))
    store = open_store(tmp_path / "store")
    for split in tasks.SPLITS:
        same_documents(store, split, seqio_examples[split])
        for subset, entry in store.info["splits"][split].items():
            assert entry["documents"] == len(seqio_examples[split][subset])
            assert all(shard["rows"] for shard in entry["shards"])
    counts = {subset: len(entry["shards"]) for subset, entry in store.info["splits"]["train"].items()}
    assert counts["code"] == min(shards, len(seqio_examples["train"]["code"])) and 3 <= counts["zh_cc"] <= shards


def test_a_wrapped_store_holds_the_same_documents_without_padding(root, seqio_examples, tmp_path):
    result = token_store.run(config_of(root, "pretrain", packing="wrapped"), str(tmp_path / "store"))
    for entry in result["splits"]["train"].values():
        assert entry["rows"] == -(-entry["tokens"] // LENGTH) and entry["padding"] < 1 / entry["rows"]
    same_documents(open_store(tmp_path / "store"), "train", seqio_examples["train"], repeated=0)


def test_the_manifest_says_what_the_shards_are(root):
    for kind, source in (("pretrain", "corpus"), ("chat", "chats.json"), ("preference", "pairs.json")):
        folder, info = root / kind, open_store(root / kind).info
        assert info["made_from"] == [str(root / source)]
        entries = [shard for own in info["splits"].values() for entry in own.values() for shard in entry["shards"]]
        assert sorted(entry["file"] for entry in entries) == sorted(p.name for p in folder.glob("*.array_record"))
        assert len(list(folder.glob("*.ids.npy"))) == len(entries) > 1
        assert all(entry["identity"] == identity(folder / entry["file"]) for entry in entries)


@pytest.mark.parametrize("kind", ["pretrain", "chat", "preference"])
def test_learned_tokens_and_padding_are_those_of_the_rows_as_the_model_reads_them(root, kind):
    store = open_store(root / kind)
    for split, own in store.info["splits"].items():
        for source, entry in own.items():
            rows = list(store.rows(split, source)) if entry["rows"] else []
            arrays = [row_arrays(row, LENGTH, kind, mask_documents=True) for row in rows]
            assert entry["learned"] == sum(int((array["weights"] > 0).sum()) for array in arrays)
            positions = sum(array["tokens"].size for array in arrays)
            filled = sum(len(row.tokens) for row in rows)
            assert entry["padding"] == (round(1 - filled / positions, 6) if rows else 0)


@pytest.mark.parametrize("kind", ["pretrain", "preference"])
def test_the_index_beside_a_shard_says_which_rows_hold_a_document(root, kind):
    store = open_store(root / kind)
    for source, entry in store.info["splits"]["train"].items():
        held, first = collections.defaultdict(set), 0
        for number, row in enumerate(store.rows("train", source)):
            for name in row.ids:
                held[name].add(number)
        for shard in entry["shards"]:
            index = np.load(root / kind / ids_name(shard["file"]))
            assert index.dtype == ID_ENTRY and index.tolist() == sorted(set(index.tolist()))
            own = set(range(first, first + shard["rows"]))
            expected = {(id_hash(name), row - first) for name, rows in held.items() for row in rows & own}
            assert set(index.tolist()) == expected
            first += shard["rows"]


def test_the_run_ends_with_a_table_of_what_the_store_holds(root, tmp_path, capsys):
    result = token_store.run(config_of(root, "chat"), str(tmp_path / "store"))
    lines = capsys.readouterr().err.split("\n")
    entry = result["splits"]["train"]["zh"]
    (line,) = [line for line in lines if line.startswith("zh, train ")]
    assert line.split()[2:] == [str(entry[name]) for name in ("documents", "rows")] + [
        f"{entry['tokens']:,}",
        f"{entry['padding']:.2%}",
        str(entry["truncated"]),
        str(entry["dropped"]),
    ]


def test_the_real_corpus_wastes_less_than_one_percent_of_positions(root, shared_data):
    with gzip.open(sorted((shared_data / "corpus").glob("*.jsonl.gz"))[0]) as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, 4000)]
    documents = [
        Row(np.array(ids, np.int32), [len(ids)], [str(number)], None, 0)
        for number, ids in enumerate(load_tokenizer(root / "tokenizer").encode_batch(texts))
    ]
    for length in (2048, 4096):
        rows = pack([piece for row in documents for piece in chunks(row, length)], length, seed=0)
        assert sum(len(row.tokens) for row in rows) / (len(rows) * length) > 0.99


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
            assert entry["learned"] == predicted and entry["truncated"] == entry["dropped"] == 0
            assert all(len(row.tokens) <= LENGTH for row in rows)


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
                    ids, learned = CtllmTemplate(trained).render(record["messages"])
                    assert tokens.tolist() == ids[:LENGTH] and mask.tolist() == learned[:LENGTH]
                    assert (record["language"] or "chat") == source
                    seen.append(name)
    expected = [f"c{i}" for i in range(30)] + ["system", "long", "chats:34", "7"]
    assert sorted(seen) == sorted(expected)


def test_only_answers_and_their_ends_are_learned(root):
    trained = load_tokenizer(root / "tokenizer")
    ids, mask = CtllmTemplate(trained).render([{"role": "system", "content": "好"}, *say("问", "答", "再问", "再答")])
    answer, end = trained.piece_id(ASSISTANT), trained.piece_id(END)
    learned = [token for token, flag in zip(ids, mask, strict=True) if flag]
    assert learned == [*trained.encode("答"), end, *trained.encode("再答"), end] and answer not in learned


def test_text_that_looks_like_a_marker_is_text(root):
    trained = load_tokenizer(root / "tokenizer")
    ids, _ = CtllmTemplate(trained).render(say("<|end|><|assistant|>", "</s>"))
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
                given = len(CtllmTemplate(trained).render(record["prompt"])[0]) + 1  # and the marker of the answer
                for side, (_, tokens, mask) in zip(("chosen", "rejected"), segments(row), strict=True):
                    turn = [*record["prompt"], {"role": "assistant", "content": record[side]}]
                    ids, _ = CtllmTemplate(trained).render(turn)
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


def test_answers_stay_where_the_end_of_an_example_is_kept_and_its_lengths_are_counted(root, tmp_path):
    result = token_store.run(config_of(root, "preference", keep="end"), str(tmp_path / "out"))
    totals = collections.Counter()
    for sources in result["splits"].values():
        for entry in sources.values():
            totals.update({name: entry[name] for name in ("truncated", "dropped", "learned")})
            totals["answers"] += entry["tokens_chosen"] + entry["tokens_rejected"]
    assert totals["truncated"] == 2 and totals["dropped"] == 0  # the long question lost its beginning
    assert totals["answers"] == totals["learned"]
    store = open_store(tmp_path / "out")
    end = store.tokenizer.piece_id(END)
    rows = [row for split in result["splits"] for source in store.sources(split) for row in store.rows(split, source)]
    assert {int(part[-1]) for row in rows for part in np.split(row.tokens, [row.lengths[0]])} == {end}


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


@pytest.mark.parametrize(("kind", "documents"), [("chat", 35), ("preference", 23)])
def test_each_shard_reads_its_own_records_alone(root, tmp_path, monkeypatch, kind, documents):
    files, read = [], []
    whole, one = records.read_records, chat_tasks.StoredRecords.__getitem__
    monkeypatch.setattr(records, "read_records", lambda *given: files.append(given) or whole(*given))
    monkeypatch.setattr(chat_tasks.StoredRecords, "__getitem__", lambda own, i: read.append((own, i)) or one(own, i))
    build = token_store.BuildShard.process

    def in_a_process_of_its_own(self, window):
        seqio.TaskRegistry.remove(window.task)
        yield from build(self, window)

    monkeypatch.setattr(token_store.BuildShard, "process", in_a_process_of_its_own)
    result = token_store.run(config_of(root, kind, shards=4), str(tmp_path / "store"))
    assert len(files) == 1 and len(read) == documents
    assert sum(entry["documents"] for split in result["splits"].values() for entry in split.values()) == documents
    assert not (tmp_path / "store" / "records").exists()


# ---- The same bytes


@pytest.mark.parametrize("kind", ["pretrain", "chat", "preference"])
def test_two_runs_write_the_same_bytes_with_any_number_of_workers(root, tmp_path, kind):
    options = ["--direct_running_mode=multi_threading", "--direct_num_workers=2"]
    token_store.run(config_of(root, kind, beam={"runner": "local", "options": options}), str(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(root / kind)


@pytest.mark.parametrize("kind", ["pretrain", "chat"])
def test_a_runner_that_there_is_not_is_said_before_anything_is_written(root, tmp_path, kind):
    with pytest.raises(UserError, match="'NoRunner' is no Beam runner here"):
        token_store.run(config_of(root, kind, beam={"runner": "NoRunner", "options": []}), str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_workers_in_processes_of_their_own_write_the_same_bytes(root, tmp_path):
    options = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    beam = {"runner": "local", "options": options}
    for kind in ("pretrain", "chat"):  # they know no task: they register their own
        token_store.run(config_of(root, kind, beam=beam), str(tmp_path / kind))
        assert contents(tmp_path / kind) == contents(root / kind)


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
                (folder / ids_name(shard.name)).unlink()
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


def test_records_that_changed_within_a_file_are_another_input(root, tmp_path):
    content = (root / "chats.json").read_bytes()
    (tmp_path / "chats.json").write_bytes(content.replace(b'"role"', b'"rule"'))
    with pytest.raises(UserError, match=r"inputs\.data"):
        token_store.run(config_of(root, "chat", input=[str(tmp_path / "chats.json")]), str(root / "chat"))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("chat", {"kind": "story"}, "kind 'story' is unknown; there are: pretrain, chat, preference"),
        ("chat", {"corpus": "somewhere"}, "corpus"),
        ("chat", {"input": []}, "input"),
        ("pretrain", {"corpus": None}, "corpus"),
        ("pretrain", {"input": ["x"]}, "input"),
        ("pretrain", {"packing": "tight"}, "packing 'tight' is unknown; there are: best_fit, wrapped"),
        ("chat", {"packing": "wrapped"}, "would cut conversations"),
        ("pretrain", {"validation_share": 0.0}, "validation_share 0.0 must lie between 0 and 1"),
        ("pretrain", {"validation_share": 1.0}, "validation_share 1.0 must lie between 0 and 1"),
        ("pretrain", {"ratio": {"zh": 1.0}}, "ratio is for kinds chat and preference"),
        ("chat", {"ratio": {"zh": 1.0, "en": -1.0}}, "its parts must not be negative, nor all 0"),
        ("chat", {"ratio": {"zh": 0.0}}, "its parts must not be negative, nor all 0"),
        ("chat", {"keep": "middle"}, "keep 'middle' is unknown; there are: start, end"),
        ("pretrain", {"keep": "end"}, "of documents nothing is cut away"),
        ("pretrain", {"sequence_length": 1}, "sequence_length 1 must be at least 2"),
        ("pretrain", {"shards": -1}, "shards -1 must not be negative"),
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
    with pytest.raises(UserError, match="expected a 'corpus' folder, found 'tokenizer'"):
        run("pretrain", corpus=str(root / "tokenizer"))
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match=r"not a finished folder of `ctllm corpus` \(manifest.json is missing\)"):
        run("pretrain", corpus=str(tmp_path / "half"))
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
