"""Reading Hugging Face `LlamaForCausalLM` folders, and the names that writing them (`hf_export`) shares.

One table (`TABLE`) pairs our parameter paths with Hugging Face names. Their matrices are [out, in], ours
[in, out] with heads split, so every matrix is transposed; rotary halves are paired alike on both sides, so
nothing is permuted.

Sources: transformers' LlamaConfig and LlamaForCausalLM (4.x: `rope_theta`, `torch_dtype`; 5.x:
`rope_parameters.rope_theta`, `dtype`); the safetensors format.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json
from ctllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from ctllm_jax.model import ModelConfig, abstract_params
from ctllm_jax.rotary import KINDS, RopeScaling

# Our path -> (Hugging Face name, whether it is a matrix to transpose); {} is the layer.
TABLE = {
    "embed": ("model.embed_tokens.weight", False),
    "layers/attention_norm": ("model.layers.{}.input_layernorm.weight", False),
    "layers/q": ("model.layers.{}.self_attn.q_proj.weight", True),
    "layers/k": ("model.layers.{}.self_attn.k_proj.weight", True),
    "layers/v": ("model.layers.{}.self_attn.v_proj.weight", True),
    "layers/out": ("model.layers.{}.self_attn.o_proj.weight", True),
    "layers/mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", False),
    "layers/gate": ("model.layers.{}.mlp.gate_proj.weight", True),
    "layers/up": ("model.layers.{}.mlp.up_proj.weight", True),
    "layers/down": ("model.layers.{}.mlp.down_proj.weight", True),
    "final_norm": ("model.norm.weight", False),
    "head": ("lm_head.weight", True),
}
# Our names of what only the llama3 scaling has -> theirs.
LLAMA3_KEYS = {
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_STORED = ("F32", "F16", "BF16")  # safetensors' names of the same


def read_config(folder: pathlib.Path) -> ModelConfig:
    """The architecture that config.json states, in either style; rows of the embedding count as vocabulary.

    Raises:
      UserError: a key whose value this model cannot follow, named.
    """
    file = folder / "config.json"
    values = read_json(file)
    _check_supported(file, values)

    def need(key: str) -> Any:
        if key not in values:
            raise UserError(f"{file}: key {key!r} is missing")
        return values[key]

    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    heads = need("num_attention_heads")
    try:
        return ModelConfig(
            num_layers=need("num_hidden_layers"),
            d_model=need("hidden_size"),
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or need("hidden_size") // heads,
            d_ff=need("intermediate_size"),
            vocab_size=need("vocab_size"),
            padded_vocab_size=need("vocab_size"),
            max_length=values.get("max_position_embeddings", 2048),
            norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
            rope_scaling=_rope_scaling(rope),
            tie_embeddings=values.get("tie_word_embeddings", False),
            qk_norm=False,
            init_std=values.get("initializer_range", 0.02),
            dtype="float32" if _stored_dtype(values) == "float32" else "bfloat16",
            param_dtype="float32",  # holds every stored dtype exactly, and is what training goes on from
            remat="none",
            attention="xla",
        )
    except KeyError as error:
        raise UserError(f"{file}: the rope scaling lacks {error}") from None
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def _check_supported(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    def refuse(key: str, value: Any, wanted: str):
        raise UserError(f"{file}: {key} is {value!r}; only {wanted} can be read")

    if values.get("architectures") != ["LlamaForCausalLM"]:
        refuse("architectures", values.get("architectures"), "['LlamaForCausalLM']")
    for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if values.get(key, plain) != plain:
            refuse(key, values[key], repr(plain))
    if values.get("quantization_config"):
        refuse("quantization_config", values["quantization_config"], "unquantised weights")
    for key in ("rope_scaling", "rope_parameters"):
        kind = _rope_kind(values.get(key) or {})
        if kind not in ("default", *KINDS):
            refuse(f"{key}.rope_type", kind, ", ".join(("default", *KINDS)))
    if _stored_dtype(values) not in DTYPES:
        refuse("dtype", _stored_dtype(values), " or ".join(DTYPES))


def _stored_dtype(values: Mapping[str, Any]) -> str:
    return values.get("dtype", values.get("torch_dtype")) or "float32"


def _rope_kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = _rope_kind(rope)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    return RopeScaling(kind, float(rope["factor"]), **{ours: rope[theirs] for ours, theirs in LLAMA3_KEYS.items()})


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a folder; UserError if there are none or one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(read_json(index)["weight_map"].values())
        if outside := sorted(name for name in names if pathlib.PurePath(name).name != name):
            raise UserError(f"{index}: {outside[0]!r} is not a file of this folder")
        files = sorted(folder / name for name in names)
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.exists():
            pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
            hint = f"; {pickles[0]} is a pickle, which is not read: save it as safetensors" if pickles else ""
            raise UserError(f"{file}: no such file{hint}")
    return files


def describe(folder: pathlib.Path) -> tuple[ModelConfig, Tokenizer]:
    """(architecture, tokenizer) of a Hugging Face folder.

    All rows of the embedding are kept; ids that the tokenizer does not know are masked as padding.

    Raises:
      UserError: something in it cannot be read or followed; the message names it.
    """
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    if tokenizer.vocab_size < config.padded_vocab_size:
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    return config, tokenizer


def load_params(folder: pathlib.Path, config: ModelConfig, abstract: dict) -> dict:
    """The parameters of a Hugging Face folder.

    Args:
      config: its architecture, as `describe` gives it.
      abstract: tree of ShapeDtypeStructs with shardings, to read into; where these reach over several processes, each
        reads the files.

    Raises:
      UserError: something in it cannot be read, is missing, left over, or of the wrong shape; the message
        names it.
    """
    with contextlib.ExitStack() as stack:
        tensors = {}
        for file in weight_files(folder):
            try:
                opened = stack.enter_context(safe_open(file, "np"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file ({error})") from None
            tensors.update(dict.fromkeys(opened.keys(), opened))
        return _read_params(folder, config, tensors, dict(_flat(abstract)))


def _read_params(folder: pathlib.Path, config: ModelConfig, tensors: dict[str, Any], wanted: dict[str, Any]) -> dict:
    known = {name for names in names_by_path(config).values() for name in names}
    # Old checkpoints carry the rotary frequencies, which follow from the config.
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings and "lm_head.weight" in tensors:
        ignored.add("lm_head.weight")
        both = [tensors[name].get_tensor(name) for name in ("lm_head.weight", "model.embed_tokens.weight")]
        if not np.array_equal(*both):
            raise UserError(f"{folder}: tie_word_embeddings is true, yet lm_head.weight differs from the embedding")
    if missing := sorted(known - set(tensors)):
        raise UserError(f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if unknown := sorted(set(tensors) - known - ignored):
        raise UserError(f"{folder}: tensor {unknown[0]!r} is not part of a plain Llama ({len(unknown)} in all)")

    def read(name: str, shape: tuple[int, ...], transpose: bool) -> np.ndarray:
        part = tensors[name].get_slice(name)
        if part.get_dtype() not in _STORED:
            raise UserError(f"{folder}: tensor {name!r} is stored as {part.get_dtype()}; known: {', '.join(_STORED)}")
        array = tensors[name].get_tensor(name)
        expected = their_shape(shape, name, transpose)
        if array.shape != expected:
            raise UserError(f"{folder}: tensor {name!r} is {list(array.shape)}, config.json asks for {list(expected)}")
        return (array.T if transpose else array).reshape(shape)

    flat = {}
    for path, leaf in wanted.items():
        transpose, names = TABLE[path][1], names_by_path(config)[path]
        stacked = path.startswith("layers/")
        shape = leaf.shape[1:] if stacked else leaf.shape
        arrays = [read(name, shape, transpose) for name in names]
        array = (np.stack(arrays) if stacked else arrays[0]).astype(leaf.dtype)
        flat[path] = jax.make_array_from_callback(array.shape, leaf.sharding, array.__getitem__)
    return _nested(flat)


def leaves(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Our parameters by path, {"layers/q": shape and dtype}."""
    return dict(_flat(abstract_params(config)))


def _flat(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _nested(flat: Mapping[str, Any]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = value
    return tree


def names_by_path(config: ModelConfig) -> dict[str, list[str]]:
    """Their names of each of our paths: one per layer, or one."""
    names = {}
    for path in leaves(config):
        template = TABLE[path][0]
        stacked = path.startswith("layers/")
        names[path] = [template.format(layer) for layer in range(config.num_layers)] if stacked else [template]
    return names


def their_shape(shape: tuple[int, ...], name: str, transpose: bool) -> tuple[int, ...]:
    """Shape of their tensor, given ours without the layer axis."""
    if not transpose:
        return shape
    input_axes = 2 if name.endswith("o_proj.weight") else 1  # o_proj reads heads x head size
    return math.prod(shape[input_axes:]), math.prod(shape[:input_axes])
