"""DPO's reference, computed once: what it thinks of every answer of a store, kept with the run.

The frozen copy of the parameters then takes no memory in training, and each pair goes through it once, however many
epochs there are. Files lie in the run's folder:

    reference/reference.json                 written last: what the numbers were made from, and each file's SHA-256
    reference/<split>-<source>.npy           float32 [rows, 2], by row of the store
    reference/begun.npz                      of a run that was cut short before: the batches that were through

On resume the files are read again and compared with their digests; if any is not what was written, or was made from
something else, all are computed anew.

Legend: K batches, B pairs of a batch, N rows of a source, 2 (chosen, rejected).
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctllm_jax.common.files import read_json, write_atomic, write_json
from ctllm_jax.common.manifest import fingerprint
from ctllm_jax.common.progress import Progress
from ctllm_jax.common.status import EXIT_RESUME
from ctllm_jax.data.batches import held_out
from ctllm_jax.data.record import Row
from ctllm_jax.data.store import TokenStore
from ctllm_jax.model import ModelConfig
from ctllm_jax.objectives import Batch, answer_logprobs
from ctllm_jax.processes import together, votes
from ctllm_jax.train_config import TrainConfig

Logprobs = dict[tuple[str, str], np.ndarray]  # {(split, source): float32 [N, 2]}

_KEEP = 600.0  # seconds after which what has been scored is written, for a run that is killed


class ScoredStore(TokenStore):
    """A preference store whose rows know what the reference thinks of their answers."""

    def __init__(self, store: TokenStore, logprobs: Logprobs):
        super().__init__(store.folder)
        self._logprobs = logprobs

    def read(self, split: str, source: str, indices: Sequence[int]) -> list[Row]:
        rows, own_N2 = super().read(split, source, indices), self._logprobs[split, source]
        return [
            dataclasses.replace(row, reference=tuple(own_N2[index].tolist()))
            for row, index in zip(rows, indices, strict=True)
        ]


def scored_store(
    run_dir: pathlib.Path,
    store: TokenStore,
    config: TrainConfig,
    model: ModelConfig,
    params: dict,
    origin: str,
    mesh: Mesh,
    stop: Callable[[int], bool] = lambda batch: False,
) -> ScoredStore:
    """The store with the reference's log-probabilities: from the run's folder, or computed now. All processes call it.

    Args:
      run_dir: the run's folder.
      store: a preference store.
      config: the run's.
      model, params: the reference; params lie over the mesh.
      origin: digest of the reference's weights.
      mesh: the run's.
      stop: asked before each batch, with its number; True, from all processes alike, keeps what there is and ends.

    Raises:
      SystemExit: with EXIT_RESUME, where `stop` said so.
    """
    folder, objective = run_dir / "reference", config.objective
    made_from = {"store": store.fingerprint, "weights": origin, "dtype": model.dtype}
    made_from["tail_weight"] = objective.preference.tail_weight
    sizes = {(split, s): store.size(split, s) for split in store.info["splits"] for s in store.sources(split)}
    found = together(functools.partial(_read, folder, fingerprint(made_from), sizes))
    if votes(found is not None)[0, 0]:
        return ScoredStore(store, _from_first_process(found, sizes))
    everywhere, rows = NamedSharding(mesh, PartitionSpec()), config.batch_size // config.microbatches
    score = jax.jit(functools.partial(answer_logprobs, objective, model), out_shardings=everywhere)
    mark = fingerprint({**made_from, "rows": rows})
    batches = (held_out(store, split, rows, max(sizes.values()), True, mesh) for split in store.info["splits"])
    scores = _scores(
        lambda batch: jax.device_get(score(params, batch)),
        (batch for _, _, batch in itertools.chain.from_iterable(batches)),
        [min(rows, size - start) for size in sizes.values() for start in range(0, size, rows)],
        list(_begun(folder, mark, rows)),
        functools.partial(_keep, folder, mark),
        stop,
    )
    ends = np.cumsum([0, *(-(-size // rows) for size in sizes.values())])
    logprobs = {  # the last batch of a source is filled up
        name: np.reshape(scores[begin:end], (-1, 2)).astype(np.float32)[:size]
        for (name, size), begin, end in zip(sizes.items(), ends, ends[1:], strict=False)
    }
    together(functools.partial(_write, folder, made_from, logprobs))
    return ScoredStore(store, logprobs)


def _scores(
    score: Callable[[Batch], np.ndarray],
    batches: Iterable[Batch],
    pairs: Sequence[int],
    scores: list[np.ndarray],
    keep: Callable[[Sequence[np.ndarray]], None],
    stop: Callable[[int], bool],
) -> list[np.ndarray]:
    """What all batches score [K of [B, 2]]: `scores` of the first ones, and the others'; `pairs` are in each."""
    stream, kept = sys.stderr if jax.process_index() == 0 else io.StringIO(), time.monotonic()
    with Progress("train dpo: reference", sum(pairs), "pairs", stream) as progress:
        for number, batch in enumerate(batches):
            if number >= len(scores):
                stopped = stop(number)
                if stopped or time.monotonic() - kept > _KEEP:
                    keep(scores)
                    kept = time.monotonic()
                if stopped:
                    print("train: stopped while the reference is computed; the same command goes on", file=sys.stderr)
                    sys.exit(EXIT_RESUME)
                scores.append(score(batch))
            progress.add(pairs[number])
    return scores


