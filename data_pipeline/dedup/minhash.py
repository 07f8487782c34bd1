"""What deduplication knows of a document: hashes of its id and folded text, and a MinHash signature.

Folding (NFKC, lower case, no punctuation, symbols or space) makes variants in width, case, punctuation and
spacing equal; traditional and simplified script stay apart. Code keeps its punctuation: `a+b` is not `a-b`.
Shapes: N documents, T folded characters, P = bands * rows permutations.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Sequence

import numpy as np
import xxhash

from data_pipeline.documents import Document
from data_pipeline.filters.batch import code_points, sum_per_document
from data_pipeline.filters.tables import categories

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class DedupConfig:
    """MinHash over `shingle` characters; a pair that agrees in all rows of a band is compared in full.

    key_ranges: parts into which each band (and the exact hashes) are split, the unit of parallel work.
    """

    shingle: int
    bands: int
    rows: int
    min_similarity: float
    key_ranges: int

    def __post_init__(self) -> None:
        if min(self.shingle, self.bands, self.rows, self.key_ranges) < 1 or self.bands > 255 or self.key_ranges > 256:
            raise ValueError("shingle, bands (<= 255), rows and key_ranges (<= 256) must be at least 1")
        if not 0 <= self.min_similarity <= 1:
            raise ValueError(f"min_similarity must lie in 0..1, not {self.min_similarity}")


@dataclasses.dataclass(frozen=True)
class Hashes:
    """Hashes of N documents. `hashed` is false where a text is shorter than a shingle (no signature)."""

    id_hash: np.ndarray  # [N, 2] uint64
    text_hash: np.ndarray  # [N, 2] uint64
    signatures: np.ndarray  # [N, P] uint32
    hashed: np.ndarray  # [N] bool
    ids: tuple[str, ...]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything but the signatures, as plain arrays."""
        encoded = [identity.encode() for identity in self.ids]
        return {
            "id_hash": self.id_hash,
            "text_hash": self.text_hash,
            "hashed": self.hashed,
            "ids": np.frombuffer(b"".join(encoded), np.uint8),
            "id_ends": np.cumsum([len(item) for item in encoded], dtype=np.int64),
        }

    @staticmethod
    def concatenate(parts: Sequence["Hashes"], config: DedupConfig) -> "Hashes":
        """Joins batches; no batch at all gives zero documents."""
        parts = list(parts) or [hash_documents([], config)]
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("id_hash", "text_hash", "signatures", "hashed")
        }
        return Hashes(**joined, ids=tuple(identity for part in parts for identity in part.ids))


def hash_documents(documents: Sequence[Document], config: DedupConfig) -> Hashes:
    """Hashes a batch of documents."""
    points_T, ends_N = fold([d.text for d in documents], [d.source == "code" for d in documents])
    starts_N = np.concatenate([[0], ends_N[:-1]]) if len(ends_N) else ends_N
    folded = [points_T[a:b].tobytes() for a, b in zip(starts_N, ends_N, strict=True)]
    # a text that folds to nothing is compared as it is
    text_keys = [text or document.text.encode() for text, document in zip(folded, documents, strict=True)]
    signatures, hashed = minhash(points_T, ends_N, config.shingle, config.bands * config.rows)
    ids = tuple(document.id for document in documents)
    return Hashes(_xxh128([item.encode() for item in ids]), _xxh128(text_keys), signatures, hashed, ids)


def fold(texts: Sequence[str], is_code: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """(points_T uint32, ends_N): folded code points of all texts one after the other."""
    points, ends = code_points([unicodedata.normalize("NFKC", text).lower() for text in texts])
    lengths = np.diff(np.concatenate([[0], ends]))
    keep = _word_characters()[points] | (np.repeat(np.array(is_code, bool), lengths) & _printed_characters()[points])
    return points[keep], np.cumsum(sum_per_document(keep, ends), dtype=np.int64)


def minhash(points_T: np.ndarray, ends_N: np.ndarray, shingle: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(signatures [N, count] uint32, hashed [N]): per permutation, the least hash of the document's shingles.

    Shingles are hashed to 64 bits, mixed, cut to 32 and permuted by odd multipliers modulo 2**32.
    """
    lengths_N = np.diff(np.concatenate([[0], ends_N]))
    windows_N = np.maximum(lengths_N - shingle + 1, 0)
    hashed = windows_N > 0
    signatures = np.full((len(ends_N), count), 0xFFFFFFFF, np.uint32)
    if not hashed.any():
        return signatures, hashed
    room = len(points_T) - shingle + 1
    value = np.zeros(room, np.uint64)
    for offset in range(shingle):
        value = value * _MULTIPLIER + points_T[offset : offset + room]
    inside = np.arange(room) + shingle <= np.repeat(ends_N, lengths_N)[:room]
    value = _mix(value[inside])
    base = (value >> np.uint64(32)).astype(np.uint32)
    first = np.concatenate([[0], np.cumsum(windows_N[hashed])[:-1]])
    for column, (factor, addend) in enumerate(zip(*_permutations(count), strict=True)):
        permuted = base * factor + addend
        permuted ^= permuted >> np.uint32(15)
        signatures[hashed, column] = np.minimum.reduceat(permuted, first)
    return signatures, hashed


def band_hashes(signatures: np.ndarray, bands: int) -> np.ndarray:
    """[N, bands] uint64: one key per band of a signature."""
    split = signatures.reshape(len(signatures), bands, signatures.shape[1] // bands).astype(np.uint64)
    keys = np.zeros(split.shape[:2], np.uint64)
    for row in range(split.shape[2]):
        keys = _mix((keys ^ split[:, :, row]) * _MULTIPLIER)
    return keys


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _xxh128(items: Sequence[bytes]) -> np.ndarray:
    digests = b"".join(xxhash.xxh3_128_digest(item) for item in items)
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


@functools.cache
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and addends, the same for ever: signatures of different runs can be compared."""
    seeds = _mix(np.arange(1, 2 * count + 1, dtype=np.uint64) * _MULTIPLIER).astype(np.uint32)
    return seeds[:count] | np.uint32(1), seeds[count:]


@functools.cache
def _word_characters() -> np.ndarray:
    return np.isin(categories(), np.frombuffer(b"LNM", np.uint8))


@functools.cache
def _printed_characters() -> np.ndarray:
    return ~np.isin(categories(), np.frombuffer(b"ZC", np.uint8))
