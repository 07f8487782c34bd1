"""The token store: what is written is read back, and a batch is the same however it is laid out."""

import json
import re

import jax
import numpy as np
import pytest
from tiny_models import tiny_tokenizer
from tiny_stores import counting, tiny_store, write_store

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.batches import DataConfig, Stream, global_batch, held_out, make_stream, prefetched, row_arrays
from ctllm_jax.data.record import FORMAT, Row, decode_row, encode_row, ids_name, write_shard
from ctllm_jax.data.store import open_store
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.sharding import MeshConfig, make_mesh

MESHES = {1: (1, 1, 1, 1), 2: (1, 2, 1, 1), 4: (2, 1, 1, 2), 8: (2, 2, 2, 1)}  # devices: data, fsdp, tensor, context
RATES = {"zh": 0.75, "en": 0.25}


def mesh_of(devices: int):
    return make_mesh(MeshConfig(*MESHES[devices]), jax.devices()[:devices])


def stream_of(store, batch_size=8, mask_documents=True) -> Stream:
    return make_stream(DataConfig(str(store.folder), RATES, (), mask_documents), store, batch_size, seed=5)


@pytest.fixture(scope="module", params=["pretrain", "chat", "preference"])
def store(request, tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp(request.param), request.param)


# ---- Records and shards


def equal(a: Row, b: Row) -> bool:
    masks = (a.mask is None) == (b.mask is None) and (a.mask is None or np.array_equal(a.mask, b.mask))
    same = np.array_equal(a.tokens, b.tokens) and list(a.lengths) == list(b.lengths) and list(a.ids) == list(b.ids)
    return masks and same and a.bytes == b.bytes and list(a.starts) == list(b.starts)


@pytest.mark.parametrize(
    "row",
    [
        Row(np.array([1, 125_695, 0], np.int32), [3], ["文档-1"], None, 2**40),
        Row(np.arange(7, dtype=np.int32), np.array([3, 4]), ("a", "b"), np.array([0, 1, 1, 0, 1, 1, 1]), 12, (0, 90)),
    ],
)
def test_a_record_gives_its_row_back(row):
    found = decode_row(encode_row(row))
    assert equal(found, row) and found.tokens.dtype == np.int32
    assert encode_row(found) == encode_row(row)


def test_rows_come_in_order_across_shards(tmp_path):
    random = np.random.default_rng(0)
    rows = [Row(counting(random, 9), [9], [f"d{i}"], None, i) for i in range(11)]
    store = write_store(tmp_path, {"train": {"zh": rows, "en": rows[:2]}}, "pretrain", 9, shards=3)
    assert store.sources("train") == ["en", "zh"] and store.size("train", "zh") == 11
    assert store.sources("validation") == []
    assert all(equal(a, b) for a, b in zip(store.rows("train", "zh"), rows, strict=True))
    assert equal(store.row("train", "zh", 7), rows[7]) and equal(store.row("train", "en", 1), rows[1])
    several = store.read("train", "zh", [10, 0, 7, 0])  # of all shards, in no order, one twice
    assert all(equal(a, rows[i]) for a, i in zip(several, [10, 0, 7, 0], strict=True))
    for index in (-1, 11):
        with pytest.raises(IndexError, match="train/zh has 11 rows"):
            store.row("train", "zh", index)


def test_the_tokenizer_travels_with_the_store(store):
    assert load_tokenizer(store.tokenizer_folder).digest == tiny_tokenizer().digest == store.info["tokenizer"]["digest"]


def test_the_rows_that_hold_a_document_are_found(tmp_path):
    cut = [Row(np.arange(4, dtype=np.int32), [4], ["long"], None, 4, [3 * i]) for i in range(5)]
    both = Row(np.arange(8, dtype=np.int32), [3, 5], ["文档", "long"], None, 8, [0, 15])
    store = write_store(tmp_path, {"train": {"zh": [*cut, both], "en": cut[:1]}}, "pretrain", 8, shards=4)
    assert store.find("train", "zh", "long") == [0, 1, 2, 3, 4, 5] and store.find("train", "en", "long") == [0]
    assert store.find("train", "zh", "文档") == [5] and store.find("train", "zh", "another") == []


# ---- Stores that are not whole


def shard_of(store):
    return sorted(store.folder.glob("train-zh-*.array_record"))[1]


def test_a_missing_shard_is_refused_by_name(tmp_path):
    shard = shard_of(tiny_store(tmp_path))
    shard.unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(shard))}: a shard of the token store is missing; copy it"):
        open_store(tmp_path)


