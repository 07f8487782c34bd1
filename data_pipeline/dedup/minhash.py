"""What deduplication knows of a document: hashes of its id and folded text, and a MinHash signature.

Shapes: N documents, T folded characters, P = bands * rows permutations.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import xxhash

from data_pipeline.dedup import kernels
from data_pipeline.dedup.folding import fold
from data_pipeline.dedup.similar_lines import RULES
from data_pipeline.dedup.store import RECORD, Hashes
from data_pipeline.documents import Document


@dataclasses.dataclass(frozen=True)
class DedupConfig:
    """MinHash over `shingle` characters; a pair that agrees in all rows of a band is compared in full.

    min_similarity: [share] of equal signature values from which on two documents count as one; 0: a band is enough.
    key_ranges: [parts] into which each band (and the exact hashes) are split, the unit of parallel work: a worker holds
      16 bytes * documents / key_ranges, and about six times that while it sorts.
    most_edges: [pairs] of duplicates that one process joins to clusters; more are joined in rounds, by all workers.
    similar_lines: 'paper' or 'released': sentences that repeat an earlier one of their document are dropped by that
      rule (similar_lines.py); '': none is.
    earlier: folders of finished corpora with which this one is compared; what they hold is not kept again.
    """

    shingle: int  # [characters] of the pieces that two documents are compared by
    bands: int  # [bands] of the signature; a pair that agrees in all rows of one is a candidate
    rows: int  # [hashes] of a band
    min_similarity: float
    key_ranges: int
    most_edges: int
    similar_lines: str
    earlier: tuple[str, ...]

    def __post_init__(self) -> None:
        # Each band has as many parts as there are key ranges; exchange.py numbers all of them in 16 bits.
        if min(self.shingle, self.bands, self.rows, self.key_ranges) < 1 or self.bands > 255 or self.key_ranges > 256:
            raise ValueError("shingle, bands (<= 255), rows and key_ranges (<= 256) must be at least 1")
        if not 0 <= self.min_similarity <= 1:
            raise ValueError(f"min_similarity must lie in 0..1, not {self.min_similarity}")
        if self.similar_lines not in ("", *RULES):
            raise ValueError(f"similar_lines: {self.similar_lines!r} is not one of '', {', '.join(map(repr, RULES))}")

    @property
    def signature(self) -> dict[str, int]:
        """What two corpora must share for their signatures to be compared."""
        return {"shingle": self.shingle, "bands": self.bands, "rows": self.rows}


def hash_documents(documents: Sequence[Document], config: DedupConfig) -> Hashes:
    """Hashes a batch of documents."""
    points_T, ends_N = fold([d.text for d in documents], [d.source == "code" for d in documents])
    begins_N = ends_N - np.diff(ends_N, prepend=0)
    folded, spans = points_T.tobytes(), zip((4 * begins_N).tolist(), (4 * ends_N).tolist(), strict=True)
    # a text that folds to nothing is compared as it is
    keys = [folded[a:b] or document.text.encode() for (a, b), document in zip(spans, documents, strict=True)]
    ids = [document.id.encode() for document in documents]
    records = np.zeros(len(documents), RECORD)
    records["id"], records["text"] = _xxh128(ids), _xxh128(keys)
    records["id_end"] = np.cumsum([len(item) for item in ids])
    records["hashed"] = ends_N - begins_N >= config.shingle
    signatures = kernels.minhash(points_T, ends_N, config.shingle, *_permutations(config.bands * config.rows))
    return Hashes(records, signatures, np.frombuffer(b"".join(ids), np.uint8))


def _xxh128(items: Sequence[bytes]) -> np.ndarray:
    digests = b"".join([xxhash.xxh3_128_digest(item) for item in items])
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


@functools.cache
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and addends, the same for ever: signatures of different runs can be compared."""
    seeds = kernels.mix(np.arange(1, 2 * count + 1, dtype=np.uint64) * kernels.MULTIPLIER).astype(np.uint32)
    return seeds[:count] | np.uint32(1), seeds[count:]
