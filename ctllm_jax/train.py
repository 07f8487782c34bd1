"""One loop for pretraining, SFT and DPO: the config says which.

The state after step n is a pure function of the config, the token store and the seed: the same for any number of
processes, and across kill and resume to the last bit (same devices).

Legend: S sources of the store.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import math
import shutil
import signal
import sys
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ctllm_jax import __version__, processes
from ctllm_jax.checkpoint import Checkpoints
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import write_json
from ctllm_jax.common.manifest import Stage, open_stage
from ctllm_jax.common.progress import Progress
from ctllm_jax.common.status import EXIT_RESUME
from ctllm_jax.data.batches import DataConfig, Stream, held_out, make_stream, prefetched
from ctllm_jax.data.store import TokenStore, open_store
from ctllm_jax.loading import LoadedModel, load_model
from ctllm_jax.metrics import Meter, MetricsLog
from ctllm_jax.model import ModelConfig, count_params, flops_per_token, init_params
from ctllm_jax.objectives import STORE_KINDS, ObjectiveConfig, make_objective
from ctllm_jax.optim import OptimizerConfig, make_optimizer, schedule
from ctllm_jax.restore import restore_newest
from ctllm_jax.sharding import RULES, MeshConfig, make_mesh
from ctllm_jax.step import TrainState, jit_step, state_shardings


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run."""

    objective: ObjectiveConfig
    model: ModelConfig | None  # None: as in init_from
    init_from: str | None  # run or Hugging Face folder whose parameters start the run (and are DPO's reference)
    data: DataConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    distributed: bool  # this process is one of a job of several (see ctllm_jax.processes)
    batch_size: int  # sequences (pairs for DPO) of a step, over all devices
    microbatches: int  # parts that a step's batch is gone through in
    steps: int
    seed: int
    log_every: int  # steps between lines of metrics.jsonl
    eval_every: int  # steps between looks at the held-out split
    eval_batches: int  # most batches of each source at such a look
    checkpoint_every: int  # steps between checkpoints; the last step is always saved
    checkpoint_minutes: float  # one is also due when the last is so many minutes old (0: never for that reason)
    checkpoints_kept: int  # newest checkpoints that stay; so do those that the next two say
    keep_every: int  # checkpoints of the multiples of so many steps stay for ever (0: none)
    keep_best: int  # so many with the lowest held-out loss stay (0: none), of the steps that were evaluated
    xla_options: dict[str, str]  # options of the step's compiler, by the names that XLA gives them

    def __post_init__(self):
        if self.batch_size % self.microbatches:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.microbatches} microbatches")
        if (self.model is None) == (self.init_from is None):
            raise ValueError("give either model (a fresh start) or init_from (its architecture is taken over)")
        if self.checkpoint_every < 1 or self.checkpoints_kept < 1:
            raise ValueError("checkpoint_every and checkpoints_kept must be at least 1")
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every {self.keep_every} is no multiple of checkpoint_every {self.checkpoint_every}: most of "
                "those steps would not be saved"
            )
        if self.keep_best and self.checkpoint_every % self.eval_every:
            raise ValueError(
                f"keep_best compares held-out losses, but not every step of checkpoint_every {self.checkpoint_every} "
                f"is evaluated (eval_every {self.eval_every}); make it a multiple"
            )