def _begun(folder: pathlib.Path, mark: str, rows: int) -> np.ndarray:
    """[K, B, 2]: what process 0 finds of an attempt that was cut short."""
    found, file = np.zeros((0, rows, 2), np.float32), folder / "begun.npz"
    if jax.process_index() == 0 and file.exists():
        with np.load(file, allow_pickle=False) as told:
            found = told["scores"] if str(told["mark"]) == mark else found
    if jax.process_count() == 1:
        return found
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(found))))
    return np.asarray(multihost_utils.broadcast_one_to_all(np.resize(found, (count, rows, 2))))


def _keep(folder: pathlib.Path, mark: str, scores: Sequence[np.ndarray]) -> None:
    if jax.process_index() == 0 and scores:
        content = io.BytesIO()
        np.savez(content, mark=mark, scores=np.stack(scores))
        write_atomic(folder / "begun.npz", content.getvalue())


def _from_first_process(found: Logprobs | None, sizes: Mapping[tuple[str, str], int]) -> Logprobs:
    """What process 0 has read, in all processes: others may not see its disk."""
    if jax.process_count() == 1:
        return found
    own = found or {name: np.zeros((size, 2), np.float32) for name, size in sizes.items()}
    return {name: np.asarray(multihost_utils.broadcast_one_to_all(scores)) for name, scores in own.items()}


def _read(folder: pathlib.Path, mark: str, sizes: Mapping[tuple[str, str], int]) -> Logprobs | None:
    """What process 0 finds in the folder, or None: it is not there, not whole, or made from something else."""
    note = folder / "reference.json"
    if jax.process_index() != 0 or not note.exists():
        return None
    told, found = read_json(note), {}
    if told["fingerprint"] != mark:
        print(f"train: {note} is of another store or reference; computing it anew", file=sys.stderr)
        return None
    for split, source in sizes:
        file = folder / f"{split}-{source}.npy"
        content = file.read_bytes() if file.exists() else b""
        if _digest(content) != told["files"][file.name]:
            print(f"train: {file} is not what was written; computing the reference anew", file=sys.stderr)
            return None
        found[split, source] = np.load(io.BytesIO(content), allow_pickle=False)
    return found


def _write(folder: pathlib.Path, made_from: dict, logprobs: Logprobs) -> None:
    if jax.process_index() != 0:
        return
    digests = {}
    for (split, source), scores_N2 in logprobs.items():
        content = io.BytesIO()
        np.save(content, scores_N2, allow_pickle=False)
        write_atomic(folder / f"{split}-{source}.npy", content.getvalue())
        digests[f"{split}-{source}.npy"] = _digest(content.getvalue())
    write_json(
        folder / "reference.json",
        {"fingerprint": fingerprint(made_from), "made_from": made_from, "files": digests},
    )
    (folder / "begun.npz").unlink(missing_ok=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
