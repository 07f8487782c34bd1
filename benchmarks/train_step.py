"""The trainer's compiled step beside Hugging Face's Llama under PyTorch: the part `step` of train.py."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from common import Cost, Peer, environment, peer, table, take_turns

from configs import pretrain
from ctllm_jax.common.config import build
from ctllm_jax.common.files import write_json
from ctllm_jax.data.batches import global_batch, make_stream
from ctllm_jax.data.store import TokenStore, open_store
from ctllm_jax.hf_export import export
from ctllm_jax.model import count_params, init_params
from ctllm_jax.objectives import make_objective
from ctllm_jax.optim import make_optimizer
from ctllm_jax.sharding import make_mesh
from ctllm_jax.step import TrainState, jit_step, start_state, state_shardings
from ctllm_jax.train_config import TrainConfig

PEERS = ("torch==2.15.0", "transformers==5.24.0", "numpy==2.4.6")
LENGTH = 512  # of the rows of the step's batches; the other parts take configs/pretrain.py:tiny, whose rows have 256


def cores() -> int:
    """Cores that this process may use: as many threads as both contestants take."""
    return len(os.sched_getaffinity(0))


def config_of(store: pathlib.Path, **changes: object) -> TrainConfig:
    """configs/pretrain.py:tiny on this machine's CPU with changes; a key may reach into a group, as `model.remat`."""
    config = pretrain.get_config("tiny")
    config.data.store = str(store)
    config.update_from_flattened_dict(changes)
    return build(TrainConfig, config.to_dict())


@dataclasses.dataclass
class Ours:
    """The trainer's compiled step, taken some steps at a time."""

    config: TrainConfig
    state: TrainState
    take: Callable
    batches: Iterator[dict]
    losses: list[float]

    def __call__(self, steps: int) -> Cost:
        wall, cpu, found = time.perf_counter(), time.process_time(), []
        for _ in range(steps):
            self.state, metrics = self.take(self.state, None, next(self.batches))
            found.append(metrics)
        found = jax.device_get(found)
        cost = Cost(time.process_time() - cpu, time.perf_counter() - wall)
        self.losses += [float(metrics["loss"] / metrics["count"]) for metrics in found]
        return cost


class Theirs(Peer):
    """`torch_step.py`, taken some steps at a time."""

    def __init__(self, process: subprocess.Popen):
        super().__init__(process)
        self.losses: list[float] = []

    def __call__(self, steps: int) -> Cost:
        cost = super().__call__(steps)
        self.losses += self.found["losses"]
        return cost


def step(store_folder: pathlib.Path, scratch: pathlib.Path, rounds: int, batch_size: int = 4, steps: int = 3) -> dict:
    """Tokens per second of both, by turns, and whether they did the same work."""
    store = open_store(store_folder)
    config = _step_config(store_folder, store.tokenizer.vocab_size, batch_size)
    ours = own_step(config, store, scratch)
    with contextlib.ExitStack() as stack:
        contestants = {"ctllm-jax": ours}
        script = pathlib.Path(__file__).with_name("torch_step.py")
        inputs = [scratch / "model", scratch / "batches.npz", scratch / "settings.json"]
        for mode in ("eager", "compiled"):
            command = [environment("train", PEERS), script, *inputs, mode, cores()]
            contestants[f"PyTorch, {mode}"] = stack.enter_context(peer(command, Theirs))
        warm = {name: contestant(steps) for name, contestant in contestants.items()}
        turns = {name: lambda contestant=contestant: contestant(steps) for name, contestant in contestants.items()}
        costs = take_turns(turns, rounds)
    distance = max(
        abs(theirs - own) / own
        for name, contestant in contestants.items()
        for own, theirs in zip(ours.losses, contestant.losses, strict=True)
    )
    tokens = batch_size * LENGTH * steps
    speed = {name: tokens / min(cost.wall for cost in own) for name, own in costs.items()}
    frugality = {name: tokens / min(cost.cpu for cost in own) for name, own in costs.items()}
    about = contestants["PyTorch, eager"].about
    assert about["parameters"] == count_params(config.model)
    table(
        f"step: {about['parameters']:,} parameters, {batch_size} x {LENGTH} tokens, fp32, {cores()} threads; "
        f"jax {jax.__version__}, torch {about['torch']}, transformers {about['transformers']}",
        ("", "tokens/s", "median", "tokens/CPU s", "first turn, s", "loss after all", "x ctllm-jax"),
        [
            (
                name,
                speed[name],
                tokens / statistics.median(cost.wall for cost in costs[name]),
                frugality[name],
                warm[name].wall,
                contestant.losses[-1],
                speed[name] / speed["ctllm-jax"],
            )
            for name, contestant in contestants.items()
        ],
    )
    print(f"losses of all {len(ours.losses)} steps agree within {distance:.1e}")
    best = max((name for name in contestants if name != "ctllm-jax"), key=speed.get)
    paired = [other.wall / own.wall for own, other in zip(costs["ctllm-jax"], costs[best], strict=True)]
    return {
        "step_to_torch_ratio": speed["ctllm-jax"] / speed[best],
        "step_to_torch_paired_ratio": statistics.median(paired),
        "step_to_torch_cpu_ratio": frugality["ctllm-jax"] / frugality[best],
        "step_tokens_per_second": speed,
        "step_best_peer": best,
        "step_loss_distance": distance,
    }


def _step_config(store: pathlib.Path, vocab_size: int, batch_size: int) -> TrainConfig:
    """The model and settings that both take."""
    shape = dict(num_layers=6, d_model=256, num_heads=4, num_kv_heads=4, head_dim=64, d_ff=688, tie_embeddings=True)
    shape["remat"] = "matmuls"  # on a CPU, memory that is written once and read once costs more than a softmax
    shape |= dict(vocab_size=vocab_size, padded_vocab_size=vocab_size, max_length=LENGTH)
    changes = {f"model.{name}": value for name, value in shape.items()}
    # No documents apart in a row, which would cost Hugging Face's attention its fast path.
    changes |= {"data.mask_documents": False, "optimizer.schedule": "constant", "optimizer.warmup": "0 steps"}
    return config_of(store, batch_size=batch_size, **changes)


def own_step(config: TrainConfig, store: TokenStore, scratch: pathlib.Path) -> Ours:
    """Our contestant; its weights, batches and settings are left in `scratch` for the other."""
    mesh, stream = make_mesh(config.mesh), make_stream(config.data, store, config.batch_size, config.seed)
    optimizer = make_optimizer(config.optimizer, config.model, config.clock(config.model.max_length))
    layout = state_shardings(config.model, optimizer, mesh)
    params = jax.device_put(init_params(config.model, jax.random.key(config.seed)), layout.params)
    export(config.model, params, store.tokenizer, scratch / "model", "float32")
    batches = [global_batch(stream, number, mesh) for number in range(8)]
    arrays = [jax.device_get(batch) for batch in batches]
    labels = [np.where(one["weights"] > 0, one["labels"], -100)[:, :-1] for one in arrays]  # the peer shifts by itself
    np.savez(
        scratch / "batches.npz",
        input_ids=[one["tokens"] for one in arrays],
        labels=np.pad(labels, ((0, 0), (0, 0), (1, 0)), constant_values=-100),
    )
    write_json(scratch / "settings.json", dataclasses.asdict(config.optimizer))
    objective = make_objective(config.objective, config.model, len(store.sources("train")))
    take = jit_step(objective, optimizer, 1, layout)
    return Ours(config, start_state(params, optimizer, layout), take, itertools.cycle(batches), [])
