"""One loop for pretraining, SFT and DPO: the config says which.

The state after step n is a pure function of the config, the token store and the seed: the same for any number of
processes, and across kill and resume to the last bit on CPUs. On a GPU XLA adds up some sums in no fixed order, so
there two runs agree in what they see, not in the last bits of what they learn.
"""

import contextlib
import dataclasses
import functools
import io
import math
import shutil
import sys
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ctllm_jax import __version__, processes
from ctllm_jax.checkpoint import Checkpoints, save_params
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import write_json
from ctllm_jax.common.manifest import Stage, open_stage
from ctllm_jax.common.progress import Progress
from ctllm_jax.common.status import EXIT_RESUME
from ctllm_jax.compiled import keep_compiled
from ctllm_jax.data.batches import Stream, make_stream, prefetched
from ctllm_jax.data.store import TokenStore, open_store
from ctllm_jax.duration import Clock
from ctllm_jax.evaluate.in_loop import HeldOut, InLoop, Probes, SamplesLog, make_probes
from ctllm_jax.loading import FoundModel, find_model
from ctllm_jax.lora import adapted, joined, trained
from ctllm_jax.metrics.log import open_log
from ctllm_jax.metrics.meter import Meter
from ctllm_jax.mirror import RunFolder, run_folder
from ctllm_jax.model import ModelConfig, abstract_params, count_params, flops_per_token, init_params
from ctllm_jax.objectives import make_objective
from ctllm_jax.optim import Optimizer, make_optimizer
from ctllm_jax.reference import scored_store
from ctllm_jax.restore import restore_newest
from ctllm_jax.sharding import make_mesh
from ctllm_jax.step import TrainState, jit_step, joined_state, start_state, state_shardings
from ctllm_jax.stopping import Stopping, stop_on_notice, stop_on_signal
from ctllm_jax.train_config import TrainConfig, check_fit, check_layout, check_past_rates, decisive, rates
from ctllm_jax.watch import LoopWatch


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run works with, besides its state.

    Attributes:
      folder: where it writes on this machine, and what becomes of it; `stage.folder` is its path.
    """

    config: TrainConfig
    model: ModelConfig
    clock: Clock
    store: TokenStore
    stream: Stream
    mesh: Mesh
    folder: RunFolder
    stage: Stage
    probes: Probes

    @property
    def adapters(self) -> int:
        """Parameters of LoRA's adapters; 0 where all of the model's are trained."""
        ranks = self.config.lora.ranks
        return count_params(self.model, ranks) - count_params(self.model) if ranks else 0


def run(config: TrainConfig, workdir: str) -> dict:
    """Trains, or resumes a run that was cut short. Returns the last held-out figures and the token ledger.

    Raises:
      UserError: store, model and objective do not go together; the folder holds another run, or is in use.
    """
    with processes.job() if config.distributed else contextlib.nullcontext(), run_folder(workdir) as folder:
        return _run(config, folder)


def _run(config: TrainConfig, folder: RunFolder) -> dict:
    keep_compiled()
    store = open_store(config.data.store)
    origin = find_model(config.init_from, config.init_step) if config.init_from else None
    model = origin.config if origin else config.model
    check_fit(config, model, origin, store)
    inputs = {"store": store.fingerprint, "init": origin.digest if origin else None}
    stream = make_stream(config.data, store, config.batch_size, config.seed)
    probes = make_probes(config.eval, store, model.max_length)
    clock = config.clock(store.sequence_length, sum(store.size("train", source) for source in store.sources("train")))
    with processes.first_process_first():
        first = jax.process_index() == 0
        stage = open_stage("train", 3, folder.path, decisive(config, model, clock), inputs, exclusive=first)
    if stage.done:
        check_past_rates(config, stage.result["rates"], clock.run)
        return stage.result
    job = Job(config, model, clock, store, stream, make_mesh(config.mesh), folder, stage, probes)
    check_layout(config, store, job.mesh)
    with (
        jax.set_mesh(job.mesh),
        stop_on_signal() as stopping,
        stop_on_notice(config.watch.notices, stopping),
        LoopWatch(stage.folder, config.watch, stopping) as watch,
    ):
        result = _train(job, origin, stopping, watch)
    return stage.finish(result) if jax.process_index() == 0 else result


def _train(job: Job, origin: FoundModel | None, stopping: Stopping, watch: LoopWatch) -> dict:
    if jax.process_index() == 0:
        _write_run(job)
    optimizer = make_optimizer(job.config.optimizer, job.model, job.clock, job.config.lora.ranks)
    state, frozen = _start_state(job, optimizer, origin)
    if job.config.objective.reference == "cached":
        job = _with_reference(job, frozen or state.params, origin.digest, stopping, watch)
    state, first, ledger = _newest_state(job, state)
    config, store, sources, steps = job.config, job.store, job.store.sources("train"), job.clock.run
    checkpoints = Checkpoints(job.stage.folder, config.checkpoints, config.log.every, job.folder.before_commit)

    # ---- Compiled steps, the stream of batches, the books
    objective = make_objective(config.objective, job.model, len(sources))
    layout = state_shardings(job.model, optimizer, job.mesh, config.lora.ranks)
    options = config.compiler_options(job.mesh.devices.flat[0].platform)
    step_fn = jit_step(adapted(config.lora, objective), optimizer, config.microbatches, layout, options)
    held_out = HeldOut(
        config.eval, store, config.batch_size, config.microbatches, config.data.mask_documents, job.mesh, objective
    )
    in_loop = InLoop(held_out, job.probes, job.model, job.mesh)
    samples = SamplesLog(job.stage.folder, first, writes=jax.process_index() == 0)
    log = open_log(config.log, job.stage, first, dataclasses.asdict(config), writes=jax.process_index() == 0)
    meter = Meter(log, config.log, sources, ledger, patience=config.optimizer.spike_window)
    meter.measure(job.model, store, config.batch_size, job.mesh, job.adapters)

    def look() -> tuple[dict[str, float], list[dict]]:
        """(held-out figures, samples) of the model as it is now."""
        whole = joined(config.lora, state.model, frozen)
        held = in_loop.evaluate(whole, frozen)
        config.checkpoints.check_known(held)
        return held, in_loop.sample(whole)

    # ---- The loop: dispatch a step, then read the metrics of the one before
    vote = processes.Vote(job.mesh)
    if first in (0, steps):
        held, texts = look()
    if first == 0:
        log.write("eval", 0, {**held, **job.probes.chance})
        samples.write(0, texts)
    stream_out = sys.stderr if jax.process_index() == 0 else io.StringIO()  # one process speaks for all
    with Progress(f"train {config.objective.name}", steps, "steps", stream_out) as progress, meter.profiler:
        for step, batch in meter.steps(prefetched(job.stream, first, steps, job.mesh), first, progress):
            watch.at("step", step)
            state, metrics = step_fn(state, frozen, batch)
            meter.dispatched(step, metrics)
            last, stop = step == steps, vote.cast(stopping.requested)  # all processes stop at the same step
            evaluated = last or step % config.eval.every == 0
            if stop:
                stopping.request("another process of the job was asked")
            if evaluated:
                watch.at("evaluation", step)
                meter.pause("evaluation")
                held, texts = look()
                samples.write(step, texts)
                log.write("eval", step, {**held, **meter.go_on()})
                job.folder.publish()
            if last or stop or checkpoints.due(step):
                watch.at("save", step)
                meter.pause("checkpoint")  # the ledger up to this very step goes into the checkpoint
                record = {"step": step, "ledger": meter.ledger, "store": store.fingerprint}
                record["rates"] = rates(config, step)
                figures = held if evaluated else None
                checkpoints.save(step, state.model, state.rest, record, figures, wait=last or stop)
                meter.go_on()
            if stop and not last:
                break
            watch.at("input", step + 1)
        else:
            stop = False

    # ---- End: everything committed before anyone is told
    if config.checkpoints.keep_best and jax.process_index() == 0 and (best := checkpoints.best()):
        print(f"train: the best so far by {config.checkpoints.best} is step {best[0]}, {best[1]:.6g}", file=sys.stderr)
    checkpoints.close()
    log.close()
    if stop:
        print(f"train: stopped by {stopping.reason}, step {step} is saved; the same command goes on", file=sys.stderr)
        sys.exit(EXIT_RESUME)
    return _result(job, state, held, meter.ledger)


def _with_reference(job: Job, params: dict, digest: str, stopping: Stopping, watch: LoopWatch) -> Job:
    """The job with a store that knows what the reference thinks of every answer.

    Args:
      job: of preference pairs.
      params: the reference's.
      digest: of the model that they are from.
      stopping, watch: for the time that it takes to compute.
    """
    vote = processes.Vote(job.mesh)

    def stop(batch: int) -> bool:
        watch.at("reference", batch)
        return vote.cast(stopping.requested)

    store = scored_store(job.stage.folder, job.store, job.config, job.model, params, digest, job.mesh, stop)
    return dataclasses.replace(job, store=store, stream=dataclasses.replace(job.stream, store=store))


def _newest_state(job: Job, start: TrainState) -> tuple[TrainState, int, dict[str, int]]:
    """(state, steps done, ledger) of the run's newest checkpoint, or `start`, 0 and an empty ledger.

    `start` says how a state is laid out, and is used up by a checkpoint's.
    """
    like = _like(start.model), _like(start.rest)
    saved = restore_newest(job.stage.folder, *like, make_room=functools.partial(_delete, start))
    if saved is None:
        return start, 0, dict.fromkeys(job.store.sources("train"), 0)
    check_past_rates(job.config, saved.record["rates"], saved.step)
    print(f"train: resumed at step {saved.step}", file=sys.stderr)
    return joined_state(saved.params, saved.optimizer), saved.step, saved.record["ledger"]


def _result(job: Job, state: TrainState, held: dict[str, float], ledger: dict[str, int]) -> dict:
    if diverged := [name for name, value in held.items() if not math.isfinite(value)]:
        raise UserError(
            f"{job.stage.folder}: the model has diverged: after the last step {', '.join(diverged)} of held-out data "
            "is not finite. `ctllm report` shows since when; a smaller learning rate may help, in another folder"
        )
    return {
        "step": job.clock.run,
        "validation": held,
        "ledger": ledger,
        "rates": rates(job.config, job.clock.run),
        "skipped": int(state.skipped),
        "parameters": count_params(job.model),
    }


def _start_state(job: Job, optimizer: Optimizer, origin: FoundModel | None) -> tuple[TrainState, dict | None]:
    """(state at step 0, laid out over the mesh; parameters that its steps only read, or None).

    Those are the model under LoRA's adapters, or DPO's live reference.
    """
    config, ranks = job.config, job.config.lora.ranks
    layout = state_shardings(job.model, optimizer, job.mesh, ranks)
    frozen = None
    if origin is None or ranks:
        draw = jax.jit(lambda key: trained(init_params(job.model, key, ranks)), out_shardings=layout.params)
        params = draw(jax.random.key(config.seed))
    if origin is not None:
        given = origin.read(job.mesh, abstract_params(origin.config))
        if ranks:
            frozen = given
            _keep_base(job, frozen)
        else:
            params = given
            frozen = jax.tree.map(jnp.copy, params) if config.objective.reference == "live" else None
    return start_state(params, optimizer, layout), frozen


def _keep_base(job: Job, frozen: dict) -> None:
    """Writes RUN/base, a run directory with the frozen parameters, for checkpoints hold the adapters alone."""
    folder = job.stage.folder / "base"
    if jax.process_index() == 0:
        about = {"model": dataclasses.asdict(job.model), "fingerprint": f"base of {job.stage.fingerprint}"}
        write_json(folder / "run.json", about)
        shutil.copytree(job.store.tokenizer_folder, folder / "tokenizer", dirs_exist_ok=True)
    save_params(folder, frozen, 0)


def _like(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _delete(state: TrainState) -> None:
    """Frees a state's arrays on the devices, which may not have room for two states."""
    for array in jax.tree.leaves(state):
        array.delete()


def _write_run(job: Job) -> None:
    """Writes run.json and the tokenizer, which make the run directory complete in itself."""
    length = job.store.sequence_length
    write_json(
        job.stage.folder / "run.json",
        {
            "fingerprint": job.stage.fingerprint,
            "config": dataclasses.asdict(job.config),
            "model": dataclasses.asdict(job.model),
            "parameters": count_params(job.model),
            "trained_parameters": job.adapters or count_params(job.model),
            "flops_per_token": {
                "causal": flops_per_token(job.model, length, causal=True, adapters=job.adapters),
                "full": flops_per_token(job.model, length, causal=False, adapters=job.adapters),
            },
            "tokens_per_step": job.clock.tokens,
            "mesh": dict(job.mesh.shape),
            "devices": f"{job.mesh.size} x {job.mesh.devices.flat[0].device_kind}",
            "versions": {"ctllm-jax": __version__, "jax": jax.__version__, "flax": flax.__version__},
        },
    )
    shutil.copytree(job.store.tokenizer_folder, job.stage.folder / "tokenizer", dirs_exist_ok=True)
