"""A model ready for use: from a run directory of ours or a Hugging Face folder, told apart by what they hold."""

import contextlib
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
from ctllm_jax.mirror import fetched, is_there
from ctllm_jax.model import ModelConfig, abstract_params, as_read, logical_axes
from ctllm_jax.restore import find_step, load_params
from ctllm_jax.sharding import MeshConfig, make_mesh, shardings
from ctllm_jax.stage_mirror import copied


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
        processes must read), or for None on one device of this process; in the dtypes of the given tree, which is
        `model.abstract_params` or `model.as_read`.
    """

    read: Callable[[Mesh | None, dict], dict]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel(About):
    """A model with its parameters.

    Attributes:
      mesh: the devices over which the parameters are split; None where they are on one.
    """

    params: dict
    mesh: Mesh | None = None

    def in_use(self) -> contextlib.AbstractContextManager:
        """Programs that read the parameters run inside this."""
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()


def load_model(location: str, step: int | None = None, dtype: str | None = None, tensor: int = 1) -> LoadedModel:
    """Loads a model to compute with, its parameters held as `model.as_read` says.

    Args:
      location: a run directory (holds run.json) or a Hugging Face folder (holds config.json), both also on gs://.
        Adapters of a run are merged into the parameters. Of a run that keeps an average of its parameters it is that.
      step: which checkpoint of a run; None takes the newest. A Hugging Face folder has none.
      dtype: overrides the compute dtype, "float32" or "bfloat16".
      tensor: devices of this process over which heads and widths are split.

    Raises:
      UserError: the location is neither, or something in it is missing or unreadable; there are fewer devices, or
        heads or widths do not divide over them.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is unknown; there are: float32, bfloat16")
    found, mesh = find_model(location, step), _tensor_mesh(tensor)
    config = found.config if dtype is None else dataclasses.replace(found.config, dtype=dtype)
    return _loaded(found, config, as_read(config), mesh)


def load_stored(location: str, step: int | None = None) -> LoadedModel:
    """Loads a model to write it elsewhere: its parameters are as they are stored. Otherwise as `load_model`."""
    found = find_model(location, step)
    return _loaded(found, found.config, abstract_params(found.config), None)


def _loaded(found: FoundModel, config: ModelConfig, params: dict, mesh: Mesh | None) -> LoadedModel:
    about = {field.name: getattr(found, field.name) for field in dataclasses.fields(About)}
    return LoadedModel(**{**about, "config": config}, params=found.read(mesh, params), mesh=mesh)


def _tensor_mesh(tensor: int) -> Mesh | None:
    devices = jax.local_devices()
    if not 1 <= tensor <= len(devices):
        raise UserError(f"tensor {tensor}: a model can be split over 1 to {len(devices)} devices here")
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor, context=1), devices[:tensor]) if tensor > 1 else None


def find_model(location: str, step: int | None = None) -> FoundModel:
    """Finds a model without reading its parameters; arguments and errors as of `load_model`."""
    folder = fetched(location)
    if (folder / "run.json").exists():
        return _find_run(folder, step)
    if is_remote(location) and is_there(location, "config.json"):
        folder = pathlib.Path(copied(location))
    if (folder / "config.json").exists():
        if step is not None:
            raise UserError(f"{location} is a Hugging Face folder; it has no step {step} (leave step unset)")
        return _find_huggingface(folder)
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


def _read_run(
    folder: pathlib.Path, config: ModelConfig, lora: LoraConfig, step: int, mesh: Mesh | None, params: dict
) -> dict:
    wanted = _placed(params, config, mesh)
    if not lora.rank:
        return load_params(folder, wanted, step)
    base = load_params(folder / "base", _placed(abstract_params(config), config, mesh), 0)
    adapters = trained(_placed(abstract_params(config, lora.ranks), config, mesh, lora.ranks))
    whole = merged(lora, load_params(folder, adapters, step), base)
    return jax.tree.map(lambda matrix, leaf: jax.device_put(matrix.astype(leaf.dtype), leaf.sharding), whole, wanted)


def _read_huggingface(folder: pathlib.Path, config: ModelConfig, mesh: Mesh | None, params: dict) -> dict:
    return hf.load_params(folder, config, _placed(params, config, mesh))


def _placed(params: dict, config: ModelConfig, mesh: Mesh | None, ranks: Mapping[str, int] = NO_ADAPTERS) -> dict:
    """Abstract parameters with the shardings that they are to be read into."""
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
