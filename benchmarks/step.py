"""The training step of the 2B model on the accelerator at hand: tokens/s and MFU, by attention backend and rows.

    python benchmarks/step.py [--model ct_llm_2b] [--try BACKEND:REMAT:ROWS ...]
        [--deterministic] [--profile FOLDER]

A step is the trainer's own program with its update: one microbatch of ROWS packed rows of random tokens, eight
documents of unequal length in each. Every device of the machine is used. Time is of completed steps, each dispatched
before the last is waited for, as the trainer does. MFU counts products only, with the causal half of attention or with
all of it; it is left out where ctllm_jax/hardware.py does not know the device's peak. GiB is the most that the process
had in use so far. --profile records three steps of the last try and prints where the device's time went.
"""

import argparse
import collections
import pathlib
import statistics
import time

import jax
import numpy as np
from common import finish, table

from configs import pretrain
from ctllm_jax.common.config import build
from ctllm_jax.hardware import chip_of
from ctllm_jax.model import flops_per_token, init_params
from ctllm_jax.objectives import make_objective
from ctllm_jax.optim import make_optimizer
from ctllm_jax.sharding import make_mesh
from ctllm_jax.step import TrainState, abstract_batch, jit_step, start_state, state_shardings
from ctllm_jax.train_config import TrainConfig

WARM, TIMED = 3, 10
DEFAULT = ("pallas_gpu:matmuls:4", "cudnn:matmuls:4", "xla:matmuls:4")


def main() -> None:
    """Times every try and prints a table; a try that fails is a row that says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ct_llm_2b", help="architecture of configs/models.py")
    parser.add_argument("--try", nargs="*", dest="tries", default=DEFAULT, metavar="BACKEND:REMAT:ROWS")
    parser.add_argument("--deterministic", action="store_true", help="as in the config")
    parser.add_argument("--profile", help="folder for a trace of the last try")
    options = parser.parse_args()
    rows, figures = [], {}
    for number, text in enumerate(options.tries):
        backend, remat, count = text.split(":")
        profile = options.profile if number == len(options.tries) - 1 else None
        try:
            found = measure(config_of(options, backend, remat, int(count)), profile)
        except Exception as error:  # out of memory, or not on this device: the others still count
            rows.append((text, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"))
            continue
        rows.append((text, *("-" if value is None else value for value in found.values())))
        figures |= {f"{text}_{name}": value for name, value in found.items() if value is not None}
    device = jax.devices()[0].device_kind
    head = ("", "ms a step", "spread", "tokens/s", "MFU causal", "MFU full", "GiB", "first step, s", "loss")
    table(f"{options.model} on {len(jax.devices())} x {device}, jax {jax.__version__}", head, rows)
    finish(figures | {"device": device})


def config_of(options: argparse.Namespace, backend: str, remat: str, rows: int) -> TrainConfig:
    """The shipped config with `rows` rows a device."""
    config = pretrain.get_config(options.model)
    config.deterministic = options.deterministic
    config.model.update(attention=backend, remat=remat)
    config.batch_size = rows * len(jax.devices())
    return build(TrainConfig, config.to_dict())


def measure(config: TrainConfig, profile: str | None) -> dict[str, float]:
    """Median seconds of a step, and what follows from it."""
    model, mesh = config.model, make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, model, config.clock(model.max_length))
        layout = state_shardings(model, optimizer, mesh)
        options = config.compiler_options(jax.default_backend())
        step = jit_step(make_objective(config.objective, model, 1), optimizer, 1, layout, options)
        draw = jax.jit(lambda key: init_params(model, key), out_shardings=layout.params)
        state = start_state(draw(jax.random.key(0)), optimizer, layout)
        batch = random_batch(config, mesh)
        begun = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, None, batch))
        first = time.perf_counter() - begun
        taken, before, last = [], metrics, time.perf_counter()
        for _ in range(WARM + TIMED):
            state, metrics = step(state, None, batch)
            jax.device_get(before)
            now = time.perf_counter()
            taken, last, before = [*taken, now - last], now, metrics
        if profile:
            record(step, state, batch, profile)
    seconds = statistics.median(taken[WARM:])
    tokens = config.batch_size * model.max_length / seconds
    chip, memory = chip_of(jax.devices()[0]), jax.devices()[0].memory_stats() or {}
    peak = chip.peak_flops * len(jax.devices()) if chip else None
    work = {name: flops_per_token(model, model.max_length, causal=name == "causal") for name in ("causal", "full")}
    return {
        "ms": 1000 * seconds,
        "spread": (max(taken[WARM:]) - min(taken[WARM:])) / seconds,
        "tokens_per_second": tokens,
        **{f"mfu_{name}": tokens * flops / peak if peak else None for name, flops in work.items()},
        "GiB": memory.get("peak_bytes_in_use", 0) / 2**30,
        "first_step_seconds": first,
        "loss": float(metrics["loss"] / metrics["count"]),
    }


def random_batch(config: TrainConfig, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Packed rows of random tokens, of every id alike."""
    length, rng = config.model.max_length, np.random.default_rng(0)
    shape = (config.batch_size, length)
    cuts = np.sort(rng.integers(0, length, (config.batch_size, 7)))
    segments = 1 + (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)
    starts = np.concatenate([np.zeros((config.batch_size, 1), int), cuts], 1)
    positions = np.arange(length) - np.take_along_axis(starts, segments - 1, 1)
    tokens = rng.integers(0, config.model.vocab_size, shape)
    arrays = {
        "tokens": tokens,
        "positions": positions,
        "segments": segments,
        "labels": np.roll(tokens, -1, 1),
        "weights": np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1))),
        "source": np.zeros(config.batch_size),
    }
    described = abstract_batch(config.batch_size, length, (), mesh)
    return {name: jax.device_put(arrays[name].astype(one.dtype), one.sharding) for name, one in described.items()}


def record(step, state: TrainState, batch: dict, folder: str) -> None:
    """Traces three steps into `folder` and prints the operations that took most of the device's time."""
    with jax.profiler.trace(folder):
        for _ in range(3):
            state, metrics = step(state, None, batch)
        jax.block_until_ready(metrics)
    newest = max(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    spent = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        if plane.name.startswith("/device:"):
            for line in plane.lines:
                if line.name.startswith("Stream"):  # a GPU's; the other lines say the same in coarser pieces
                    for event in line.events:
                        spent[event.name] += event.duration_ns / 3e6
    whole = sum(spent.values())
    rows = [(name[:70], ms, 100 * ms / whole) for name, ms in spent.most_common(25)]
    table(f"where a step's {whole:,.0f} ms on the device went", ("", "ms", "%"), rows)


if __name__ == "__main__":
    main()
