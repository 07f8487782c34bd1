"""The trainer on this machine: its step beside PyTorch's, what the loop, a save and a start cost.

    python benchmarks/train.py [--quick] [--part PART] [--folder DIR] [--width WIDTH] [--rows ROWS]

step    tokens/s of a model of 5.8 M parameters, beside Hugging Face's Llama under PyTorch: same weights, same batches
loop    what the loop of `ctllm train` adds to steps of about 100 ms
save    how long an asynchronous save holds the next step up, beside the same save waited for
start   seconds from the start of the process to the first step done, with an empty and with a filled compilation cache

benchmarks/README.md says what is counted, and how.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import pathlib
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
from common import CTLLM, Cost, finish, made, table, take_turns
from train_step import LENGTH, config_of, cores, step

from ctllm_jax import train
from ctllm_jax.checkpoint import CheckpointConfig, Checkpoints
from ctllm_jax.data.batches import prefetched
from ctllm_jax.model import count_params, init_params
from ctllm_jax.optim import make_optimizer
from ctllm_jax.sharding import make_mesh
from ctllm_jax.step import TrainState, jit_step, start_state, state_shardings

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = ("step", "loop", "save", "start")


def main() -> None:
    """Runs the parts that are asked for and prints their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, a small state to save")
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--folder", help="keeps what is prepared, and finds what an earlier run prepared")
    parser.add_argument("--width", type=int, help="of the model of loop and save: another than two CPU cores can bear")
    parser.add_argument("--rows", type=int, default=4, help="of 256 tokens in loop's batch, for steps of about 100 ms")
    options = parser.parse_args()
    parts, figures = [options.part] if options.part else PARTS, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, scratch = pathlib.Path(options.folder or scratch).resolve(), pathlib.Path(scratch)
        if "step" in parts:
            figures |= step(prepared(folder, LENGTH), scratch, rounds=3 if options.quick else 12)
        if "loop" in parts:
            pairs = 6 if options.quick else 60
            figures |= loop(prepared(folder, 256), scratch, options.width, options.rows, pairs)
        if "save" in parts:
            width = options.width or (256 if options.quick else 1024)
            figures |= save(scratch, width, rounds=3 if options.quick else 7)
        if "start" in parts:
            figures |= start(prepared(folder, 256), scratch, rounds=1 if options.quick else 3)
    figures |= {"cores": cores(), "jax": jax.__version__, "quick": options.quick}
    finish({name: figures[name] for name in sorted(figures, key=lambda name: not name.endswith("_ratio"))})


def prepared(folder: pathlib.Path, length: int) -> pathlib.Path:
    """A token store of the sample with rows of this length, made by the verbs themselves unless it is there."""
    corpus = made(folder / "corpus", "corpus", {"input": (f"{ROOT}/sample/documents/*.jsonl",)})
    trained = {"corpus": corpus, "vocab_size": 4096, "character_coverage": 0.99}
    tokenizer = made(folder / "tokenizer", "tokenizer", trained)
    packed = {"corpus": corpus, "tokenizer": tokenizer, "sequence_length": length}
    return made(folder / f"store-{length}", "tokenize", packed)


# ---- loop


class Turns:
    """Lets a run's own compiled step, bare, take turns with blocks of the run's loop.

    A block of either begins with nothing under way and ends when all its steps are done. The bare step works on a copy
    of the state and on a batch that is on the device.

    Attributes:
      loop, bare: what each block took, by turns, a bare one first and last.
    """

    def __init__(self, block: int):
        self.loop: list[Spent] = []
        self.bare: list[Spent] = []
        self._block = block
        self._step = self._state = self._batch = self._metrics = None

    def jit_step(self, *arguments: object) -> Callable:
        """Stands in for the trainer's `jit_step`."""
        self._step = jit_step(*arguments)

        def one(state, reference, batch):
            if self._state is None:
                self._state, self._batch = jax.tree.map(jnp.copy, state), batch
            state, self._metrics = self._step(state, reference, batch)
            return state, self._metrics

        return one

    def prefetched(self, stream, start: int, stop: int, mesh) -> Iterator[dict]:
        """Stands in for the trainer's `prefetched`: the loop takes a block of steps between two bare ones."""
        batches = prefetched(stream, start, stop, mesh)
        yield from itertools.islice(batches, self._block)  # compiles, and is not counted
        for _ in range(start + self._block, stop, self._block):
            jax.block_until_ready(self._metrics)
            self.bare.append(self._bare())
            clock = Clock()
            yield from itertools.islice(batches, self._block)
            jax.block_until_ready(self._metrics)
            self.loop.append(clock.spent())
        self.bare.append(self._bare())

    def _bare(self) -> "Spent":
        clock = Clock()
        for _ in range(self._block):
            self._state, metrics = self._step(self._state, None, self._batch)
        jax.block_until_ready(metrics)
        return clock.spent()


