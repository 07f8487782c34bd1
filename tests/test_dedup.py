"""Deduplication: folding, signatures and clusters, each against its definition."""

import functools
import os
import resource
import types
import unicodedata

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipeline.dedup import cluster, exchange, graph, kernels, variants
from data_pipeline.dedup.corpora import Corpora
from data_pipeline.dedup.folding import fold
from data_pipeline.dedup.minhash import DedupConfig, _permutations, hash_documents
from data_pipeline.dedup.outcome import Removals
from data_pipeline.dedup.store import HashWriter, open_hashes
from data_pipeline.documents import Document
from data_pipeline.runner import BeamConfig
from data_pipeline.shards import REMOVAL, STEPS, Layout, save_array

SETTINGS = {
    **{"shingle": 5, "bands": 20, "rows": 6, "min_similarity": 0.7, "key_ranges": 4},
    **{"most_edges": 1000, "similar_lines": "", "earlier": ()},
}
CONFIG = DedupConfig(**SETTINGS)
RUNNER = BeamConfig("local")
checked = hypothesis.settings(max_examples=100, deadline=None, derandomize=True)


def documents(*texts, source="zh_cc"):
    return [Document(f"d{i}", "", source, text, {}, i) for i, text in enumerate(texts)]


def text_hashes(*texts, source="zh_cc"):
    return [tuple(row) for row in hash_documents(documents(*texts, source=source), CONFIG).records["text"]]


def random_text(random, size):
    return "".join(map(chr, random.integers(0x4E00, 0x5E00, size)))


@pytest.mark.parametrize("variant", ["hello,世界!", "ＨＥＬＬＯ，世界！", " Hello 世 界\n", "「hello」世界……"])
def test_width_case_punctuation_and_space_do_not_make_a_text_another(variant):
    assert len(set(text_hashes("Hello，世界！", variant))) == 1


def test_letters_and_digits_make_a_text_another():
    assert len(set(text_hashes("第1章", "第2章", "第一章"))) == 3


def test_code_keeps_its_punctuation_but_not_its_layout():
    assert len(set(text_hashes("a+b", "a-b", source="code"))) == 2
    assert len(set(text_hashes("a + b\n", "a+b", source="code"))) == 1
    assert len(set(text_hashes("a+b", "a-b", source="en"))) == 1


@pytest.mark.parametrize(
    "variant", ["乾隆頭髮發麵台灣裏著名瞭解", "干隆头发发面台湾里着名了解", "乾隆頭髮發麪臺灣裡著名瞭解"]
)
def test_script_does_not_make_a_text_another(variant):
    assert len(set(text_hashes("乾隆头发发面台湾里著名了解", variant))) == 1
    assert len(set(text_hashes("乾隆头发发面台湾里著名了解", variant + "清"))) == 2


def test_no_character_stands_in_two_classes_of_variants():
    members = "".join(variants.classes())
    assert len(members) == len(set(members)) > 7000
    assert max(map(len, variants.classes())) <= 7


PLAIN = st.text(st.characters(exclude_categories=()), max_size=40)


@checked
@hypothesis.given(st.lists(st.tuples(PLAIN, st.booleans()), max_size=4))
def test_folding_equals_its_definition(drawn):
    first = {other: own[0] for own in variants.classes() for other in own}

    def plain(text, is_code):
        out = []
        for character in unicodedata.normalize("NFKC", text):
            if unicodedata.category(character)[0] == "L":
                folded = character.casefold()
                character = folded if len(folded) == 1 else character.lower()[0]
            kind = unicodedata.category(character)[0]
            if kind not in "ZC" if is_code else kind in "LNM":
                out.append(first.get(character, character))
        return "".join(out)

    points_T, ends_N = fold([text for text, _ in drawn], [is_code for _, is_code in drawn])
    begins_N = ends_N - np.diff(ends_N, prepend=0)
    found = [points_T[a:b].tobytes().decode("utf-32-le") for a, b in zip(begins_N, ends_N, strict=True)]
    assert found == [plain(text, is_code) for text, is_code in drawn]


def plain_minhash(text, shingle, factors, addends):
    """The signature of one text by Python's integers."""
    signature = [0xFFFFFFFF] * len(factors)
    for begin in range(len(text) - shingle + 1):
        value = 0
        for character in text[begin : begin + shingle]:
            value = (value * 0x9E3779B97F4A7C15 + ord(character)) % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = (value ^ value >> shift) * factor % 2**64
        base = (value ^ value >> 31) >> 32
        for p, (factor, addend) in enumerate(zip(factors, addends, strict=True)):
            permuted = (base * factor + addend) % 2**32
            signature[p] = min(signature[p], permuted ^ permuted >> 15)
    return signature


