"""A model ready for use: from a run directory of ours or from a Hugging Face folder, told apart by what they
hold."""

import dataclasses
from collections.abc import Iterable, Sequence

from ctllm_jax import hf
from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import identity, is_remote, read_json
from ctllm_jax.common.manifest import fingerprint
from ctllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from ctllm_jax.lora import NO_LORA, LoraConfig, merged, trained
from ctllm_jax.mirror import fetched
from ctllm_jax.model import ModelConfig, abstract_params
from ctllm_jax.restore import load_params


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Architecture, parameters and tokenizer.

    Attributes:
      digest: names the weights: equal digests, equal parameters and tokenizer.
      name: for people; the folder's name, with the step where there is one.
      step: of the run's checkpoint; None of a Hugging Face folder.
      tokens: that the run had gone through by then, padding included; None where nothing tells.
    """

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer
    digest: str
    name: str
    step: int | None = None
    tokens: int | None = None


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
    folder = fetched(location)
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is unknown; there are: float32, bfloat16")
    if (folder / "run.json").exists():
        about = read_json(folder / "run.json")
        config = build(ModelConfig, about["model"], f"{folder}/run.json: model")
        tokenizer = load_tokenizer(folder / "tokenizer")
        lora = build(LoraConfig, about["config"]["lora"]) if "lora" in about.get("config", {}) else NO_LORA
        params, step, digest = load_params(folder, trained(abstract_params(config, lora.ranks)), step)
        if lora.rank:
            params = merged(lora, params, load_params(folder / "base", abstract_params(config))[0])
        name = f"{folder.resolve().name}@{step}"
        tokens = step * about["tokens_per_step"] if "tokens_per_step" in about else None
    elif (folder / "config.json").exists():
        if step is not None:
            raise UserError(f"{folder} is a Hugging Face folder; it has no step {step} (leave step unset)")
        config, params, tokenizer = hf.load(folder)
        tokens = None
        parts = [identity(file) for file in (folder / "config.json", *hf.weight_files(folder))]
        digest = fingerprint([parts, tokenizer.digest])
        name = folder.resolve().name
    elif is_remote(location):
        raise UserError(f"{location}: no run directory (run.json); Hugging Face folders are read from a disk")
    else:
        raise UserError(f"{location}: neither a run directory (run.json) nor a Hugging Face folder (config.json)")
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    return LoadedModel(config, params, tokenizer, digest, name, step, tokens)


def check_ids(model: LoadedModel, sequences: Iterable[Sequence[int]]) -> None:
    """UserError if an id has no row in the embedding (look-ups would silently take another row's)."""
    for ids in sequences:
        worst = max(ids, default=0)
        if worst >= model.config.vocab_size:
            raise UserError(f"{model.name}: id {worst} is outside the model's vocabulary of {model.config.vocab_size}")
