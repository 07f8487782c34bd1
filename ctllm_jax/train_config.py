"""What decides a training run, what may change while it runs, and what does not go together."""

import dataclasses

from jax.sharding import Mesh

from ctllm_jax.checkpoint import CheckpointConfig
from ctllm_jax.common.errors import UserError
from ctllm_jax.data.batches import DataConfig
from ctllm_jax.data.store import TokenStore
from ctllm_jax.duration import Clock, parse
from ctllm_jax.evaluate.in_loop import InLoopConfig
from ctllm_jax.loading import FoundModel
from ctllm_jax.lora import LoraConfig
from ctllm_jax.metrics import LogConfig
from ctllm_jax.model import ModelConfig
from ctllm_jax.objectives import STORE_KINDS, ObjectiveConfig
from ctllm_jax.optim import OptimizerConfig
from ctllm_jax.sharding import RULES, MeshConfig, devices_over
from ctllm_jax.watch import WatchConfig

# Settings that do not decide the result, so that a run may go on with others.
_FREE = ("mesh", "distributed", "microbatches", "log", "eval", "checkpoints", "watch", "deterministic", "xla_options")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run."""

    objective: ObjectiveConfig  # what is minimised
    model: ModelConfig | None  # None: as in init_from
    init_from: str | None  # run or Hugging Face folder whose parameters start the run (and are DPO's reference)
    init_step: int | None  # [steps] checkpoint of the run init_from; None is the newest
    lora: LoraConfig  # adapters, where they alone are trained
    data: DataConfig  # what is read
    optimizer: OptimizerConfig  # AdamW and its schedule
    mesh: MeshConfig  # how the devices are laid out
    distributed: bool  # this process is one of a job of several (see ctllm_jax.processes)
    batch_size: int  # [rows] sequences (pairs for DPO) of a step, over all devices
    microbatches: int  # [parts] that a step's batch is gone through in
    duration: str  # such as "1254.68e9 tokens": see ctllm_jax.duration
    seed: int  # [1] of parameters and of the order of examples
    log: LogConfig  # what is written down
    eval: InLoopConfig  # looks at held-out data
    checkpoints: CheckpointConfig  # what is saved
    watch: WatchConfig  # what is done where nothing moves
    deterministic: bool  # a run that is taken up gives the same bits on a GPU too, at a price (docs/profiles.md)
    xla_options: dict[str, str]  # options of the step's compiler, as XLA names them; a truth value is 'True' or 'False'

    def __post_init__(self):
        parse(self.duration)
        if self.batch_size < 1 or self.microbatches < 1:
            raise ValueError("batch_size and microbatches must be at least 1")
        if self.batch_size % self.microbatches:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.microbatches} microbatches")
        if self.microbatches > 1 and self.objective.preference and self.objective.preference.whole_step:
            loss = self.objective.preference.loss
            raise ValueError(f"preference loss {loss!r} compares the pairs of a step; it needs microbatches 1")
        if (self.model is None) == (self.init_from is None):
            raise ValueError("give either model (a fresh start) or init_from (its architecture is taken over)")
        if self.init_step is not None and self.init_from is None:
            raise ValueError(f"init_step {self.init_step} is a checkpoint of init_from; give both")
        if self.lora.rank and self.init_from is None:
            raise ValueError("lora trains adapters beside a model's parameters, which it needs: give init_from")
        if self.checkpoints.keep_best and self.checkpoints.every % self.eval.every:
            raise ValueError(
                "checkpoints.keep_best compares figures of held-out data, but not every step of checkpoints.every "
                f"{self.checkpoints.every} is evaluated (eval.every {self.eval.every}); make it a multiple"
            )

    @property
    def sides(self) -> int:
        """Sequences of an example: two for preference pairs."""
        return 2 if self.objective.name == "dpo" else 1

    def compiler_options(self, platform: str) -> dict[str, str]:
        """What a step is compiled with. GPUs alone add up in any order, by kernels that are chosen by their time."""
        fixed = {"xla_gpu_deterministic_ops": "True"} if self.deterministic and platform == "gpu" else {}
        return fixed | self.xla_options

    def clock(self, length: int, rows: int | None = None) -> Clock:
        """What the run's durations are measured by, over rows of `length` tokens.

        Args:
          rows: rows (pairs) of one pass over the data; None where they are not known.

        Raises:
          UserError: the run's own duration has no meaning here, or is less than a step.
        """
        has_epochs = rows is not None and not self.data.rates and not self.data.rate_changes
        clock = Clock(self.sides * self.batch_size * length, rows / self.batch_size if has_epochs else None)
        steps = clock.steps(self.duration)
        if steps < 1:
            raise UserError(f"duration {self.duration!r} is less than a step of {self.batch_size} examples")
        return dataclasses.replace(clock, run=steps)


def decisive(config: TrainConfig, model: ModelConfig, clock: Clock) -> dict:
    """The settings that decide the result: where the run's folder must agree. The others may change on resume.

    Durations are told in steps: the same one in other units is no other run.
    """
    settings = dataclasses.asdict(config)
    for name in _FREE:
        settings.pop(name)
    settings.pop("init_from"), settings.pop("init_step")  # by its digest
    settings["objective"].pop("cross_entropy")  # a matter of memory
    settings["data"].pop("store")  # by its fingerprint
    settings["data"].pop("rates"), settings["data"].pop("rate_changes")  # may change ahead: see check_past_rates
    if not config.lora.rank:
        settings.pop("lora")  # without adapters a run is what it was before there were any
    settings["duration"] = clock.run
    for name in ("warmup", "decay"):
        settings["optimizer"][name] = clock.steps(settings["optimizer"][name] or "0 steps")
    if half_life := settings["optimizer"].pop("ema_half_life"):  # without an average a run is what it was before
        settings["optimizer"]["ema_half_life"] = clock.steps(half_life)
    settings["model"] = dataclasses.asdict(model)
    for name in ("remat", "attention"):  # a matter of memory and of the chip
        settings["model"].pop(name)
    return settings


def rates(config: TrainConfig, step: int) -> list[dict]:
    """The rates that the first `step` steps were drawn at."""
    phases = config.data.phases(config.batch_size)
    return [dataclasses.asdict(phase) for phase in phases if phase.start < step * config.batch_size]


def check_past_rates(config: TrainConfig, seen: list[dict], step: int) -> None:
    """Rates may change ahead of a run, never behind it: what it has learned from would be another stream.

    Raises:
      UserError: the first `step` steps, made with rates `seen`, would have other ones.
    """
    if seen != rates(config, step):
        raise UserError(
            f"data.rates or data.rate_changes differ for the steps up to {step}, which this run has made with {seen}; "
            f"give those, and changes from step {step + 1} on as data.rate_changes"
        )


def check_fit(config: TrainConfig, model: ModelConfig, origin: FoundModel | None, store: TokenStore) -> None:
    """Store, model and objective go together, or UserError."""
    if store.kind not in STORE_KINDS[config.objective.name]:
        wanted = " or ".join(STORE_KINDS[config.objective.name])
        raise UserError(f"{store.folder} is a {store.kind} store; objective {config.objective.name} reads {wanted}")
    if config.objective.name == "dpo" and origin is None:
        raise UserError("objective dpo starts from a model, which is its reference too: give init_from")
    _check_sizes(model, origin, store)
    if origin and origin.tokenizer.digest != store.tokenizer.digest:
        raise UserError(
            f"{store.folder} was made with another tokenizer than {config.init_from}; "
            f"build it with `ctllm tokenize --config.tokenizer={origin.tokenizer.file}`"
        )


def _check_sizes(model: ModelConfig, origin: FoundModel | None, store: TokenStore) -> None:
    """The model takes every id and row of the store, or UserError with all that has to be larger."""
    ids, length = store.tokenizer.vocab_size, store.sequence_length
    short, larger = [], {}
    if ids > model.vocab_size:
        short.append(f"its tokenizer has {ids} ids, the model only {model.vocab_size}")
        larger |= {"vocab_size": ids, "padded_vocab_size": max(model.padded_vocab_size, -(-ids // 128) * 128)}
    if length > model.max_length:
        short.append(f"rows of {length} tokens, the model takes {model.max_length}")
        larger["max_length"] = length
    if short:
        flags = " ".join(f"--config.model.{name}={size}" for name, size in larger.items())
        advice = "" if origin else f"; {flags} would do"
        raise UserError(f"{store.folder}: {'; '.join(short)}{advice}")


def check_layout(config: TrainConfig, store: TokenStore, mesh: Mesh) -> None:
    """A microbatch divides over the mesh, or UserError."""
    for what, size, axis in (
        ("batch_size / microbatches =", config.batch_size // config.microbatches, "batch"),
        ("the rows' length", store.sequence_length, "length"),
    ):
        if size % (ways := devices_over(mesh.shape, axis)):
            raise UserError(f"{what} {size} does not divide over {ways} devices (mesh: {' x '.join(RULES[axis])})")
