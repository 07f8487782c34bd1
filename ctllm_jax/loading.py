"""A model ready for use: from a run directory of ours or from a Hugging Face folder, told apart by what they
hold."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from ctllm_jax import hf
from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import file_digest, is_remote, read_json
from ctllm_jax.common.manifest import fingerprint
from ctllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from ctllm_jax.lora import NO_ADAPTERS, NO_LORA, LoraConfig, merged, trained
from ctllm_jax.mirror import fetched
from ctllm_jax.model import ModelConfig, abstract_params, logical_axes
from ctllm_jax.restore import find_step, load_params
from ctllm_jax.sharding import shardings


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """A model but for its parameters.

    Attributes:
      digest: names what is loaded: equal digests, equal parameters, tokenizer and chat template.
      name: for people; the folder's name, with the step where there is one.
      step: of the run's checkpoint; None of a Hugging Face folder.
      tokens: that the run had gone through by then, padding included; None where nothing tells.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    digest: str
    name: str
    step: int | None = None
    tokens: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundModel(About):
    """A model whose parameters can be read.

    Attributes:
      read: gives the parameters, with adapters merged into them: laid out over a mesh as `sharding.RULES` say (all its
        processes must read), or for None on one device of this process.
    """

    read: Callable[[Mesh | None], dict]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel(About):
    """A model with its parameters on one device."""

    params: dict


def load_model(location: str, step: int | None = None, dtype: str | None = None) -> LoadedModel:
    """Loads a model.

    Args:
      location: a run directory (holds run.json; may be on gs://) or a Hugging Face folder (holds config.json).
        Adapters of a run are merged into the parameters. Of a run that keeps an average of its parameters it is that.
      step: which checkpoint of a run; None takes the newest. A Hugging Face folder has none.
      dtype: overrides the compute dtype, "float32" or "bfloat16".

    Raises:
      UserError: the location is neither, or something in it is missing or unreadable.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is unknown; there are: float32, bfloat16")
    found = find_model(location, step)
    about = {field.name: getattr(found, field.name) for field in dataclasses.fields(About)}
    if dtype is not None:
        about["config"] = dataclasses.replace(found.config, dtype=dtype)
    return LoadedModel(**about, params=found.read(None))


def find_model(location: str, step: int | None = None) -> FoundModel:
    """Finds a model without reading its parameters; arguments and errors as of `load_model`."""
    folder = fetched(location)
    if (folder / "run.json").exists():
        return _find_run(folder, step)
    if (folder / "config.json").exists():
        if step is not None:
            raise UserError(f"{folder} is a Hugging Face folder; it has no step {step} (leave step unset)")
        return _find_huggingface(folder)
    if is_remote(location):
        raise UserError(f"{location}: no run directory (run.json); Hugging Face folders are read from a disk")
    raise UserError(f"{location}: neither a run directory (run.json) nor a Hugging Face folder (config.json)")


def _find_run(folder: pathlib.Path, step: int | None) -> FoundModel:
    about, step = read_json(folder / "run.json"), find_step(folder, step)
    config = build(ModelConfig, about["model"], f"{folder}/run.json: model")
    lora = build(LoraConfig, about["config"]["lora"]) if "lora" in about.get("config", {}) else NO_LORA
    tokenizer = load_tokenizer(folder / "tokenizer")
    return FoundModel(
        config=config,
        tokenizer=tokenizer,
        read=functools.partial(_read_run, folder, config, lora, step),
        digest=_digest(f"{about['fingerprint']}@{step}", tokenizer),
        name=f"{folder.resolve().name}@{step}",
        step=step,
        tokens=step * about["tokens_per_step"] if "tokens_per_step" in about else None,
    )


def _find_huggingface(folder: pathlib.Path) -> FoundModel:
    config, tokenizer = hf.describe(folder)
    weights = [file_digest(file) for file in (folder / "config.json", *hf.weight_files(folder))]
    return FoundModel(
        config=config,
        tokenizer=tokenizer,
        read=functools.partial(_read_huggingface, folder, config),
        digest=_digest(weights, tokenizer),
        name=folder.resolve().name,
    )


def _digest(weights: str | list[str], tokenizer: Tokenizer) -> str:
    return fingerprint([weights, {file.name: file_digest(file) for file in tokenizer.files}])


def _read_run(folder: pathlib.Path, config: ModelConfig, lora: LoraConfig, step: int, mesh: Mesh | None) -> dict:
    params = load_params(folder, trained(_wanted(config, mesh, lora.ranks)), step)
    if not lora.rank:
        return params
    wanted = _wanted(config, mesh)
    whole = merged(lora, params, load_params(folder / "base", wanted, 0))
    return jax.tree.map(lambda matrix, leaf: jax.device_put(matrix, leaf.sharding), whole, wanted)


def _read_huggingface(folder: pathlib.Path, config: ModelConfig, mesh: Mesh | None) -> dict:
    return hf.load_params(folder, config, jax.tree.map(lambda leaf: leaf.sharding, _wanted(config, mesh)))


def _wanted(config: ModelConfig, mesh: Mesh | None, ranks: Mapping[str, int] = NO_ADAPTERS) -> dict:
    """Shapes and shardings of what is to be read."""
    params = abstract_params(config, ranks)
    if mesh is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), params)
    else:
        places = shardings(mesh, params, logical_axes(config, ranks))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params, places
    )


def check_ids(model: LoadedModel, sequences: Iterable[Sequence[int]]) -> None:
    """UserError if an id has no row in the embedding (look-ups would silently take another row's)."""
    for ids in sequences:
        worst = max(ids, default=0)
        if worst >= model.config.vocab_size:
            raise UserError(f"{model.name}: id {worst} is outside the model's vocabulary of {model.config.vocab_size}")