def of_width(width: int) -> dict[str, int]:
    """Changes of configs/pretrain.py:tiny that make its model so wide."""
    return {"model.d_model": width, "model.d_ff": 11 * width // 4, "model.head_dim": width // 4}


def loop(store: pathlib.Path, scratch: pathlib.Path, width: int | None, rows: int, pairs: int, block: int = 10) -> dict:
    """What the trainer's loop adds to its step; evaluation and saving are not in it."""
    steps = (pairs + 1) * block
    rare = {"eval.every": steps, "eval.batches": 1, "checkpoints.every": steps, "checkpoints.minutes": 0.0}
    changes = rare | (of_width(width) if width else {})
    config, turns = config_of(store, batch_size=rows, duration=f"{steps} steps", **changes), Turns(block)
    replaced = {"jit_step": turns.jit_step, "prefetched": turns.prefetched}
    with mock.patch.multiple(train, **replaced), contextlib.redirect_stderr(io.StringIO()):
        train.run(config, str(scratch / "loop"))
    lines, figures = [], {}
    for kind in ("wall", "host"):
        bare = [getattr(spent, kind) / block for spent in turns.bare]
        whole = [getattr(spent, kind) / block for spent in turns.loop]
        added = [own - (before + after) / 2 for own, before, after in zip(whole, bare[:-1], bare[1:], strict=True)]
        more, (low, high) = statistics.median(added), median_bounds(added)
        lines.append((kind, *(1000 * seconds for seconds in (statistics.median(bare), more, low, high))))
        figures |= {f"loop_{kind}_added_s": more, f"loop_{kind}_added_low_s": low, f"loop_{kind}_added_high_s": high}
    table(
        f"loop: {pairs} blocks of {block} steps between blocks of the bare step; a line is logged every "
        f"{config.log.every} steps",
        ("", "ms a bare step", "ms added", "at least", "at most"),
        lines,
    )
    step = statistics.median(spent.wall for spent in turns.bare) / block
    shares = {f"loop_{kind}_share": figures[f"loop_{kind}_added_s"] / step for kind in ("wall", "host")}
    print(f"{100 * shares['loop_wall_share']:.2f} % of the step; target: less than 1 % of one of about 100 ms")
    return {**shares, **figures, "loop_bare_step_s": step}


def median_bounds(values: Sequence[float]) -> tuple[float, float]:
    """Between what the median of what these were drawn from lies, in 95 cases of 100: order statistics by the sign
    test, which a few blocks that something else held up do not widen."""
    ordered, count = sorted(values), len(values)
    below = max(1, int((count - 1.96 * count**0.5) / 2)) - 1
    return ordered[below], ordered[-1 - below]


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds: by the wall clock; of CPU, by the threads of Python, which do not compute."""

    wall: float
    host: float


class Clock:
    """What is spent from now on."""

    def __init__(self):
        self._threads, self._wall = self._host(), time.perf_counter()

    def spent(self) -> Spent:
        """So far."""
        wall = time.perf_counter() - self._wall
        return Spent(wall, sum(now - self._threads.get(thread, 0.0) for thread, now in self._host().items()))

    @staticmethod
    def _host() -> dict[int, float]:
        """CPU seconds of each thread."""
        threads = [thread.ident for thread in threading.enumerate()]
        return {thread: time.clock_gettime(time.pthread_getcpuclockid(thread)) for thread in threads}


# ---- save


def save(scratch: pathlib.Path, width: int, rounds: int) -> dict:
    """How long a save in the background holds up a loop whose next step takes over the state's memory."""
    config = config_of(scratch, **of_width(width))
    mesh, clock = make_mesh(config.mesh), config.clock(config.model.max_length)
    optimizer = make_optimizer(config.optimizer, config.model, clock)
    layout = state_shardings(config.model, optimizer, mesh)
    params = jax.device_put(init_params(config.model, jax.random.key(0)), layout.params)
    state = drawn(start_state(params, optimizer, layout))
    next_step = jax.jit(functools.partial(jax.tree.map, jnp.negative), donate_argnums=0)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(next_step(state))

    def copy() -> None:
        jax.block_until_ready(jax.tree.map(jnp.copy, state))

    def saved(wait: bool) -> Cost:
        checkpoints = Checkpoints(scratch / "save", CheckpointConfig(1, 0.0, 1, 0, 0), ask_every=1)

        def one() -> None:
            checkpoints.save(1, state.params, state.rest, {"step": 1}, wait=wait)
            step()

        cost = timed(one)
        checkpoints.close()
        shutil.rmtree(scratch / "save")
        return cost

    step(), copy(), saved(True)  # compiles
    turns = {"step alone": lambda: timed(step), "a copy of the state": lambda: timed(copy)}
    turns |= {"step after a save in the background": lambda: saved(False), "the save waited for": lambda: saved(True)}
    costs = take_turns(turns, rounds)
    alone, floor, held, whole = (statistics.median(cost.wall for cost in own) for own in costs.values())
    gib = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**30
    table(
        f"save: {count_params(config.model):,} parameters with their moments, {gib:.2f} GiB, to {scratch}",
        ("", "s", "median"),
        [
            (name, min(cost.wall for cost in own), statistics.median(cost.wall for cost in own))
            for name, own in costs.items()
        ],
    )
    share, least = (held - alone) / (whole - alone), floor / (whole - alone)
    print(f"held up for {100 * share:.1f} % of a save's time (a copy takes {100 * least:.1f} %); target: less than 5 %")
    return {"save_held_share": share, "save_copy_share": least, "save_held_s": held - alone, "save_s": whole - alone}


@functools.partial(jax.jit, donate_argnums=0)
def drawn(state: TrainState) -> TrainState:
    """The state with moments as those of a run, not zeros, which are compressed to nothing and so saved at once."""

    def values(number: int, leaf: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(number), leaf.shape, leaf.dtype) if leaf.ndim else leaf

    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, [values(number, leaf) for number, leaf in enumerate(leaves)])


