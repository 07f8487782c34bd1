"""Writing Hugging Face `LlamaForCausalLM` folders: config.json, safetensors, tokenizer, chat template.

What was written is checked before the folder gets its name: see `export`.

Legend: L length, V vocabulary.
"""

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from ctllm_jax import numpy_llama
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import atomic_dir, write_json
from ctllm_jax.data.chat import JINJA, own_template
from ctllm_jax.data.tokenizer import (
    BOS,
    CHAT_PIECES,
    EOS,
    PAD,
    UNK,
    SentencePieceTokenizer,
    Tokenizer,
)
from ctllm_jax.hf import DTYPES, LLAMA3_KEYS, TABLE, leaves, names_by_path, their_shape
from ctllm_jax.loading import find_model
from ctllm_jax.model import ModelConfig, abstract_params, forward

SHARD_BYTES = 5 * 10**9

# What export tolerates. Against the witness the arithmetic alone differs (fp32 here, float64 there):
# absolute, per unit of the largest logit. Against the unrounded model the storage dtype's rounding shows:
# relative, root mean square.
_WITNESS_TOLERANCE = 1e-4
_ROUNDING_TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
_CHECK_LENGTHS = (1, 7, 32)


def export(
    config: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, float]:
    """Writes a Hugging Face folder, whole and checked, or not at all.

    Before it gets its name the folder is read back and run on fixed prompts, against (a) `numpy_llama`, which
    reads the tensors by their Hugging Face names, and (b) the model as it was, unrounded.

    Returns:
      The differences found: {"witness_error": absolute per unit of the largest logit, "rounding_error":
        relative}.

    Raises:
      UserError: the model is no Llama (QK-norm), the dtype is unknown, or the logits disagree; nothing is
        left.
    """
    if config.qk_norm:
        raise UserError("qk_norm is on: a LlamaForCausalLM has no QK-norm, so this model cannot be exported as one")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; there are: {', '.join(DTYPES)}")
    with atomic_dir(folder) as temporary:
        _write_weights(temporary, config, params, dtype, shard_bytes)
        write_json(temporary / "config.json", _their_config(config, tokenizer, dtype))
        stops = [tokenizer.eos_id]
        with contextlib.suppress(UserError):  # a tokenizer without a chat template has one stop
            stops += [i for i in own_template(tokenizer).end_ids if i != tokenizer.eos_id]
        generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if len(stops) > 1 else stops[0]}
        write_json(temporary / "generation_config.json", generation)
        _write_tokenizer(temporary, tokenizer, config.max_length)
        return _check(temporary, config, params, dtype)


def _write_weights(folder: pathlib.Path, config: ModelConfig, params: dict, dtype: str, shard_bytes: int) -> None:
    sizes, item = {path: leaf.size for path, leaf in leaves(config).items()}, np.dtype(DTYPES[dtype]).itemsize
    shards: list[list[tuple[str, str, int | None]]] = [[]]  # (their name, our path, layer)
    room = shard_bytes
    for path, names in names_by_path(config).items():
        stacked = path.startswith("layers/")
        size = sizes[path] * item // (len(names) if stacked else 1)
        for layer, name in enumerate(names):
            if size > room and shards[-1]:
                shards.append([])
                room = shard_bytes
            shards[-1].append((name, path, layer if stacked else None))
            room -= size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: _their_array(params, name, path, layer, dtype) for name, path, layer in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes for the owner alone
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = sum(sizes.values()) * item
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def _their_array(params: dict, name: str, path: str, layer: int | None, dtype: str) -> np.ndarray:
    array = params
    for key in path.split("/"):
        array = array[key]
    array = np.asarray(array if layer is None else array[layer])
    if not TABLE[path][1]:
        return np.ascontiguousarray(array.astype(DTYPES[dtype]))
    outputs, inputs = their_shape(array.shape, name, True)
    return np.ascontiguousarray(array.reshape(inputs, outputs).T.astype(DTYPES[dtype]))


def _their_scaling(config: ModelConfig) -> dict:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    more = LLAMA3_KEYS.items() if scaling.kind == "llama3" else ()
    values = {theirs: getattr(scaling, ours) for ours, theirs in more}
    return {"rope_type": scaling.kind, "factor": scaling.factor, **values}


def _their_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict:
    """Both styles at once: readers of either find their keys."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.padded_vocab_size,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _their_scaling(config) or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, **_their_scaling(config)},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "hidden_act": "silu",
        "initializer_range": config.init_std,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer, max_length: int) -> None:
    """A SentencePiece model with its settings, or the tokenizer.json set as it was."""
    tokenizer.copy_to(folder)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return
    found = {piece: tokenizer.piece_id(piece) for piece in (BOS, EOS, PAD, *CHAT_PIECES)}
    pieces = {piece: i for piece, i in found.items() if i is not None}
    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "model_max_length": max_length,
        "legacy": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "unk_token": UNK,
        "bos_token": BOS if BOS in pieces else None,
        "eos_token": EOS,
        "pad_token": PAD if PAD in pieces else None,
        "additional_special_tokens": [piece for piece in CHAT_PIECES if piece in pieces],
        "added_tokens_decoder": {
            str(i): {"content": piece, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
            for piece, i in sorted(pieces.items(), key=lambda entry: entry[1])
        },
    }
    if all(piece in pieces for piece in CHAT_PIECES):
        settings["chat_template"] = JINJA
        (folder / "chat_template.jinja").write_text(JINJA, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings)


def _check(folder: pathlib.Path, config: ModelConfig, params: dict, dtype: str) -> dict[str, float]:
    exact = {"dtype": "float32", "remat": "none", "attention": "xla"}
    original = dataclasses.replace(config, **exact)
    written = find_model(str(folder))
    stored = dataclasses.replace(written.config, **exact)
    stored_params = written.read(None, abstract_params(written.config))
    random = np.random.default_rng(0)
    run = jax.jit(forward, static_argnums=0)
    witness_error = rounding_error = 0.0
    for length in _CHECK_LENGTHS:
        tokens_1L = random.integers(0, config.vocab_size, (1, length), dtype=np.int32)
        inputs = (tokens_1L, np.arange(length, dtype=np.int32)[None], np.ones_like(tokens_1L))
        with jax.default_matmul_precision("highest"):  # accelerators round fp32 products otherwise
            before_LV = np.asarray(run(original, params, *inputs)[0])[0, :, : config.vocab_size]
            after_LV = np.asarray(run(stored, stored_params, *inputs)[0])[0, :, : config.vocab_size]
        witness_LV = numpy_llama.logits(folder, tokens_1L[0].tolist())[:, : config.vocab_size]
        scale = max(1.0, float(np.abs(witness_LV).max()))
        # Written so that a NaN anywhere ends as the larger value, hence as a refusal.
        witness_error = np.maximum(witness_error, np.abs(after_LV - witness_LV).max() / scale)
        size = np.sqrt(np.mean(before_LV.astype(np.float64) ** 2))
        rounding_error = np.maximum(rounding_error, np.sqrt(np.mean((after_LV - before_LV) ** 2)) / max(size, 1e-9))
    found = {"witness_error": float(witness_error), "rounding_error": float(rounding_error)}
    if not (witness_error <= _WITNESS_TOLERANCE and rounding_error <= _ROUNDING_TOLERANCE[dtype]):
        raise UserError(
            f"export refused: the written model does not give the same logits ({found}; tolerated: "
            f"{_WITNESS_TOLERANCE} and {_ROUNDING_TOLERANCE[dtype]} in {dtype}). Nothing was kept."
        )
    return found
