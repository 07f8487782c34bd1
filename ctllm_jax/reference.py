"""DPO's reference, computed once: what it thinks of every answer of a store, kept with the run.

The frozen copy of the parameters then takes no memory in training, and each pair goes through it once, however many
epochs there are. Files lie in the run's folder:

    reference/reference.json                 written last: what the numbers were made from, and each file's SHA-256
    reference/<split>-<source>.npy           float32 [rows, 2], by row of the store

On resume the files are read again and compared with their digests; if any is not what was written, or was made from
something else, all are computed anew.

Legend: B pairs of a batch, N rows of a source, 2 (chosen, rejected).
"""

import dataclasses
import functools
import hashlib
import io
import pathlib
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctllm_jax.common.files import read_json, write_atomic, write_json
from ctllm_jax.common.manifest import fingerprint
from ctllm_jax.common.progress import Progress
from ctllm_jax.data.batches import held_out
from ctllm_jax.data.record import Row
from ctllm_jax.data.store import TokenStore
from ctllm_jax.model import ModelConfig
from ctllm_jax.objectives import answer_logprobs
from ctllm_jax.processes import together, votes
from ctllm_jax.train_config import TrainConfig

Logprobs = dict[tuple[str, str], np.ndarray]  # {(split, source): float32 [N, 2]}


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
) -> ScoredStore:
    """The store with the reference's log-probabilities: from the run's folder, or computed now. All processes call it.

    Args:
      run_dir: the run's folder.
      store: a preference store.
      config: the run's.
      model, params: the reference; params lie over the mesh.
      origin: digest of the reference's weights.
      mesh: the run's.
    """
    folder, objective = run_dir / "reference", config.objective
    made_from = {"store": store.fingerprint, "weights": origin, "dtype": model.dtype}
    made_from["tail_weight"] = objective.preference.tail_weight
    sizes = {(split, s): store.size(split, s) for split in store.info["splits"] for s in store.sources(split)}
    found = together(functools.partial(_read, folder, fingerprint(made_from), sizes))
    if votes(found is not None)[0, 0]:
        return ScoredStore(store, _from_first_process(found, sizes))
    everywhere = NamedSharding(mesh, PartitionSpec())
    score = jax.jit(functools.partial(answer_logprobs, objective, model), out_shardings=everywhere)
    parts: dict[tuple[str, str], list[np.ndarray]] = {name: [] for name in sizes}
    stream = sys.stderr if jax.process_index() == 0 else io.StringIO()
    with Progress("train dpo: reference", sum(sizes.values()), "pairs", stream) as progress:
        for split in store.info["splits"]:
            for source, _, batch in held_out(store, split, config.batch_size, max(sizes.values()), True, mesh):
                parts[split, source].append(jax.device_get(score(params, batch)))
                progress.add(min(config.batch_size, sizes[split, source] - sum(map(len, parts[split, source][:-1]))))
    logprobs = {name: np.concatenate(own)[: sizes[name]] for name, own in parts.items()}  # the last batch is filled up
    together(functools.partial(_write, folder, made_from, logprobs))
    return ScoredStore(store, logprobs)


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


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
