"""What files are called in the ids of records that have none. Needs the standard library alone."""

import pathlib
from collections import Counter
from collections.abc import Sequence

from ctllm_jax.common.files import shown


def file_names(paths: Sequence[str]) -> list[str]:
    """Names each file by its stem, or by as much of its path as sets it apart."""
    paths = list(map(shown, paths))
    parts = [(*pathlib.PurePath(path).parts[:-1], pathlib.PurePath(path).name.split(".jsonl")[0]) for path in paths]
    names, unnamed, depth = paths, list(range(len(parts))), 1
    while any(depth == 1 or depth <= len(parts[i]) for i in unnamed):
        counts = Counter(parts[i][-depth:] for i in unnamed)
        shared = [i for i in unnamed if counts[parts[i][-depth:]] > 1]
        for i in set(unnamed) - set(shared):
            if depth <= len(parts[i]):
                names[i] = "/".join(parts[i][-depth:])
        unnamed, depth = shared, depth + 1
    return names
