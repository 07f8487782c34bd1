"""`ctllm convert`: a run directory to a Hugging Face folder, and back. The result is {workdir}/model."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from ctllm_jax.checkpoint import save_params
from ctllm_jax.common.files import atomic_dir, write_json
from ctllm_jax.common.manifest import fingerprint, open_stage
from ctllm_jax.hf_export import export
from ctllm_jax.loading import LoadedModel, load_model
from ctllm_jax.model import count_params

TARGETS = ("huggingface", "run")


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """What `ctllm convert` reads."""

    source: str  # run directory or Hugging Face folder
    step: int | None  # [steps] checkpoint of a run; None is the newest
    to: str  # "huggingface" or "run"
    dtype: str  # of the written parameters

    def __post_init__(self):
        if self.to not in TARGETS:
            raise ValueError(f"to {self.to!r} is unknown; there are: {', '.join(TARGETS)}")
        known = ("float32", "bfloat16", "float16") if self.to == "huggingface" else ("float32", "bfloat16")
        if self.dtype not in known:
            raise ValueError(f"dtype {self.dtype!r} is unknown; to {self.to} there are: {', '.join(known)}")


def run(config: ConvertConfig, workdir: str) -> dict:
    """Converts, whole or not at all.

    Raises:
      UserError: the source cannot be read, or what was written does not give the source's logits.
    """
    model = load_model(config.source, config.step)
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
        "model": str(folder),
        "source": model.name,
        "digest": model.digest,
        "parameters": count_params(model.config),
        "dtype": config.dtype,
        "check": check,
    }
    print(f"convert: {model.name} -> {folder} ({config.to}, {config.dtype})")
    return stage.finish(result)


def write_run(model: LoadedModel, folder: pathlib.Path, dtype: str) -> None:
    """A run directory with parameters alone, as step 0: to evaluate, or to start training from."""
    config = dataclasses.replace(model.config, param_dtype=dtype)
    with atomic_dir(folder) as temporary:
        run = {"model": dataclasses.asdict(config), "fingerprint": fingerprint([model.digest, dtype])}
        write_json(temporary / "run.json", {**run, "converted_from": model.name})
        (temporary / "tokenizer").mkdir()
        model.tokenizer.copy_to(temporary / "tokenizer")
        save_params(temporary, jax.tree.map(lambda x: jnp.asarray(x, dtype), model.params), 0)
