"""Vocabularies and SeqIO tasks of documents: nothing lost, nothing moved."""

import itertools
import pathlib

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from tiny_records import say
from tiny_stages import SUBSETS, dataset_of, documents, stages

from ctllm_jax.data.tokenizer import load_tokenizer
from data_pipeline import chat_tasks, map_cc, tasks
from data_pipeline.splits import is_held_out
from data_pipeline.vocabulary import TokenizerVocabulary, vocabulary

TOKENIZERS = ("tokenizer", "hugging_face")  # folders below `stages()`: SentencePiece, tokenizer.json


@pytest.fixture(scope="module")
def root() -> pathlib.Path:
    return stages()


# ---- Vocabularies


TRICKY = ["从前有座山，山里有座庙。", "", " two  spaces\n\n\tlines ", "𠮷野家 ＡＢＣ é\u0301 🙂", "<s>\x00</s>", "!!!"]


def test_only_other_models_than_sentencepiece_need_a_vocabulary_of_ours(root):
    kinds = [type(vocabulary(load_tokenizer(root / name))) for name in TOKENIZERS]
    assert kinds == [seqio.SentencePieceVocabulary, TokenizerVocabulary]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_vocabulary_encodes_and_decodes_as_its_tokenizer(root, name):
    ours = load_tokenizer(root / name)
    theirs = vocabulary(ours)
    assert theirs.vocab_size == ours.vocab_size and theirs.eos_id == ours.eos_id
    assert theirs == vocabulary(load_tokenizer(root / name))  # else SeqIO mixes no two tasks
    for text in TRICKY:
        ids = ours.encode(text)
        assert list(theirs.encode(text)) == ids and theirs.encode_tf(tf.constant(text)).numpy().tolist() == ids
        assert theirs.decode(ids) == text
        assert theirs.decode_tf(tf.constant(ids, tf.int32)).numpy().decode() == text


