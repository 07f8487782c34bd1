"""What is compared: the shards of a corpus, and those of finished ones before it."""

import dataclasses
import pathlib
from collections.abc import Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json
from ctllm_jax.common.manifest import stage_fingerprint
from data_pipeline.dedup.minhash import DedupConfig
from data_pipeline.dedup.store import Hashes, open_hashes
from data_pipeline.shards import HASHES, Layout


@dataclasses.dataclass(frozen=True)
class Corpora:
    """The shards that are compared: those of earlier corpora, which stay as they are, then those of this one."""

    earlier: tuple[pathlib.Path, ...]
    layout: Layout
    shards: int

    def __len__(self) -> int:
        return len(self.earlier) + self.shards

    def own(self, number: int) -> int | None:
        """The number of a shard within this corpus; None if it is an earlier one's."""
        return number - len(self.earlier) if number >= len(self.earlier) else None

    def hashes(self, number: int) -> Hashes:
        """The hashes of a shard's documents."""
        own = self.own(number)
        return open_hashes(self.earlier[number] if own is None else self.layout.all_hashes(own))


def earlier_shards(folders: Sequence[str], config: DedupConfig) -> tuple[list[str], tuple[pathlib.Path, ...]]:
    """(fingerprints, stems of hashes) of finished corpora.

    Raises:
      UserError: a folder is no finished corpus, or its signatures were made otherwise.
    """
    stems = []
    for folder in folders:
        stage_fingerprint(folder, "corpus")
        made = read_json(pathlib.Path(folder, "stage.json"))["settings"]["dedup"]
        for name, value in config.signature.items():
            if made[name] != value:
                raise UserError(f"dedup.earlier: {folder} has signatures with {name} {made[name]}, not {value}")
        stems += [path.with_suffix("").resolve() for path in sorted(pathlib.Path(folder, HASHES).glob("*.hashes"))]
    return [stage_fingerprint(folder, "corpus") for folder in folders], tuple(stems)
