"""`ctllm convert`: a run directory to a Hugging Face folder, and back. The result is {workdir}/model.

All checkpoints of a run become a series as CT-LLM released its own: {workdir}/13.33B/model, {workdir}/26.66B/model ...
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ctllm_jax.checkpoint import save_params
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, atomic_dir, place, read_json, write_json
from ctllm_jax.common.manifest import fingerprint, open_stage
from ctllm_jax.hf_export import export
from ctllm_jax.loading import LoadedModel, load_stored
from ctllm_jax.model import count_params
from ctllm_jax.restore import checkpoint_steps

TARGETS = ("huggingface", "run")
_UNITS = ((10**9, "B"), (10**6, "M"), (10**3, "K"))


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """What `ctllm convert` reads."""

    source: str  # run directory or Hugging Face folder
    step: int | None  # [steps] checkpoint of a run; None is the newest
    to: str  # "huggingface" or "run"
    dtype: str  # of the written parameters
    all_steps: bool  # every checkpoint that a run has kept, in folders named by the tokens it had gone through

    def __post_init__(self):
        if self.all_steps and self.step is not None:
            raise ValueError(f"all_steps and step {self.step} exclude each other")
        if self.to not in TARGETS:
            raise ValueError(f"to {self.to!r} is unknown; there are: {', '.join(TARGETS)}")
        known = ("float32", "bfloat16", "float16") if self.to == "huggingface" else ("float32", "bfloat16")
        if self.dtype not in known:
            raise ValueError(f"dtype {self.dtype!r} is unknown; to {self.to} there are: {', '.join(known)}")


def run(config: ConvertConfig, workdir: str) -> dict:
    """Converts, whole or not at all; of a series each checkpoint for itself, so that later ones can be added.

    Raises:
      UserError: the source cannot be read, or what was written does not give the source's logits.
    """
    if config.all_steps:
        return _series(config, workdir)
    model = load_stored(config.source, config.step)
    settings = {"to": config.to, "dtype": config.dtype}
    stage = open_stage("convert", 1, workdir, settings, {"model": model.digest})
    if stage.done:
        return stage.result
    folder = stage.folder / "model"
    if config.to == "huggingface":
        check = export(model.config, model.params, model.tokenizer, folder, config.dtype)
    else:
        check = None
        write_run(model, folder, config.dtype)
    result = {
        "model": place(folder),
        "source": model.name,
        "digest": model.digest,
        "parameters": count_params(model.config),
        "dtype": config.dtype,
        "check": check,
    }
    print(f"convert: {model.name} -> {place(folder)} ({config.to}, {config.dtype})")
    return stage.finish(result)


def _series(config: ConvertConfig, workdir: str) -> dict:
    """{"models": {name: result of `run`}}, in the order of the steps."""
    steps, about = checkpoint_steps(config.source), read_json(as_path(config.source) / "run.json")
    if "tokens_per_step" not in about:
        raise UserError(
            f"{config.source}: was not trained here, so the tokens of its checkpoints are not known; give step"
        )
    names = series_names([step * about["tokens_per_step"] for step in steps])
    one = {
        name: dataclasses.replace(config, step=step, all_steps=False) for name, step in zip(names, steps, strict=True)
    }
    return {"models": {name: run(own, str(pathlib.Path(workdir) / name)) for name, own in one.items()}}


def series_names(tokens: Sequence[int]) -> list[str]:
    """Checkpoints by their tokens, as CT-LLM's are called: 13.33B, 799.90B; in full where these would not differ."""
    names = [_short(count) for count in tokens]
    return names if len(set(names)) == len(names) else [str(count) for count in tokens]


def _short(count: int) -> str:
    size, unit = next(((size, unit) for size, unit in _UNITS if count >= size), (1, ""))
    return f"{count / size:.2f}{unit}" if unit else str(count)


def write_run(model: LoadedModel, folder: pathlib.Path, dtype: str) -> None:
    """A run directory with parameters alone, as step 0: to evaluate, or to start training from."""
    config = dataclasses.replace(model.config, param_dtype=dtype)
    with atomic_dir(folder) as temporary:
        run = {"model": dataclasses.asdict(config), "fingerprint": fingerprint([model.digest, dtype])}
        write_json(temporary / "run.json", {**run, "converted_from": model.name})
        (temporary / "tokenizer").mkdir()
        model.tokenizer.copy_to(temporary / "tokenizer")
        save_params(temporary, jax.tree.map(lambda x: jnp.asarray(x, dtype), model.params), 0)
