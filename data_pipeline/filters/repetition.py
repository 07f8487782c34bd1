"""How much of a text is repeated n-grams, by position: a character counts once, however many cover it.

The released CT-LLM code counts the distinct characters of repeated n-grams, which never reaches its own
threshold on a long text, and calls the rule so that it never rejects. Here a repeat is every occurrence of an
n-gram after its first, and the share is the part of the document's characters that lie in a repeat: six
copies of a text give 5/6.

Works on any symbols: characters, or words weighted by their length. Shapes: T symbols of N documents.
"""

import numpy as np

from data_pipeline.filters.kernels import REPEATS_WITHIN, count_repeats

TOP = (2, 3, 4)  # share of the repeats of the most frequent n-gram, and its share by count, as the paper has it
DUPLICATED = (5, 6, 7, 8, 9, 10)  # share of all repeated n-grams
NAMES = tuple(
    [f"top_{n}gram" for n in TOP] + [f"duplicate_{n}gram" for n in DUPLICATED] + [f"counted_{n}gram" for n in TOP]
)


def repetition(symbols_T: np.ndarray, weights_T: np.ndarray, ends_N: np.ndarray) -> dict[str, np.ndarray]:
    """Shares by name (NAMES), each [N]; 0 for an empty document.

    `counted_ngram` is (occurrences of the most frequent n-gram - 1) * n over the number of symbols: overlapping
    occurrences count in full, so it may exceed 1. The others lie in 0..1.
    """
    covered, most, total_N = count_repeats(symbols_T, weights_T, ends_N, TOP[-1], DUPLICATED[-1])
    total_N = np.maximum(total_N, 1)
    symbols_N = np.clip(np.diff(ends_N, prepend=0), 1, REPEATS_WITHIN)
    shares = {f"top_{n}gram": covered[:, n - 2] / total_N for n in TOP}
    shares |= {f"duplicate_{n}gram": covered[:, n - 2] / total_N for n in DUPLICATED}
    return shares | {f"counted_{n}gram": np.maximum(most[:, n - 2] - 1, 0) * n / symbols_N for n in TOP}
