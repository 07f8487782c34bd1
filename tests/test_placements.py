"""Where every parameter of the 2B model lies on every slice that it is shipped for, held against placements.txt.

python tests/test_placements.py --write    # after an intended change; look at the difference before committing it
"""

import math
import os
import pathlib
import sys
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from configs import hardware, pretrain
from ctllm_jax.common.config import build
from ctllm_jax.hardware import parse_slice
from ctllm_jax.model import abstract_params, logical_axes
from ctllm_jax.sharding import mesh_sizes, shardings
from ctllm_jax.train_config import TrainConfig

FILE = pathlib.Path(__file__).with_name("placements.txt")


def mesh_of(name: str) -> tuple[TrainConfig, AbstractMesh]:
    config = build(TrainConfig, pretrain.get_config(f"ct_llm_2b@{name}").to_dict())
    sizes = mesh_sizes(config.mesh, parse_slice(name).devices)
    return config, AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def placements(name: str) -> Iterator[tuple[str, tuple, PartitionSpec, tuple]]:
    """(path, whole shape, partition, shape on a device) of every parameter."""
    config, mesh = mesh_of(name)
    params = abstract_params(config.model)
    layout = jax.tree.leaves(shardings(mesh, params, logical_axes(config.model)))
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(params), layout, strict=True):
        yield "/".join(entry.key for entry in path), leaf.shape, sharding.spec, sharding.shard_shape(leaf.shape)


def listing() -> str:
    lines = []
    for name in hardware.SLICES:
        lines.append(
            f"{name}: {' x '.join(f'{axis} {size}' for axis, size in mesh_of(name)[1].shape.items() if size > 1)}"
        )
        lines += [f"  {path} {whole} {tuple(spec)} {part}" for path, whole, spec, part in placements(name)]
    return "\n".join(lines) + "\n"


def test_every_parameter_of_every_shipped_layout_lies_where_the_file_says():
    assert listing() == FILE.read_text(encoding="utf-8"), "if it is meant: python tests/test_placements.py --write"


def test_every_matrix_is_divided_over_all_of_fsdp():
    for name in hardware.SLICES:
        fsdp = mesh_of(name)[1].shape["fsdp"]
        for path, whole, _, part in placements(name):
            assert math.prod(whole) == math.prod(part) * (1 if "norm" in path else fsdp), (name, path)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    FILE.write_text(listing(), encoding="utf-8")
