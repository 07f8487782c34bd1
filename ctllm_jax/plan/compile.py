"""Compiles a training step for a slice that is not there, and says what the compiler found.

    python -m ctllm_jax.plan.compile < request.json     # one compilation; `compiled` below starts it

Each compilation is a process of its own: libtpu and the CUDA plugin read their settings once, when they are loaded, and
a compiler that runs out of memory must not take its caller along. Results are kept on disk by config, slice, versions
and the sources that make the step.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
from jax.experimental import topologies

from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import cache_folder, read_json, write_json
from ctllm_jax.common.manifest import fingerprint
from ctllm_jax.common.status import EXIT_MISTAKE
from ctllm_jax.hardware import Slice, parse_slice
from ctllm_jax.objectives import make_objective
from ctllm_jax.optim import make_optimizer
from ctllm_jax.plan import gpu_target, hlo
from ctllm_jax.sharding import make_mesh
from ctllm_jax.step import abstract_batch, abstract_state, jit_step
from ctllm_jax.train_config import TrainConfig

CACHE = cache_folder("plan")
# Settings that do not touch the step's program: how often it is looked at, what happens beside it.
_BESIDE = ("seed", "distributed", "log", "eval", "checkpoints", "watch")
# All of ours that this module imports, at any remove; but for the reading of configs, whose values are in the key.
_SOURCES = ("model.py", "kv_cache.py", "products.py", "attention/*.py", "rotary.py", "precision.py", "lora.py")
_SOURCES += ("cross_entropy.py", "losses.py", "objectives.py", "preference.py", "duration.py", "optim.py")
_SOURCES += ("sharding.py", "step.py", "hardware.py", "plan/compile.py", "plan/hlo.py", "plan/gpu_target.py")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no cloud machine to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so none must be locked
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # these three only quieten libtpu: the topology is named in the request
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
}
SAY_EVERY = 10.0  # seconds between signs of life


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one step on one device; bytes. With `refusal` set, the rest is zero."""

    refusal: str | None  # the program does not fit, in the compiler's words
    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of arguments
    temporary: int
    peak: int
    seconds: float  # of compiling
    cycles: int | None  # TPU: estimated, without kernels and waiting; see `plan.hlo`
    kernels: dict[str, int]  # calls of Pallas kernels in a step
    collectives: dict[str, int]  # bytes of results in a step, by kind
    collective_calls: dict[str, int]
    unknown_loops: int


def missing(target: Slice) -> str | None:
    """Why this environment cannot compile for a slice, or None if it can."""
    package, extra = ("libtpu", "tpu") if target.chip.platform == "tpu" else (gpu_target.PLUGIN, "cuda")
    if importlib.util.find_spec(package):
        return None
    return f"{package} is not installed (pip install 'ctllm-jax[{extra}]'; it needs no accelerator)"


def compiled(config: TrainConfig, target: Slice) -> Compiled:
    """The step of a config on a slice: from the cache, or compiled now, which takes about a minute.

    Raises:
      UserError: the compiler is not installed, the config does not go on the slice, or the compiler failed.
    """
    if reason := missing(target):
        raise UserError(f"cannot compile for {target.name}: {reason}")
    request = {"config": dataclasses.asdict(config), "slice": target.name}
    step = {name: value for name, value in request["config"].items() if name not in _BESIDE}
    step["data"] = {**step["data"], "store": "", "rate_changes": ()}
    key = fingerprint({"config": step, "slice": target.name, "with": _versions(target), "sources": _sources()})
    file = CACHE / f"{key}.json"
    if not file.exists():
        write_json(file, _in_process(request, target.name))
    return Compiled(**read_json(file))


def _versions(target: Slice) -> dict[str, str]:
    compiler = "libtpu" if target.chip.platform == "tpu" else gpu_target.PLUGIN.replace("_", "-")
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", compiler)}


