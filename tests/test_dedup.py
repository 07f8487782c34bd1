"""Deduplication: folding, signatures and clusters, each against its definition."""

import numpy as np
import pytest

from data_pipeline.dedup import cluster
from data_pipeline.dedup.minhash import DedupConfig, Hashes, band_hashes, fold, hash_documents, minhash
from data_pipeline.documents import Document

CONFIG = DedupConfig(shingle=5, bands=20, rows=6, min_similarity=0.7, key_ranges=4)


def documents(*texts, source="zh_cc"):
    return [Document(f"d{i}", "", source, text, {}, i) for i, text in enumerate(texts)]


def text_hashes(*texts, source="zh_cc"):
    return [tuple(row) for row in hash_documents(documents(*texts, source=source), CONFIG).text_hash]


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


def test_texts_that_fold_to_nothing_are_compared_as_they_are():
    assert len(set(text_hashes("！！！", "？？？"))) == 2


def test_the_share_of_equal_signature_values_estimates_jaccard_similarity():
    random = np.random.default_rng(1)
    for overlap in (0.5, 0.8, 0.95):
        base = random_text(random, 4000)
        other = base[: int(4000 * overlap)] + random_text(random, 4000 - int(4000 * overlap))
        shingles = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (base, other)]
        true = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
        signatures, hashed = minhash(*fold([base, other], [False, False]), 5, 1024)
        assert hashed.all()
        assert (signatures[0] == signatures[1]).mean() == pytest.approx(true, abs=4 * (true * (1 - true) / 1024) ** 0.5)


def test_a_signature_does_not_depend_on_the_batch():
    random = np.random.default_rng(2)
    texts = [random_text(random, size) for size in (3, 5, 200, 0, 50)]
    together = hash_documents(documents(*texts), CONFIG)
    for i, text in enumerate(texts):
        alone = hash_documents(documents(text), CONFIG)
        assert (alone.signatures[0] == together.signatures[i]).all()
    assert together.hashed.tolist() == [False, True, True, False, True]


def test_batches_join_in_order_and_none_gives_none():
    parts = [
        hash_documents(documents("一二三四五六"), CONFIG),
        hash_documents(documents("七八九十百千", "x"), CONFIG),
    ]
    joined = Hashes.concatenate(parts, CONFIG)
    assert joined.ids == ("d0", "d0", "d1") and joined.signatures.shape == (3, 120)
    assert Hashes.concatenate([], CONFIG).signatures.shape == (0, 120)


def test_bands_are_equal_exactly_where_their_rows_are():
    signatures = np.random.default_rng(3).integers(0, 2**32, (2, 120), np.uint32)
    signatures[1, 6:12] = signatures[0, 6:12]
    keys = band_hashes(signatures, 20)
    assert (keys[0] == keys[1]).tolist() == [band == 1 for band in range(20)]


def test_repeats_point_to_the_first_document_in_any_order():
    keys = np.array([[1, 9], [2, 2], [1, 9], [1, 8], [1, 9]], np.uint64)
    numbers = np.array([50, 40, 30, 20, 10], np.uint64)
    for order in (slice(None), slice(None, None, -1)):
        found = cluster.repeats(keys[order], numbers[order])
        assert sorted(map(tuple, found.tolist())) == [(10, 30), (10, 50)]


def test_candidates_hold_the_first_and_the_previous_document():
    found = cluster.candidates(np.zeros(4, np.uint64), np.array([3, 1, 2, 4], np.uint64))
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


def test_document_numbers_order_by_shard_then_row_and_come_apart_again():
    numbers = cluster.number(70_000, np.array([0, 2**32 - 1]))
    assert cluster.shard_of(numbers).tolist() == [70_000] * 2
    assert cluster.row_of(numbers).tolist() == [0, 2**32 - 1]
    assert cluster.number(1, np.array([0]))[0] > cluster.number(0, np.array([2**32 - 1]))[0]


@pytest.mark.parametrize("change", [{"bands": 0}, {"rows": 0}, {"min_similarity": 1.5}, {"key_ranges": 1000}])
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(ValueError):
        DedupConfig(**{"shingle": 5, "bands": 20, "rows": 6, "min_similarity": 0.7, "key_ranges": 4} | change)