@checked
@hypothesis.given(st.lists(st.text(st.sampled_from("一二三ab𠀀"), max_size=30), max_size=4), st.integers(1, 13))
def test_signatures_equal_their_definition(texts, shingle):
    permutations = _permutations(7)
    points_T = np.array([ord(c) for text in texts for c in text], np.uint32)
    ends_N = np.cumsum([len(text) for text in texts], dtype=np.int64)
    found = kernels.minhash(points_T, ends_N, shingle, *permutations)
    plain = [part.tolist() for part in permutations]
    assert found.tolist() == [plain_minhash(text, shingle, *plain) for text in texts]


def test_texts_that_fold_to_nothing_are_compared_as_they_are():
    assert len(set(text_hashes("！！！", "？？？"))) == 2


def test_the_share_of_equal_signature_values_estimates_jaccard_similarity():
    random = np.random.default_rng(1)
    for overlap in (0.5, 0.8, 0.95):
        base = random_text(random, 4000)
        other = base[: int(4000 * overlap)] + random_text(random, 4000 - int(4000 * overlap))
        shingles = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (base, other)]
        true = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
        signatures = kernels.minhash(*fold([base, other], [False, False]), 5, *_permutations(1024))
        assert (signatures[0] == signatures[1]).mean() == pytest.approx(true, abs=4 * (true * (1 - true) / 1024) ** 0.5)


def test_a_signature_does_not_depend_on_the_batch():
    random = np.random.default_rng(2)
    texts = [random_text(random, size) for size in (3, 5, 200, 0, 50)]
    together = hash_documents(documents(*texts), CONFIG)
    for i, text in enumerate(texts):
        alone = hash_documents(documents(text), CONFIG)
        assert (alone.signatures[0] == together.signatures[i]).all()
    assert together.records["hashed"].tolist() == [False, True, True, False, True]


def test_hashes_come_back_from_the_disk_whole_in_part_and_selected(tmp_path):
    with HashWriter(tmp_path / "some") as writer:
        for texts in (["一二三四五六"], [], ["七八九十百千", "x"]):
            writer.append(hash_documents(documents(*texts), CONFIG))
        assert not (tmp_path / "some.hashes").exists()
    found = open_hashes(tmp_path / "some")
    alone = hash_documents(documents("七八九十百千", "x"), CONFIG)
    assert [found.id(i) for i in range(3)] == ["d0", "d0", "d1"]
    assert (found.signatures[1:] == alone.signatures).all()
    last = found.part(1, 3).select(np.array([1]))
    assert (last.id(0), last.records["text"].tolist()) == ("d1", alone.records["text"][1:].tolist())
    assert len(found.select(np.array([], int))) == 0
    with HashWriter(tmp_path / "none"):
        pass
    assert len(open_hashes(tmp_path / "none")) == 0


def test_another_file_under_the_same_name_is_read_anew(tmp_path):
    for text in ("一二三四五六", "七八九十百千"):
        with HashWriter(tmp_path / "some") as writer:
            writer.append(hash_documents(documents(text), CONFIG))
        found = open_hashes(tmp_path / "some").records["text"]
        assert (found == hash_documents(documents(text), CONFIG).records["text"]).all()