def source_files() -> list[pathlib.Path]:
    """The files that decide what a compilation says."""
    package = pathlib.Path(__file__).parent.parent
    return sorted(file for pattern in _SOURCES for file in package.glob(pattern))


@functools.cache
def _sources() -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in source_files())).hexdigest()


def _in_process(request: dict, name: str) -> dict:
    """Runs this module on a request, with a sign of life now and then."""
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "ctllm_jax.plan.compile"],
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    text: str | None = json.dumps(request)
    try:
        while True:
            try:
                output, errors = child.communicate(text, timeout=SAY_EVERY)
                break
            except subprocess.TimeoutExpired:
                text = None  # has been sent
                print(f"plan: compiling for {name}, {time.monotonic() - started:.0f} s", file=sys.stderr)
    except BaseException:
        child.kill()
        raise
    if child.returncode == EXIT_MISTAKE:
        raise UserError(errors.strip().splitlines()[-1])
    if child.returncode:
        raise UserError(f"compiling for {name} failed (status {child.returncode}): {_tail(errors)}")
    return json.loads(output.splitlines()[-1])


def _tail(errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it said nothing"


# ---- In the process that compiles


def devices(target: Slice) -> list:
    """Devices of a slice to compile for; nothing can run on them."""
    if target.chip.platform == "gpu":
        return list(gpu_target.topology(target.chip.name, target.count, target.shape[0]))
    topology = f"{target.chip.name}:{'x'.join(map(str, target.shape))}"
    options = {"chip_config_name": "megacore"} if target.chip.name == "v4" else {}  # else two devices a chip
    if target.devices == target.count:  # slices of one chip
        options["chips_per_host_bounds"] = (1, 1, 1)
    if target.count > 1:
        options["num_slices"] = target.count
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)


def lower(config: TrainConfig, target: Slice) -> jax.stages.Lowered:
    """The step of a config, lowered for a slice; config.model is set."""
    model, sides = config.model, (2,) if config.objective.name == "dpo" else ()
    mesh = make_mesh(config.mesh, devices(target))
    optimizer = make_optimizer(config.optimizer, model, config.clock(model.max_length))
    objective = make_objective(config.objective, model, num_sources=max(len(config.data.rates), 1))
    state = abstract_state(model, optimizer, mesh)
    batch = abstract_batch(config.batch_size, model.max_length, sides, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jit_step(objective, optimizer, config.microbatches, layout, config.compiler_options(target.chip.platform))
    with jax.set_mesh(mesh):
        return step.lower(state, state.params if config.objective.reference == "live" else None, batch)


def compile_step(config: TrainConfig, target: Slice) -> Compiled:
    """Compiles in this process, whose environment must be `ENVIRONMENT`; see `compiled`."""
    lowered, started = lower(config, target), time.monotonic()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(_refusal(str(error)), 0, 0, 0, 0, 0, time.monotonic() - started, None, {}, {}, {}, 0)
    seconds, memory = time.monotonic() - started, program.memory_analysis()
    is_tpu = target.chip.platform == "tpu"
    totals = hlo.totals(program.as_text())
    return Compiled(
        refusal=None,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        seconds=round(seconds, 1),
        cycles=totals.cycles if is_tpu else None,
        kernels=dict(totals.kernels),
        collectives=dict(totals.collectives),
        collective_calls=dict(totals.collective_calls),
        unknown_loops=totals.unknown_loops,
    )


def _refusal(error: str) -> str:
    """The sentence that says how much was needed."""
    found = re.search(r"(Used|It exceeds|.*exceeds|Requested|Out of memory)[^\n]*", error)
    return " ".join((found[0] if found else error.splitlines()[0]).split())[:200]


def main() -> None:
    """Compiles the request on standard input; the last line of standard output is the result (EXIT_MISTAKE: none)."""
    request = json.load(sys.stdin)
    try:
        result = compile_step(build(TrainConfig, request["config"]), parse_slice(request["slice"]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    print(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main()
