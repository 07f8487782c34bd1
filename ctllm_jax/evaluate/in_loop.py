"""Looks at the held-out split while training goes on."""

import collections
import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctllm_jax.data.batches import held_out
from ctllm_jax.data.store import TokenStore
from ctllm_jax.objectives import Objective


@dataclasses.dataclass(frozen=True)
class InLoopConfig:
    """How often a run looks at held-out data, and at how much of it."""

    every: int  # steps between looks; there is one before the first step and one after the last
    batches: int  # most batches of each source at a look


class HeldOut:
    """The held-out split of a run's store, scored by the run's own objective."""

    def __init__(
        self,
        config: InLoopConfig,
        store: TokenStore,
        batch_size: int,
        mask_documents: bool,
        mesh: Mesh,
        objective: Objective,
    ):
        self._kind = store.kind
        self._reading = (store, "validation", batch_size, config.batches, mask_documents, mesh)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._sums = jax.jit(lambda *arguments: objective(*arguments)[1], out_shardings=everywhere)

    def look(self, params: dict, reference: dict | None) -> dict[str, float]:
        """Means over the held-out split: loss over all and by source; bits per byte for documents, rewards for pairs.

        Empty where the store has no such split.
        """
        totals: dict[str, collections.Counter] = {}
        for source, text_bytes, batch in held_out(*self._reading):
            sums = jax.device_get(self._sums(params, reference, batch))
            scalars = {name: float(value) for name, value in sums.items() if np.ndim(value) == 0}
            totals.setdefault(source, collections.Counter()).update({"bytes": text_bytes, **scalars})
        return _means(totals, self._kind) if totals else {}


def _means(totals: dict[str, collections.Counter], kind: str) -> dict[str, float]:
    names = {name for total in totals.values() for name in total}
    whole = {name: sum(total[name] for total in totals.values()) for name in names}
    result = {"count": whole["count"], "loss": whole["loss"] / whole["count"]}
    result |= {f"loss/{source}": total["loss"] / total["count"] for source, total in totals.items()}
    if kind == "pretrain":
        bits = {"": whole, **{f"/{source}": total for source, total in totals.items()}}
        result |= {f"bits_per_byte{name}": t["loss"] / np.log(2) / t["bytes"] for name, t in bits.items()}
    for name in ("accuracy", "margin", "reward_chosen", "reward_rejected"):
        if name in whole:
            result[name] = whole[name] / whole["count"]
    return result
