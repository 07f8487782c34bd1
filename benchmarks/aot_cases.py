"""Layouts of the 2B step for aot.py and the tests: the slice, and what differs from the config shipped for it."""

import dataclasses

from configs import hardware, pretrain
from ctllm_jax.common.config import build
from ctllm_jax.hardware import parse_slice
from ctllm_jax.train_config import TrainConfig

SPEED_SLICES = ["v5e:4x4", "v5p:4x4x4", "v6e:4x4", "v5e:16x16", "v5p:4x8x8", "v6e:16x16"]

# rows: sequences of a device (of all that share them) at a time; times: microbatches.
CASES = [
    {"slice": "v5e:4x4", "rows": 1, "times": 1},
    {"slice": "v5e:4x4", "rows": 1, "times": 2},
    {"slice": "v5e:4x4", "rows": 1, "times": 4, "remat": "gate"},
    {"slice": "v5e:4x4", "rows": 1, "times": 1, "cross_entropy": "chunked"},
    {"slice": "v5e:4x4", "rows": 1, "times": 1, "remat": "full"},
    {"slice": "v5e:4x4", "rows": 1, "times": 1, "remat": "attention", "data": 4, "fsdp": 4},
    {"slice": "v5e:4x4", "rows": 2, "times": 1, "remat": "qkv", "tensor": 2, "fsdp": 8},
    {"slice": "v5e:4x4", "rows": 2, "times": 1, "remat": "full", "context": 2, "fsdp": 8},
    {"slice": "v5e:16x16", "rows": 2, "times": 1, "remat": "qkv"},
    {"slice": "v5e:16x16", "rows": 1, "times": 2},
    {"slice": "2*v5e:16x16", "rows": 1, "times": 1},
    {"slice": "v5p:4x4x4", "rows": 2, "times": 1},
    {"slice": "v5p:4x4x4", "rows": 8, "times": 1},
    {"slice": "v5p:4x8x8", "rows": 2, "times": 1},
    {"slice": "v6e:4x4", "rows": 1, "times": 1},
    {"slice": "v6e:4x4", "rows": 2, "times": 1},
    {"slice": "v6e:4x4", "rows": 1, "times": 1, "remat": "none"},
    {"slice": "v6e:16x16", "rows": 1, "times": 2},
    {"slice": "v4:4x4x4", "rows": 2, "times": 4},
    {"slice": "h200x1", "rows": 1, "times": 1, "remat": "qkv", "fsdp": 1, "cross_entropy": "chunked"},
    {"slice": "h200x8", "rows": 1, "times": 1, "remat": "qkv"},
    {"slice": "h200x8", "rows": 4, "times": 1, "remat": "qkv"},
    {"slice": "h200x8", "rows": 16, "times": 4},
    {"slice": "h100x8", "rows": 8, "times": 8},
    {"slice": "h100x64", "rows": 8, "times": 1},
    {"slice": "a100x8", "rows": 8, "times": 8},
]

# jax's flash attention by chip: queries held, keys of a cell, keys of a step; for dkv, which holds keys, the other way
# round. The fastest of those that attention.py tries for a causal pass.
FLASH_BLOCKS = {
    "v5e": {"forward": (512, 512, 512), "dq": (512, 512, 512), "dkv": (512, 1024, 1024)},
    "v5p": {"forward": (1024, 1024, 1024), "dq": (512, 512, 512), "dkv": (512, 1024, 1024)},
}


def case_config(case: dict) -> TrainConfig:
    """The config of a case: as shipped for its slice (or the chip's smallest), with the changes that it names."""
    name = case["slice"]
    near = name if name in hardware.SLICES else next(s for s in hardware.SLICES if s.startswith(name.split("x")[0]))
    config = build(TrainConfig, pretrain.get_config(f"ct_llm_2b@{near}").to_dict())
    mesh = {axis: case[axis] for axis in ("data", "fsdp", "tensor", "context") if axis in case}
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **mesh),
        model=dataclasses.replace(config.model, remat=case.get("remat", config.model.remat)),
        objective=dataclasses.replace(config.objective, cross_entropy=case.get("cross_entropy", "auto")),
    )
    if "rows" not in case:
        return config
    sharers = parse_slice(name).devices // (config.mesh.tensor * config.mesh.context)  # of the rows
    return dataclasses.replace(config, batch_size=case["rows"] * case["times"] * sharers, microbatches=case["times"])


def one_microbatch(name: str) -> TrainConfig:
    """The config that is shipped for a slice, with the first of its microbatches alone."""
    config = case_config({"slice": name})
    return dataclasses.replace(config, batch_size=config.batch_size // config.microbatches, microbatches=1)
