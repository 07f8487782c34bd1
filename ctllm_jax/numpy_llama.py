"""A Llama in plain numpy, float64, straight from the tensors of a Hugging Face folder: the witness for conversions.

It shares no code with `ctllm_jax.model`, nor the table of names with `ctllm_jax.hf`, so that an error in either shows.

Legend: L length, D model width, N query heads, K key/value heads, H head size, V vocabulary.
"""

import json
import pathlib

import numpy as np
from safetensors import safe_open


def logits(folder: pathlib.Path, tokens_L: list[int]) -> np.ndarray:
    """Logits [L, V] of one document under the checkpoint in `folder` (safetensors, single or sharded)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    where = _tensor_files(folder)

    def tensor(name: str) -> np.ndarray:
        with safe_open(where[name], "np") as tensors:
            return tensors.get_tensor(name).astype(np.float64)

    heads, width = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.get("num_key_value_heads", heads)
    size = config.get("head_dim") or width // heads
    rope = config.get("rope_parameters") or config
    frequency = _scaled(rope.get("rope_theta", 10000.0) ** (-np.arange(0, size, 2) / size), rope)
    eps, L = config["rms_norm_eps"], len(tokens_L)

    def norm(x_LD, name):
        return x_LD / np.sqrt((x_LD**2).mean(-1, keepdims=True) + eps) * tensor(name)

    angle_LH = np.arange(L)[:, None] * frequency
    angle_LH = np.concatenate([angle_LH, angle_LH], axis=1)

    def rotate(x_NLH):
        swapped = np.concatenate([-x_NLH[..., size // 2 :], x_NLH[..., : size // 2]], axis=-1)
        return x_NLH * np.cos(angle_LH) + swapped * np.sin(angle_LH)

    def split(y_LD, name, count):
        return (y_LD @ tensor(name).T).reshape(L, count, size).transpose(1, 0, 2)

    hidden_LD = tensor("model.embed_tokens.weight")[tokens_L]
    future_LL = np.triu(np.full((L, L), -np.inf), 1)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        y_LD = norm(hidden_LD, prefix + "input_layernorm.weight")
        q = rotate(split(y_LD, prefix + "self_attn.q_proj.weight", heads))
        k = rotate(split(y_LD, prefix + "self_attn.k_proj.weight", kv_heads)).repeat(heads // kv_heads, 0)
        v = split(y_LD, prefix + "self_attn.v_proj.weight", kv_heads).repeat(heads // kv_heads, 0)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(size) + future_LL
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        mixed = mixed.transpose(1, 0, 2).reshape(L, heads * size)
        hidden_LD = hidden_LD + mixed @ tensor(prefix + "self_attn.o_proj.weight").T
        y_LD = norm(hidden_LD, prefix + "post_attention_layernorm.weight")
        gate = y_LD @ tensor(prefix + "mlp.gate_proj.weight").T
        up = y_LD @ tensor(prefix + "mlp.up_proj.weight").T
        hidden_LD = hidden_LD + (gate / (1 + np.exp(-gate)) * up) @ tensor(prefix + "mlp.down_proj.weight").T
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    return norm(hidden_LD, "model.norm.weight") @ tensor(head).T


def _tensor_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """{name of a tensor: the file that has it}."""
    files = [folder / "model.safetensors"]
    if not files[0].exists():
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        files = sorted({folder / name for name in index["weight_map"].values()})
    where = {}
    for file in files:
        with safe_open(file, "np") as tensors:
            where.update(dict.fromkeys(tensors.keys(), file))
    return where


def _scaled(frequency: np.ndarray, rope: dict) -> np.ndarray:
    """Frequencies as `rope_type` lowers them; by wavelength, as Llama 3.1's authors state it."""
    if rope.get("rope_type", "default") == "default":
        return frequency
    lowered = frequency / rope["factor"]
    if rope["rope_type"] == "linear":
        return lowered
    wavelength, original = 2 * np.pi / frequency, rope["original_max_position_embeddings"]
    long, short = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
    share = (original / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    blended = (1 - share) * lowered + share * frequency
    return np.where(wavelength > long, lowered, np.where(wavelength < short, frequency, blended))