def test_a_missing_id_index_is_refused_by_name(tmp_path):
    index = shard_of(tiny_store(tmp_path)).with_name(ids_name(shard_of(open_store(tmp_path)).name))
    index.unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(index))}: the id index of a shard is missing"):
        open_store(tmp_path).find("train", "zh", "train-zh-7.0")


def test_a_shard_with_other_rows_is_refused(tmp_path):
    store = tiny_store(tmp_path)
    rows = list(open_store(tmp_path).rows("train", "en"))
    write_shard(shard_of(store), rows)
    with pytest.raises(UserError, match=f"{re.escape(str(shard_of(store)))}: changed or cut short"):
        open_store(tmp_path).row("train", "zh", 40)


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_a_shard_that_was_cut_short_is_refused(tmp_path, keep):
    shard = shard_of(tiny_store(tmp_path))
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{re.escape(str(shard))}: changed or cut short"):
        list(open_store(tmp_path).rows("train", "zh"))


def test_damage_in_the_middle_of_a_large_shard_is_noticed_when_it_is_read(tmp_path):
    random = np.random.default_rng(0)
    rows = [Row(random.integers(0, 2**30, 4000).astype(np.int32), [4000], [f"d{i}"], None, 0) for i in range(40)]
    shard = write_store(tmp_path, {"train": {"zh": rows}}, "pretrain", 4000, shards=1).folder.glob("*.array_record")
    (path,) = shard
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)  # size and edges are as they were
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: damaged .*copy it anew"):
        list(open_store(tmp_path).rows("train", "zh"))


