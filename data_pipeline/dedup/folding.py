"""Texts as deduplication compares them: NFKC, without case, script variants, punctuation, symbols and space.

Variants in width, case, spacing, punctuation and script (traditional, simplified, regional: `variants.py`) become
equal. Code keeps its punctuation: `a+b` is not `a-b`. What is kept of a document is never folded.
Shapes: N documents, T code points of all of them one after the other.
"""

import functools
from collections.abc import Sequence

import numpy as np

from data_pipeline.dedup import kernels, variants
from data_pipeline.filters import batch, tables


def fold(texts: Sequence[str], is_code: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """(points_T uint32, ends_N): folded code points of all texts one after the other."""
    points_T, ends_N = batch.fold(texts, *batch.code_points(texts))
    return kernels.keep_images(points_T, ends_N, np.array(is_code, bool), *_images())


def fold_words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """As `fold`, but what is left out of a text stands there as a space each, so that words stay apart."""
    points_T, ends_N = batch.fold(texts, *batch.code_points(texts))
    image = _apart()
    return kernels.keep_images(points_T, ends_N, np.zeros(len(texts), bool), image, image)


@functools.cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    """[CODES] uint32 each, for text and for code: what a character of NFKC text becomes; 0: it is left out."""
    image = np.arange(tables.CODES, dtype=np.uint32)
    for code in np.flatnonzero(tables.categories() == ord("L")).tolist():
        image[code] = ord(_caseless(chr(code)))
    for first, *others in variants.classes():
        image[[ord(other) for other in others]] = ord(first)
    categories = tables.categories()
    words = np.isin(categories, np.frombuffer(b"LNM", np.uint8))
    printed = ~np.isin(categories, np.frombuffer(b"ZC", np.uint8))
    return np.where(words, image, 0), np.where(printed, image, 0)


@functools.cache
def _apart() -> np.ndarray:
    """[CODES] uint32: the image for text, with a space for what it leaves out."""
    return np.maximum(_images()[0], np.uint32(ord(" ")))


def _caseless(letter: str) -> str:
    """Unicode's case folding where that is one character (ς is σ), else the first of the small letter's (İ is i)."""
    folded = letter.casefold()
    return folded if len(folded) == 1 else letter.lower()[0]