def test_hashes_of_a_failed_block_are_not_there(tmp_path):
    with pytest.raises(RuntimeError), HashWriter(tmp_path / "some") as writer:
        writer.append(hash_documents(documents("一"), CONFIG))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_what_was_repeated_is_named_with_few_files_open(tmp_path):
    """Each of 60 documents repeats one of another shard."""
    count, layout = 60, Layout(str(tmp_path / "own"))
    stems = tuple(tmp_path / f"earlier{number}" for number in range(count))
    for number, stem in enumerate((*stems, layout.all_hashes(0))):
        stem.parent.mkdir(parents=True, exist_ok=True)
        texts = [Document(f"e{number}", "", "zh_cc", "一", {}, 0)] * (count if number == count else 1)
        with HashWriter(stem) as writer:
            writer.append(hash_documents(texts, CONFIG))
    for step in STEPS:
        records = np.zeros(count if step == "exact" else 0, REMOVAL)
        records["row"] = records["of_shard"] = np.arange(len(records))
        save_array(layout.removals(step, 0), records)
    limits, lowest = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
    os.close(lowest)  # the first number that is free
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 20, limits[1]))
    try:
        found = Removals(0, Corpora(stems, layout, 1))
        assert [found(row).duplicate_of for row in range(count)] == [f"e{row}" for row in range(count)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_bands_are_equal_exactly_where_their_rows_are():
    signatures = np.random.default_rng(3).integers(0, 2**32, (2, 120), np.uint32)
    signatures[1, 6:12] = signatures[0, 6:12]
    keys = kernels.band_hashes(signatures, 20)
    assert (keys[:, 0] == keys[:, 1]).tolist() == [band == 1 for band in range(20)]


def test_repeats_point_to_the_first_document_in_any_order():
    keyed = np.array([[1, 9, 50], [2, 2, 40], [1, 9, 30], [1, 8, 20], [1, 9, 10]], np.uint64)
    for order in (slice(None), slice(None, None, -1)):
        found = cluster.repeats(keyed[order])
        assert sorted(map(tuple, found.tolist())) == [(10, 30), (10, 50)]


def test_candidates_hold_the_first_and_the_previous_document():
    found = cluster.candidates(np.array([[0, 3], [0, 1], [0, 2], [0, 4]], np.uint64))
    assert found.tolist() == [[1, 2], [1, 3], [1, 4], [2, 3], [3, 4]]


def test_components_equal_a_plain_union_find_and_keep_the_smallest():
    random = np.random.default_rng(4)
    pairs = random.integers(0, 300, (200, 2)).astype(np.uint64) << np.uint64(20)
    parent = {}

    def root(node):
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for a, b in pairs.tolist():
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    expected = sorted((root(node), node) for node in parent if root(node) != node)
    for order in (slice(None), slice(None, None, -1)):
        assert sorted(map(tuple, cluster.components(pairs[order]).tolist())) == expected
    assert cluster.components(np.zeros((0, 2), np.uint64)).shape == (0, 2)


def graphs():
    """Random ones, a long path and a star, whose documents lie anywhere."""
    random = np.random.default_rng(5)
    places = np.sort(random.choice(1 << 40, 400, replace=False)).astype(np.uint64)
    path = np.stack([np.arange(99), np.arange(1, 100)], 1)
    star = np.stack([np.full(50, 0), np.arange(1, 51)], 1)
    for pairs in (random.integers(0, 400, (300, 2)), random.permutation(path), star, star[:0]):
        pairs = np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
        yield places[pairs]


@pytest.mark.parametrize("edges", list(graphs()))
def test_rounds_on_parts_of_a_graph_end_in_its_components(edges, tmp_path):
    files = []
    for i, part in enumerate(np.array_split(edges, 3)):
        files.append(tmp_path / f"{i}.npy")
        np.save(files[-1], part)
    whole = graph.join(files, tmp_path / "one", 10_000, 4, RUNNER)
    rounds = graph.join(files, tmp_path / "many", -1, 4, RUNNER)
    assert len(whole) == 1 and len(rounds) == 4
    joined = np.concatenate([np.load(path) for path in rounds])
    assert (joined[np.argsort(joined[:, 1])] == np.load(whole[0])).all()
    assert not list(tmp_path.rglob("*.rows"))


class Killed(Exception):
    """What comes in the place of a signal."""


def test_rounds_that_are_killed_while_an_earlier_one_is_deleted_end_in_the_same_components(tmp_path):
    """First with all of its folder there, then with its results gone and the marks of its writers still there."""
    edges = np.array([[1, 2], [2, 3], [3, 4], [4, 5], [5, 6]], np.uint64)
    np.save(tmp_path / "edges.npy", edges)
    arguments = [tmp_path / "edges.npy"], tmp_path / "many", -1, 2, RUNNER
    for gone in ("", "*.out.npy"):

        def die(folder, gone=gone):
            for path in folder.glob(gone) if gone else ():
                path.unlink()
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graph, "shutil", types.SimpleNamespace(rmtree=die))
            with pytest.raises(Killed):
                graph.join(*arguments)
    joined = np.concatenate([np.load(path) for path in graph.join(*arguments)])
    assert sorted(map(tuple, joined.tolist())) == [(1, i) for i in range(2, 7)]
    assert len(list((tmp_path / "many").glob("*0"))) == 0


def _numbers(seed, parts):
    keys = np.random.default_rng(seed).integers(0, 2**63, (1000 * seed, 2)).astype(np.uint64)
    for chunk in np.array_split(keys, 3):
        yield exchange.part_of(chunk[:, 0], parts), chunk


def test_every_row_reaches_the_part_of_its_key_and_no_other(tmp_path):
    chunks = functools.partial(_numbers, parts=7)
    arguments = (RUNNER, tmp_path, [0, 1, 2], chunks, 7, 2, cluster.distinct)
    parts = [np.load(path) for path in exchange.run_through_files(*arguments)]
    assert [set((part[:, 0] % 7).tolist()) for part in parts] == [{i} for i in range(7)]
    sent = np.concatenate([chunk for seed in (1, 2) for _, chunk in _numbers(seed, 7)])
    assert (cluster.distinct(np.concatenate(parts)) == cluster.distinct(sent)).all()


def test_document_numbers_order_by_shard_then_row_and_come_apart_again():
    numbers = cluster.number(70_000, np.array([0, 2**32 - 1]))
    assert cluster.shard_of(numbers).tolist() == [70_000] * 2
    assert cluster.row_of(numbers).tolist() == [0, 2**32 - 1]
    assert cluster.number(1, np.array([0]))[0] > cluster.number(0, np.array([2**32 - 1]))[0]


@pytest.mark.parametrize(
    "change", [{"bands": 0}, {"rows": 0}, {"min_similarity": 1.5}, {"key_ranges": 1000}, {"similar_lines": "x"}]
)
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(ValueError):
        DedupConfig(**SETTINGS | change)
