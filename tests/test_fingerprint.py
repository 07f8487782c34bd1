"""The 2B training step is the same program as before: a hash of its jaxpr, one for each locked version of JAX.

    python tests/test_fingerprint.py --record "why the program changed"

A refactoring that is meant to change nothing leaves the hash as it is. One that changes the program is recorded, with
its reason, under the version of JAX at hand; versions that differ from the record skip.
"""

import hashlib
import json
import os
import pathlib
import re
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from configs import pretrain
from ctllm_jax.common.config import build
from ctllm_jax.objectives import make_objective
from ctllm_jax.optim import make_optimizer
from ctllm_jax.step import abstract_batch, abstract_state, train_step
from ctllm_jax.train_config import TrainConfig

RECORD = pathlib.Path(__file__).with_name("step_fingerprint.json")
STEPS = ["ct_llm_2b", "ct_llm_2b@v5e:4x4", "ct_llm_2b@h200x8"]
DEVICES = {
    "ct_llm_2b": AbstractDevice(device_kind="cpu", num_cores=1, platform="cpu"),
    "ct_llm_2b@v5e:4x4": AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
    "ct_llm_2b@h200x8": AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"),
}


def program(name: str) -> str:
    """The jaxpr of a shipped config's step on eight devices, without what differs between machines."""
    config = build(TrainConfig, pretrain.get_config(name).to_dict())
    axes = {"slice": 1, "data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    mesh = AbstractMesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), abstract_device=DEVICES[name]
    )
    optimizer = make_optimizer(config.optimizer, config.model, config.clock(4096))
    objective = make_objective(config.objective, config.model, len(config.data.rates))
    arguments = abstract_state(config.model, optimizer, mesh), abstract_batch(512, 4096, (), mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(
            lambda state, batch: train_step(
                state, None, batch, objective=objective, optimizer=optimizer, microbatches=config.microbatches
            )
        )(*arguments)
    text = re.sub(r"0x[0-9a-f]+", "0x", str(jaxpr))
    text = re.sub(r"frozenset\(\{([^}]*)\}\)", lambda names: ", ".join(sorted(names[1].split(", "))), text)
    return re.sub(r" at [^\s]+\.py:\d+", "", text)  # where a kernel stands in the sources


def fingerprint(name: str) -> str:
    return hashlib.sha256(program(name).encode()).hexdigest()


@pytest.mark.parametrize("name", STEPS)
def test_the_step_is_the_recorded_program(name):
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if jax.__version__ not in record:
        pytest.skip(f"no fingerprint is recorded for jax {jax.__version__}")
    assert fingerprint(name) == record[jax.__version__][-1]["steps"][name], (
        f"the program of {name} has changed. If that is meant: python tests/test_fingerprint.py --record 'why'"
    )


def test_a_change_of_the_program_changes_the_fingerprint(monkeypatch):
    before = fingerprint("ct_llm_2b")
    assert fingerprint("ct_llm_2b") == before
    whole = pretrain.get_config

    def other(name):
        config = whole(name)
        config.model.norm_eps = 1e-6
        return config

    monkeypatch.setattr(pretrain, "get_config", other)
    assert fingerprint("ct_llm_2b") != before


def main(arguments: list[str]) -> None:
    if len(arguments) != 2 or arguments[0] != "--record" or not arguments[1].strip():
        sys.exit(__doc__)
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    steps = {name: fingerprint(name) for name in STEPS}
    record.setdefault(jax.__version__, []).append({"why": arguments[1], "steps": steps})
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
