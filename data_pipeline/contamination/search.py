"""Texts beside the index: which items each one holds, how much of them, and where.

A text has seen an item where at least `min_coverage` of the item's units lie in n-grams that both have. What others
take, for comparison: GPT-3 one shared n-gram of 8 to 13 words, by the benchmark (arXiv 2005.14165, C); PaLM 70 % of an
item's 8-grams (2204.02311); Llama 2 the share of an item's tokens in shared n-grams of more than 10 (2307.09288, A.6);
Qwen2.5 a common subsequence of 13 tokens that is 60 % of the shorter text (2412.15115); Tulu 3 half of an item's tokens
in shared 8-grams (2411.15124). Ours is Tulu 3's measure on n-grams of 13; min_coverage 0 is GPT-3's rule.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from data_pipeline.contamination import kernels
from data_pipeline.contamination.index import Index
from data_pipeline.contamination.units import units_of


@dataclasses.dataclass(frozen=True)
class Match:
    """What a text shares with an item.

    covered_U: which of the item's units lie in shared n-grams.
    begin, end: the text's units from the first shared n-gram to the last.
    """

    covered_U: np.ndarray
    begin: int
    end: int

    @property
    def coverage(self) -> float:
        """Share of the item's units, as it is compared and recorded."""
        return round(float(self.covered_U.mean()), 4)

    @property
    def longest(self) -> int:
        """Units of the item's longest stretch that is covered without a gap."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], self.covered_U.view(np.uint8), [0]]).astype(np.int8)))
        return int((edges[1::2] - edges[::2]).max(initial=0))


def find(texts: Sequence[str], index: Index) -> list[dict[int, Match]]:
    """For each text, the items of which it has an n-gram at least."""
    units = units_of(texts)
    grams_U = kernels.ngrams(units.hash_U, units.ends_N, index.n)
    place_M, key_M = kernels.find(grams_U, index.filter_W, index.keys_K)
    found: list[dict[int, Match]] = [{} for _ in texts]
    text_M = np.searchsorted(units.ends_N, place_M, side="right")
    for text in np.unique(text_M).tolist():
        first = units.ends_N[text - 1] if text else 0
        here = text_M == text
        found[text] = _matches(place_M[here] - first, key_M[here], index)
    return found


def join(matches: Iterable[Match]) -> np.ndarray:
    """What several pieces of a text cover together of one item."""
    return np.logical_or.reduce([match.covered_U for match in matches])


def _matches(place_M: np.ndarray, key_M: np.ndarray, index: Index) -> dict[int, Match]:
    """{item: match} of one text. An n-gram that it repeats costs what it costs once."""
    keys, first_M = np.unique(key_M, return_index=True)
    last_M = len(key_M) - 1 - np.unique(key_M[::-1], return_index=True)[1]
    covered: dict[int, np.ndarray] = {}
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    for key, begin, last in zip(keys.tolist(), place_M[first_M].tolist(), place_M[last_M].tolist(), strict=True):
        places = slice(index.first_K[key], index.first_K[key + 1])
        for item, place in zip(index.item_P[places].tolist(), index.place_P[places].tolist(), strict=True):
            if item not in covered:
                covered[item] = np.zeros(index.units_I[item], bool)
            covered[item][place : place + index.n] = True
            begins[item] = min(begins.get(item, begin), begin)
            ends[item] = max(ends.get(item, 0), last + index.n)
    return {item: Match(covered[item], begins[item], ends[item]) for item in covered}
