"""Static time of the attention kernels, by the TPU compiler's own count of cycles.

    python -m ctllm_jax.plan.kernel_cycles < request.json     # one process; `static_cycles` below starts it

libtpu states the cycles of a Pallas kernel only in a profile that it writes while compiling, if it was told to when it
was loaded: hence a process of its own. Three things bound what can be had. A program must have no collectives (libtpu
aborts), so a kernel is compiled alone. The count follows a loop whose length comes from constants or from the program's
place in the grid, cell by cell, but knows nothing of a length that is read from memory, as the list of tiles is: so our
kernels are compiled with `Tiling.measured`. And as the cells are many, one key/value head of each core is compiled and
stands for all. For v6e no profile is written, for v4 libtpu aborts.

An estimate: no wait for memory beyond what the compiler foresees, and never held against a chip.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctllm_jax.attention import flash
from ctllm_jax.attention.tiles import Tile
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json, write_json
from ctllm_jax.common.manifest import fingerprint
from ctllm_jax.hardware import CHIPS, parse_slice
from ctllm_jax.plan.compile import CACHE, ENVIRONMENT, devices

KERNELS = ("forward", "dq", "dkv")
SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}  # the smallest to be had; one chip of it is used
CORES = {"v5e": 1, "v5p": 2}  # of a chip: they share the heads
_ESTIMATE = re.compile(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)')
_FOLDER = "CTLLM_KERNEL_PROFILES"  # where libtpu writes, for the process that compiles


def kernel_seconds(chip: str, heads: int, kv_heads: int, length: int, head_dim: int) -> dict[str, float] | None:
    """Static seconds of each attention kernel for one sequence of one layer, causal, bf16, one document that fills it.

    Args:
      chip: a name in `hardware.CHIPS`.
      heads: query heads of the device.
      kv_heads: key/value heads of the device.
      length: tokens of the sequence, queries and keys.
      head_dim: head size.

    Returns:
      {"forward": s, "dq": s, "dkv": s}, from the cache or measured now, which takes some seconds; None where libtpu is
      not installed or states no cycles for the chip.

    Raises:
      UserError: the compiler failed, or refused the kernels at this size.
    """
    if chip not in SLICES or not importlib.util.find_spec("libtpu"):
        return None
    measured_heads = min(CORES[chip], kv_heads)
    group = heads // kv_heads
    size = {"kv_heads": measured_heads, "group": group, "length": length, "head_dim": head_dim, "measured": "causal"}
    file = CACHE / f"{fingerprint({'chip': chip, 'size': size, 'with': _versions(), 'sources': _sources()})}.json"
    if not file.exists():
        print(f"plan: compiling the attention kernels for {chip}", file=sys.stderr)
        found = by_kernel(static_cycles(chip, "ctllm_jax.plan.kernel_cycles:ours", size))
        if len(found) < len(KERNELS):
            raise UserError(f"{chip}: the compiler states no cycles for the attention kernels at {size}")
        write_json(file, found)
    cycles = read_json(file)
    return {name: kv_heads / measured_heads * cycles[name] / CHIPS[chip].clock for name in KERNELS}


def static_cycles(chip: str, build: str, request: dict) -> dict[str, int]:
    """Cycles of the operations of a program that is compiled for one chip.

    Args:
      chip: a key of `SLICES`.
      build: "module:function", importable from sys.path; called with the chip's device kind and `request` as keyword
        arguments, it returns a function and the shapes to compile it for.
      request: values that JSON has.

    Returns:
      {operation: cycles}, numbers at the end of names cut off and their operations added up; empty where the compiler
      refused the program for its memory.

    Raises:
      UserError: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        variables = {
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={folder}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            _FOLDER: folder,
        }
        child = subprocess.run(
            [sys.executable, "-m", "ctllm_jax.plan.kernel_cycles"],
            env={**os.environ, **ENVIRONMENT, **variables},
            input=json.dumps({"chip": chip, "build": build, "request": request}),
            capture_output=True,
            text=True,
        )
    if child.returncode:
        said = child.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError(f"measuring kernels for {chip} failed (status {child.returncode}): {said[-1][:500]}")
    return json.loads(child.stdout.splitlines()[-1])


def parse(profiles: list[str]) -> dict[str, int]:
    """Cycles by operation from the texts of libtpu's static profiles."""
    cycles: dict[str, int] = {}
    for text in profiles:
        for name, count in _ESTIMATE.findall(text):
            name = re.sub(r"(\.\d+)+$", "", name)
            cycles[name] = cycles.get(name, 0) + int(count)
    return cycles


def by_kernel(cycles: dict[str, int]) -> dict[str, int]:
    """Those of our kernels, by the names in `KERNELS`; differentiation wraps the operations' names."""
    return {name: cycles[op] for name in KERNELS for op in cycles if f"flash_attention_{name}" in op}


def ours(
    kind: str,
    *,
    measured: str,
    kv_heads: int,
    group: int,
    length: int,
    head_dim: int,
    tiles: dict[str, list] | None = None,
) -> tuple:
    """Our kernels for `static_cycles`: forward and backward of one sequence.

    `measured` is what they visit (`attention.tiles.listed`), `tiles` overrides sizes of the chip's.
    """
    tiling = dataclasses.replace(flash.tiling_for("tpu", kind), measured=measured)
    tiling = dataclasses.replace(tiling, **{name: Tile(*sizes) for name, sizes in (tiles or {}).items()})

    def step(q_BLNH, k_BLKH, v_BLKH, segments_BL, dout_BLNH):
        out, pull = jax.vjp(
            lambda *arrays: flash.attention(*arrays, segments_BL, segments_BL, tiling=tiling), q_BLNH, k_BLKH, v_BLKH
        )
        return out, pull(dout_BLNH)

    queries = jax.ShapeDtypeStruct((1, length, kv_heads * group, head_dim), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((1, length, kv_heads, head_dim), jnp.bfloat16)
    return step, (queries, keys, keys, jax.ShapeDtypeStruct((1, length), jnp.int32), queries)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


@functools.cache
def _sources() -> str:
    package = pathlib.Path(__file__).parent.parent
    files = [*sorted((package / "attention").glob("*.py")), pathlib.Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main() -> None:
    """Compiles the program of the request on standard input; the last line of standard output has its cycles."""
    request = json.load(sys.stdin)
    module, function = request["build"].split(":")
    device = devices(parse_slice(SLICES[request["chip"]]))[0]
    step, shapes = getattr(importlib.import_module(module), function)(device.device_kind, **request["request"])
    mesh = Mesh([device], ("chip",))
    shapes = jax.tree.map(lambda x: x.update(sharding=NamedSharding(mesh, PartitionSpec())), shapes)
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            jax.jit(step).lower(*shapes).compile()
        found = parse([file.read_text() for file in pathlib.Path(os.environ[_FOLDER]).iterdir()])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = {}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