def timed(work: Callable[[], None]) -> Cost:
    """What a piece of work took."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall)


# ---- start


def start(store: pathlib.Path, scratch: pathlib.Path, rounds: int) -> dict:
    """Seconds from the start of `ctllm train` to its first step in metrics.jsonl."""
    cache = scratch / "cache"

    def run(cold: bool) -> Cost:
        if cold:
            shutil.rmtree(cache, ignore_errors=True)
        workdir = scratch / "start"
        command = [*CTLLM, "train", "--config=configs/pretrain.py:tiny", f"--config.data.store={store}"]
        clock = time.perf_counter()
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
            stderr=subprocess.DEVNULL,
        )
        try:
            while not has_stepped(workdir / "metrics.jsonl"):
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
                time.sleep(0.02)
            return Cost(cpu_seconds(process.pid), time.perf_counter() - clock)
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(workdir)

    costs = take_turns({"empty cache": lambda: run(True), "filled cache": lambda: run(False)}, rounds)
    table(
        "start: to the first step of configs/pretrain.py:tiny, from the start of the process",
        ("", "s", "median", "CPU s"),
        [
            (name, min(c.wall for c in own), statistics.median(c.wall for c in own), min(c.cpu for c in own))
            for name, own in costs.items()
        ],
    )
    print("target: less than 60 s with a filled cache")
    cold, warm = (statistics.median(cost.wall for cost in own) for own in costs.values())
    return {"start_warm_s": warm, "start_cold_s": cold}


def has_stepped(metrics: pathlib.Path) -> bool:
    """Whether a run has written down its first step."""
    return metrics.exists() and '"kind": "train", "step": 1,' in metrics.read_text()


def cpu_seconds(process: int) -> float:
    """User and system seconds of a process so far."""
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