def test_a_vocabulary_decodes_up_to_the_end_of_the_document(root):
    ours = load_tokenizer(root / "hugging_face")
    theirs, ids = vocabulary(ours), ours.encode("fox")
    rows = np.array([[*ids, ours.eos_id, *[0] * 3], [*ids, *ids, *[ours.eos_id] * (4 - len(ids))]], np.int32)
    assert ours.decode([0] * 3) == "!!!"  # id 0, with which SeqIO pads, is a piece
    assert theirs.decode(rows[0].tolist()) == "fox"
    assert [text.decode() for text in theirs.decode_tf(tf.constant(rows)).numpy()] == ["fox", "foxfox"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_batches_are_encoded_as_seqio_encodes_one_by_one(root, name):
    ours = load_tokenizer(root / name)
    texts = [text for own in documents(root).values() for text in own.values()] * 6 + TRICKY
    assert len(texts) > tasks.BATCH and len(texts) % tasks.BATCH
    given = {"id": [f"d{i}" for i in range(len(texts))], "text": texts}
    batched = tasks.tokenize_documents(tf.data.Dataset.from_tensor_slices(given), ours)
    features = {"text": seqio.Feature(vocabulary(ours), add_eos=False, dtype=tf.int32)}
    one_by_one = seqio.preprocessors.tokenize(tf.data.Dataset.from_tensor_slices(given), features, False)
    pairs = list(zip(batched.as_numpy_iterator(), one_by_one.as_numpy_iterator(), strict=True))
    start = [] if ours.bos_id is None else [ours.bos_id]
    for found, expected in pairs:
        assert found["targets"].tolist() == [*start, *expected["text"], ours.eos_id]
        assert found["id"] == expected["id"]
    assert [found["bytes"] for found, _ in pairs] == [len(text.encode()) for text in texts]


# ---- Documents


@pytest.fixture(scope="module")
def seqio_examples(root) -> dict[str, dict[str, list[dict]]]:
    """{split: {subset: examples}} of the corpus tasks."""
    folders = map_cc.subset_folders(root / "corpus")
    names = tasks.corpus_tasks(folders, load_tokenizer(root / "tokenizer"), 0.25)
    assert names.keys() == SUBSETS.keys()
    return {
        split: {subset: dataset_of(task, split) for subset, task in names.items()} for split in ("train", "validation")
    }


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
    names = chat_tasks.chat_tasks(chat_tasks.divide(records, "chat", 0.25), load_tokenizer(root / "tokenizer"))
    for split, expected in ids.items():
        assert {example["id"].decode() for example in dataset_of(names["chat"], split)} == expected


def test_the_held_out_documents_of_a_larger_share_include_those_of_a_smaller_one_and_never_change():
    names = [f"doc{i}" for i in range(4000)]
    held = {share: {n for n in names if is_held_out(tf.constant(n), share)} for share in (0.01, 0.1, 0.25)}
    assert held[0.01] < held[0.1] < held[0.25]
    assert all(abs(len(own) / 4000 - share) < 4 * (share / 4000) ** 0.5 for share, own in held.items())
    # Another hash would move documents of old stores between the splits.
    assert [i for i in range(40) if f"doc{i}" in held[0.25]] == [9, 14, 16, 21, 24, 31, 36, 37]


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


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_standard_decoder_features_decode_to_the_documents(root, name):
    trained = load_tokenizer(root / name)
    tasks.corpus_tasks(map_cc.subset_folders(root / "corpus"), trained, 0.25)
    dataset = seqio.get_dataset(
        "map_cc_code", {"targets": 1024}, seqio.LMFeatureConverter(pack=False), dataset_split="train", shuffle=False
    )
    found = [vocabulary(trained).decode(e["decoder_target_tokens"].tolist()) for e in dataset.as_numpy_iterator()]
    texts = list(documents(root)["code"].values())
    assert set(found) & set(texts)  # the longer ones are cut
    assert all(any(text.startswith(start) for text in texts) for start in found)


def data_set(folder: pathlib.Path, lengths: list[int]) -> str:
    """A data set of documents d0, d1, ..., so many in each file."""
    folder.mkdir(parents=True, exist_ok=True)
    features = tfds.features.FeaturesDict({"id": tfds.features.Text(), "text": tfds.features.Text()})
    names = iter(range(sum(lengths)))
    for number, length in enumerate(lengths):
        with tf.io.TFRecordWriter(str(folder / f"own-train.tfrecord-{number:05d}-of-{len(lengths):05d}")) as writer:
            for name in itertools.islice(names, length):
                writer.write(features.serialize_example({"id": f"d{name}", "text": f"text {name}"}))
    template = tfds.core.naming.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name="own", split="train", filetype_suffix="tfrecord"
    )
    split = tfds.core.SplitInfo(name="train", shard_lengths=lengths, num_bytes=0, filename_template=template)
    tfds.folder_dataset.write_metadata(data_dir=str(folder), features=features, split_infos=[split])
    return str(folder)


@pytest.fixture(scope="module")
def three_files(tmp_path_factory) -> str:
    """A data set of ten documents in three files of unequal size."""
    return data_set(tmp_path_factory.mktemp("tfds") / "own" / "all" / "1.0.0", [2, 5, 3])


@pytest.mark.parametrize(("count", "shuffle"), [(1, False), (2, False), (4, False), (4, True), (12, False)])
def test_every_document_is_in_one_shard_whatever_their_number(three_files, count, shuffle):
    source = tasks.HeldOutTfdsSource(three_files, 0.5)
    assert len(source.list_shards("train")) == 3

    def read(split: str, shuffle: bool, **options) -> list[str]:
        return [e["id"].decode() for e in source.get_dataset(split, shuffle, **options).as_numpy_iterator()]

    whole = {split: read(split, False) for split in tasks.SPLITS}
    assert all(whole.values()) and sorted(sum(whole.values(), [])) == [f"d{i}" for i in range(10)]
    for split, expected in whole.items():
        parts = [read(split, shuffle, seed=1, shard_info=seqio.ShardInfo(i, count)) for i in range(count)]
        assert sorted(sum(parts, [])) == sorted(expected)
        assert shuffle or sum(parts, []) == expected  # in the order of the files
        assert max(map(len, parts)) <= -(-10 // count)


def test_a_corpus_made_anew_in_the_same_folder_is_read_whole(tmp_path):
    for count in (5, 9):
        source = tasks.HeldOutTfdsSource(data_set(tmp_path / "own" / "all" / "1.0.0", [count]), 0.5)
        found = [e["id"] for split in tasks.SPLITS for e in source.get_dataset(split, False).as_numpy_iterator()]
        assert len(found) == count