def change_manifest(folder, **changes):
    values = json.loads((folder / "manifest.json").read_text())
    values["result"].update(changes)
    (folder / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize(("version", "remedy"), [(FORMAT + 1, "update ctllm-jax"), (FORMAT - 1, "build it again")])
def test_another_format_is_refused(tmp_path, version, remedy):
    change_manifest(tiny_store(tmp_path).folder, format=version)
    with pytest.raises(UserError, match=f"token store format {version}, this version reads {FORMAT}; {remedy}"):
        open_store(tmp_path)


def test_an_unfinished_store_is_refused(tmp_path):
    (tiny_store(tmp_path).folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        open_store(tmp_path)


def test_an_exchanged_tokenizer_is_refused(tmp_path):
    store = tiny_store(tmp_path)
    assert store.tokenizer.digest == tiny_tokenizer().digest
    change_manifest(tmp_path, tokenizer={"vocab_size": 370, "digest": "another"})
    with pytest.raises(UserError, match="tokenizer is not the tokenizer that made this store"):
        _ = open_store(tmp_path).tokenizer


# ---- What the model reads of a row


def test_a_packed_row_reads_as_defined():
    row = Row(np.array([11, 12, 13, 21, 22, 31], np.int32), [3, 2, 1], ["a", "b", "c"], None, 0)
    arrays = row_arrays(row, 8, "pretrain", mask_documents=True)
    expected = {
        "tokens": [11, 12, 13, 21, 22, 31, 0, 0],
        "positions": [0, 1, 2, 0, 1, 0, 0, 0],
        "segments": [1, 1, 1, 2, 2, 3, 0, 0],
        # A segment's last token predicts nothing; what it would have to predict belongs to the next document.
        "labels": [12, 13, 21, 22, 31, 0, 0, 0],
        "weights": [1, 1, 0, 1, 0, 0, 0, 0],
    }
    assert {name: array.tolist() for name, array in arrays.items()} == expected


def test_without_document_masks_a_row_is_one_text():
    row = Row(np.array([11, 12, 13, 21, 22, 31], np.int32), [3, 2, 1], ["a", "b", "c"], None, 0)
    arrays = row_arrays(row, 8, "pretrain", mask_documents=False)
    assert arrays["segments"].tolist() == [1] * 6 + [0] * 2
    assert arrays["positions"].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert arrays["weights"].tolist() == [1] * 5 + [0] * 3


def test_a_chat_row_learns_its_masked_tokens_only():
    row = Row(np.arange(11, 17, dtype=np.int32), [4, 2], ["a", "b"], np.array([0, 1, 0, 1, 1, 1], np.uint8), 0)
    arrays = row_arrays(row, 7, "chat", mask_documents=True)
    assert arrays["labels"][arrays["weights"] > 0].tolist() == [12, 14, 16]
    assert arrays["weights"].tolist() == [1, 0, 1, 0, 1, 0, 0]  # 15 opens its segment: nothing predicts it


@pytest.mark.parametrize("mask_documents", [False, True])
def test_a_preference_row_is_two_sequences(mask_documents):
    row = Row(np.array([1, 2, 3, 4, 1, 2, 9], np.int32), [4, 3], ["p", "p"], np.array([0, 0, 1, 1, 0, 0, 1]), 0)
    arrays = row_arrays(row, 5, "preference", mask_documents)
    expected = {
        "tokens": [[1, 2, 3, 4, 0], [1, 2, 9, 0, 0]],
        "positions": [[0, 1, 2, 3, 0], [0, 1, 2, 0, 0]],
        "segments": [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]],
        "labels": [[2, 3, 4, 0, 0], [2, 9, 0, 0, 0]],
        "weights": [[0, 1, 1, 0, 0], [0, 1, 0, 0, 0]],
        "reference": [0, 0],  # a row of a store has none
    }
    assert {name: array.tolist() for name, array in arrays.items()} == expected


def test_a_full_row_needs_no_padding():
    row = Row(np.arange(10, 16, dtype=np.int32), [6], ["a"], None, 0)
    arrays = row_arrays(row, 6, "pretrain", True)
    assert arrays["tokens"].tolist() == list(range(10, 16)) and arrays["weights"].tolist() == [1] * 5 + [0]


# ---- Batches


@pytest.mark.parametrize("mask_documents", [False, True])
def test_a_batch_holds_the_rows_that_the_order_names(store, mask_documents):
    stream = stream_of(store, mask_documents=mask_documents)
    for step in (0, 3):
        batch = global_batch(stream, step, mesh_of(1))
        for row, place in enumerate(stream.places(step)):
            assert place == stream.mixture.place(step * 8 + row)
            record = store.row("train", place.source, place.index)
            expected = row_arrays(record, store.sequence_length, store.kind, mask_documents)
            assert int(batch["source"][row]) == ["en", "zh"].index(place.source)
            for name, array in expected.items():
                np.testing.assert_array_equal(batch[name][row], array)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_a_batch_is_the_same_on_any_mesh(store, devices):
    stream = stream_of(store)
    alone, spread = global_batch(stream, 2, mesh_of(1)), global_batch(stream, 2, mesh_of(devices))
    assert alone.keys() == spread.keys()
    for name, array in spread.items():
        assert len(array.sharding.device_set) == devices
        np.testing.assert_array_equal(array, alone[name])
    data, fsdp, _, context = MESHES[devices]
    shard = spread["tokens"].addressable_shards[0].data.shape
    assert (shard[0], shard[-1]) == (8 // (data * fsdp), store.sequence_length // context)


def test_prefetched_batches_are_those_of_their_steps(store):
    stream, mesh = stream_of(store), mesh_of(2)
    for step, batch in enumerate(prefetched(stream, 4, 7, mesh), 4):
        jax.tree.map(np.testing.assert_array_equal, batch, global_batch(stream, step, mesh))
    assert step == 6 and list(prefetched(stream, 4, 4, mesh)) == []


def test_a_process_reads_the_rows_of_its_devices_only(store, monkeypatch):
    stream, read = stream_of(store), []
    original = type(store).read

    def watched(self, split, source, indices):
        read.extend((split, source, index) for index in indices)
        return original(self, split, source, indices)

    monkeypatch.setattr(type(store), "read", watched)
    part = stream.arrays(1, range(2, 5))
    assert sorted(read) == sorted(("train", place.source, place.index) for place in stream.places(1)[2:5])
    whole = stream.arrays(1, range(8))
    for name, array in part.items():
        np.testing.assert_array_equal(array, whole[name][2:5])


def test_the_held_out_split_comes_whole_in_order_with_empty_rows_at_the_end(store):
    found = list(held_out(store, "validation", 8, 100, True, mesh_of(2)))
    assert [source for source, _, _ in found] == ["en", "zh", "zh"]
    for name, number in (("en", 0), ("zh", 1)):
        records = list(store.rows("validation", name))
        own = [(size, batch) for source, size, batch in found if source == name]
        assert sum(size for size, _ in own) == sum(row.bytes for row in records)
        stacked = {key: np.concatenate([batch[key] for _, batch in own]) for key in own[0][1]}
        assert set(stacked["source"].tolist()) == {number}
        for place, row in enumerate(records):
            for key, array in row_arrays(row, store.sequence_length, store.kind, True).items():
                np.testing.assert_array_equal(stacked[key][place], array)
        assert not stacked["weights"][len(records) :].any() and not stacked["segments"][len(records) :].any()


def test_at_most_so_many_batches_of_a_source_are_held_out(store):
    found = list(held_out(store, "validation", 2, 2, True, mesh_of(1)))
    assert [source for source, _, _ in found] == ["en", "en", "zh", "zh"]
    expected = [sum(store.row("validation", "zh", i).bytes for i in pair) for pair in ((0, 1), (2, 3))]
    assert [size for source, size, _ in found if source == "zh"] == expected