def evaluate(eval_fn, state: TrainState, reference: dict | None, job: "Job") -> dict[str, float]:
    """Means over the held-out split: loss over all and by source; bits per byte for documents, rewards for pairs."""
    config, store = job.config, job.store
    totals: dict[str, collections.Counter] = {}
    for source, text_bytes, batch in held_out(
        store, "validation", config.batch_size, config.eval_batches, config.data.mask_documents, job.mesh
    ):
        sums = jax.device_get(eval_fn(state.params, reference, batch))
        scalars = {name: float(value) for name, value in sums.items() if np.ndim(value) == 0}
        totals.setdefault(source, collections.Counter()).update({"bytes": text_bytes, **scalars})
    if not totals:
        return {}
    names = {name for total in totals.values() for name in total}
    whole = {name: sum(total[name] for total in totals.values()) for name in names}
    result = {"count": whole["count"], "loss": whole["loss"] / whole["count"]}
    result |= {f"loss/{source}": total["loss"] / total["count"] for source, total in totals.items()}
    if store.kind == "pretrain":
        bits = {"": whole, **{f"/{source}": total for source, total in totals.items()}}
        result |= {f"bits_per_byte{name}": t["loss"] / np.log(2) / t["bytes"] for name, t in bits.items()}
    for name in ("accuracy", "margin", "reward_chosen", "reward_rejected"):
        if name in whole:
            result[name] = whole[name] / whole["count"]
    return result


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run works with, besides its state."""

    config: TrainConfig
    model: ModelConfig
    store: TokenStore
    stream: Stream
    mesh: Mesh
    stage: Stage


def run(config: TrainConfig, workdir: str) -> dict:
    """Trains, or takes up a run that was cut short. Returns the last held-out figures and the token ledger.

    Raises:
      UserError: store, model and objective do not go together; the folder holds another run.
    """
    with processes.job() if config.distributed else contextlib.nullcontext():
        return _run(config, workdir)


def _run(config: TrainConfig, workdir: str) -> dict:
    store = open_store(config.data.store)
    origin = load_model(config.init_from) if config.init_from else None
    model = origin.config if origin else config.model
    _check_fit(config, model, origin, store)
    inputs = {"store": store.fingerprint, "init": origin.digest if origin else None}
    stream = make_stream(config.data, store, config.batch_size, config.seed)
    with processes.first_process_first():
        first = jax.process_index() == 0
        stage = open_stage("train", 2, workdir, _decisive(config, model), inputs, exclusive=first)
    if stage.done:
        _check_past_rates(config, stage.result["rates"], config.steps)
        return stage.result
    job = Job(config, model, store, stream, make_mesh(config.mesh), stage)
    _check_layout(job)
    with jax.set_mesh(job.mesh), _stop_on_signal() as stopping:
        result = _train(job, origin, stopping)
    return stage.finish(result) if jax.process_index() == 0 else result


def _train(job: Job, origin: LoadedModel | None, stopping: "_Stopping") -> dict:
    # ---- State: this run's newest checkpoint, or init_from, or drawn from the seed
    config, store, sources = job.config, job.store, job.store.sources("train")
    if jax.process_index() == 0:
        _write_run(job)
    optimizer = make_optimizer(config.optimizer, job.model, config.steps)
    state, reference = _start_state(job, optimizer, origin)
    first, ledger = 0, dict.fromkeys(sources, 0)
    saved = restore_newest(job.stage.folder, _like(state.params), _like((state.optimizer, state.step, state.skipped)))
    if saved:
        first, ledger = saved.step, saved.record["ledger"]
        _check_past_rates(config, saved.record["rates"], first)
        state = TrainState(saved.params, *saved.optimizer)
        print(f"train: resumed at step {first}", file=sys.stderr)
    checkpoints = Checkpoints(
        job.stage.folder,
        every=config.checkpoint_every,
        minutes=config.checkpoint_minutes,
        ask_every=config.log_every,
        kept=config.checkpoints_kept,
        keep_every=config.keep_every,
        keep_best=config.keep_best,
    )

    # ---- Compiled steps, the stream of batches, the books
    objective = make_objective(config.objective, job.model, len(sources))
    layout = state_shardings(job.model, optimizer, job.mesh)
    step_fn = jit_step(objective, optimizer, config.microbatches, layout, config.xla_options)
    everywhere = state.step.sharding
    eval_fn = jax.jit(lambda params, reference, batch: objective(params, reference, batch)[1], out_shardings=everywhere)
    log = MetricsLog(job.stage.folder, first)
    meter = Meter(log, config.log_every, schedule(config.optimizer, config.steps), sources, ledger)
    meter.measure(job.model, store, config.batch_size, job.mesh)

    # ---- The loop: dispatch a step, then read the metrics of the one before
    vote = processes.Vote(job.mesh)
    held = evaluate(eval_fn, state, reference, job)
    if first == 0:
        log.write("eval", 0, held)
    stream_out = sys.stderr if jax.process_index() == 0 else io.StringIO()  # one process speaks for all
    with Progress(f"train {config.objective.name}", config.steps, "steps", stream_out) as progress:
        for step, batch in enumerate(prefetched(job.stream, first, config.steps, job.mesh), first + 1):
            state, metrics = step_fn(state, reference, batch)
            meter.dispatched(step, metrics, progress)
            last, stop = step == config.steps, vote.cast(stopping.requested)  # all processes stop at the same step
            evaluated = last or step % config.eval_every == 0
            if evaluated:
                meter.catch_up(progress)
                held = evaluate(eval_fn, state, reference, job)
                log.write("eval", step, held)
                meter.restart_clock()
            if last or stop or checkpoints.due(step):
                meter.catch_up(progress)  # the ledger up to this very step goes into the checkpoint
                record = {
                    "step": step,
                    "ledger": meter.ledger,
                    "store": store.fingerprint,
                    "rates": _rates(config, step),
                }
                rest = (state.optimizer, state.step, state.skipped)
                loss = held.get("loss") if evaluated else None
                checkpoints.save(step, state.params, rest, record, loss, wait=last or stop)
                meter.restart_clock()
            if stop and not last:
                break
        else:
            stop = False

    # ---- End: everything committed before anyone is told
    checkpoints.close()
    log.close()
    if stop:
        print(f"train: stopped by a signal, step {step} is saved; the same command goes on", file=sys.stderr)
        sys.exit(EXIT_RESUME)
    return {
        "step": config.steps,
        "validation": held,
        "ledger": meter.ledger,
        "rates": _rates(config, config.steps),
        "skipped": int(state.skipped),
        "parameters": count_params(job.model),
    }


def _start_state(job: Job, optimizer, origin: LoadedModel | None) -> tuple[TrainState, dict | None]:
    """(state at step 0 laid out over the mesh, DPO's frozen reference)."""
    layout = state_shardings(job.model, optimizer, job.mesh)
    if origin is None:
        draw = jax.jit(functools.partial(init_params, job.model), out_shardings=layout.params)
        params = draw(jax.random.key(job.config.seed))
    else:
        params = jax.device_put(jax.device_get(origin.params), layout.params)  # every process has read all of them
    reference = jax.tree.map(jnp.copy, params) if job.config.objective.name == "dpo" else None
    moments = jax.jit(optimizer.init, out_shardings=layout.optimizer)(params)
    step, skipped = (jax.device_put(np.int32(0), layout.step) for _ in range(2))
    return TrainState(params, moments, step, skipped), reference


def _like(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _decisive(config: TrainConfig, model: ModelConfig) -> dict:
    """The settings that decide the result: where the run's folder must agree. The others may change on resume."""
    settings = dataclasses.asdict(config)
    for name in ("mesh", "distributed", "microbatches", "log_every", "eval_every", "eval_batches"):
        settings.pop(name)
    for name in (
        "checkpoint_every",
        "checkpoint_minutes",
        "checkpoints_kept",
        "keep_every",
        "keep_best",
        "xla_options",
    ):
        settings.pop(name)
    settings.pop("init_from")  # by its digest
    settings["objective"].pop("cross_entropy")  # a matter of memory
    settings["data"].pop("store")  # by its fingerprint
    settings["data"].pop("rates"), settings["data"].pop("rate_changes")  # may change ahead: see _check_past_rates
    settings["model"] = dataclasses.asdict(model)
    for name in ("remat", "attention"):  # a matter of memory and of the chip
        settings["model"].pop(name)
    return settings


def _rates(config: TrainConfig, step: int) -> list[dict]:
    """The rates that the first `step` steps were drawn at."""
    phases = config.data.phases(config.batch_size)
    return [dataclasses.asdict(phase) for phase in phases if phase.start < step * config.batch_size]


def _check_past_rates(config: TrainConfig, seen: list[dict], step: int) -> None:
    """Rates may change ahead of a run, never behind it: what it has learned from would be another stream."""
    if seen != _rates(config, step):
        raise UserError(
            f"data.rates or data.rate_changes differ for the steps up to {step}, which this run has made with {seen}; "
            f"give those, and changes from step {step + 1} on as data.rate_changes"
        )


def _check_fit(config: TrainConfig, model: ModelConfig, origin: LoadedModel | None, store: TokenStore) -> None:
    """Store, model and objective go together."""
    if store.kind not in STORE_KINDS[config.objective.name]:
        wanted = " or ".join(STORE_KINDS[config.objective.name])
        raise UserError(f"{store.folder} is a {store.kind} store; objective {config.objective.name} reads {wanted}")
    if store.tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{store.folder}: its tokenizer has {store.tokenizer.vocab_size} ids, the model only {model.vocab_size}"
        )
    if origin and origin.tokenizer.digest != store.tokenizer.digest:
        raise UserError(
            f"{store.folder} was made with another tokenizer than {config.init_from}; "
            f"build it with `ctllm tokenize --config.tokenizer={origin.tokenizer.file}`"
        )
    if store.sequence_length > model.max_length:
        raise UserError(f"{store.folder}: rows of {store.sequence_length} tokens, the model takes {model.max_length}")


def _check_layout(job: Job) -> None:
    """A batch divides over the mesh."""
    shape = job.mesh.shape
    for what, size, axes in (
        ("batch_size", job.config.batch_size, RULES["batch"]),
        ("the rows' length", job.store.sequence_length, RULES["length"]),
    ):
        ways = math.prod(shape[axis] for axis in axes)
        if size % ways:
            raise UserError(f"{what} {size} does not divide over {ways} devices (mesh: {' x '.join(axes)})")


def _write_run(job: Job) -> None:
    """run.json and the tokenizer: the run directory is complete in itself."""
    length = job.store.sequence_length
    write_json(
        job.stage.folder / "run.json",
        {
            "fingerprint": job.stage.fingerprint,
            "config": dataclasses.asdict(job.config),
            "model": dataclasses.asdict(job.model),
            "parameters": count_params(job.model),
            "flops_per_token": {
                "causal": flops_per_token(job.model, length, causal=True),
                "full": flops_per_token(job.model, length, causal=False),
            },
            "mesh": dict(job.mesh.shape),
            "devices": f"{job.mesh.size} x {job.mesh.devices.flat[0].device_kind}",
            "versions": {"ctllm-jax": __version__, "jax": jax.__version__, "flax": flax.__version__},
        },
    )
    shutil.copytree(job.store.tokenizer_folder, job.stage.folder / "tokenizer", dirs_exist_ok=True)


class _Stopping:
    requested = False


@contextlib.contextmanager
def _stop_on_signal():
    """Turns SIGTERM and Ctrl-C into a request that the loop honours after the step at hand; a second one kills."""
    stopping = _Stopping()

    def request(number, _):
        stopping.requested = True
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
