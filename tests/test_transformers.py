"""Exported folders in Hugging Face's transformers: the same logits, ids and greedy texts as ours.

transformers and PyTorch come from an environment of their own, made with the benchmarks' mechanism; where it cannot be
made the tests skip.
"""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import TEXT, tiny_model

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

from common import environment
from evaluate import PEERS

from ctllm_jax.hf_export import export
from ctllm_jax.loading import LoadedModel, load_model
from ctllm_jax.losses import token_logprobs
from ctllm_jax.model import forward
from ctllm_jax.samples import Encoder, sample
from ctllm_jax.sampling import SamplingConfig

pytestmark = pytest.mark.slow

MODELS = {
    "mha": {"num_kv_heads": 4},
    "gqa": {"num_kv_heads": 2},
    "mha_tied": {"num_kv_heads": 4, "tie_embeddings": True},
    "gqa_tied": {"num_kv_heads": 2, "tie_embeddings": True},
}
STYLES = {  # keys of config.json that are taken out
    "both": (),
    "4": ("rope_parameters", "dtype"),
    "5": ("rope_theta", "rope_scaling", "torch_dtype"),
}
CHATS = [
    [{"role": "user", "content": "北京是什么？"}],
    [{"role": "system", "content": "简短"}, {"role": "user", "content": "山"}],
]
PROMPTS = ["从前有座山，山", "The quick", "水在"]
NEW_TOKENS = 40
GREEDY = SamplingConfig(max_tokens=NEW_TOKENS, temperature=0.0, top_k=0, top_p=1.0, seed=0)


def trained(model: LoadedModel) -> LoadedModel:
    """A model that has learned TEXT by heart, so that its greedy texts are texts."""
    rows = [[model.tokenizer.bos_id, *ids, model.tokenizer.eos_id] for ids in model.tokenizer.encode_batch(TEXT)]
    length = max(map(len, rows))
    tokens_BL = jnp.array([row + [0] * (length - len(row)) for row in rows])
    real_BL = jnp.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    positions_BL = jnp.broadcast_to(jnp.arange(length), tokens_BL.shape)

    def loss(params):
        logits_BLV, _ = forward(model.config, params, tokens_BL, positions_BL, real_BL)
        logprobs_BL, _ = token_logprobs(logits_BLV[:, :-1], tokens_BL[:, 1:])
        return -jnp.sum(logprobs_BL * real_BL[:, 1:]) / jnp.sum(real_BL[:, 1:])

    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, moments):
        updates, moments = optimizer.update(jax.grad(loss)(params), moments)
        return optax.apply_updates(params, updates), moments

    params, moments = model.params, optimizer.init(model.params)
    for _ in range(400):
        params, moments = step(params, moments)
    return dataclasses.replace(model, params=params)


def interleaved_rope(tensors: dict) -> None:
    """Pairs neighbours instead of halves in queries and keys, as the layout of Meta's own files does."""
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight"))]:
        outputs, inputs = tensors[name].shape
        heads = tensors[name].reshape(-1, 2, 4, inputs)  # heads of 8
        tensors[name] = np.ascontiguousarray(heads.swapaxes(1, 2).reshape(outputs, inputs))


def swapped_gate(tensors: dict) -> None:
    for name in [name for name in tensors if name.endswith("gate_proj.weight")]:
        other = name.replace("gate", "up")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def missing_head(tensors: dict) -> None:
    del tensors["lm_head.weight"]


DAMAGES = {"interleaved_rope": interleaved_rope, "swapped_gate": swapped_gate, "missing_head": missing_head}


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """({model: it as it is in memory}, {name: a folder that the peer has answered for}, the ids that it scored)."""
    try:
        python = environment("evaluate", PEERS)
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"no environment with transformers can be made here: {error}")
    root = tmp_path_factory.mktemp("exports")
    models, folders = {}, {}
    for name, changes in MODELS.items():
        models[name] = model = trained(tiny_model(rope_theta=50_000.0, **changes))
        export(model.config, model.params, model.tokenizer, root / name, "float32")
        for style, removed in STYLES.items():
            folder = folders[f"{name}-{style}"] = changed_config(root / name, root / f"{name}-{style}", removed)
            assert load_model(str(folder)).config.rope_theta == 50_000.0
    for name, damage in DAMAGES.items():
        folder = folders[name] = root / name
        shutil.copytree(root / "gqa", folder)
        tensors = load_file(folder / "model.safetensors")
        damage(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # The tied model's folder says that it has a head of its own, which is nowhere.
    folder = folders["missing_tied_head"] = changed_config(root / "gqa_tied", root / "missing_tied_head", ())
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": False}))
    ids = np.random.default_rng(0).integers(0, models["mha"].config.vocab_size, 40).tolist()
    request = {
        "folders": list(map(str, folders.values())),
        "ids": ids,
        "prompts": PROMPTS,
        "chats": CHATS,
        "new_tokens": NEW_TOKENS,
    }
    (root / "request.json").write_text(json.dumps(request))
    peer = pathlib.Path(__file__).with_name("transformers_peer.py")
    subprocess.run([python, peer, root / "request.json"], check=True, env={"HF_HUB_OFFLINE": "1"})
    return models, folders, ids


def changed_config(source: pathlib.Path, folder: pathlib.Path, removed: tuple[str, ...]) -> pathlib.Path:
    """A copy of an exported folder whose config.json lacks some keys."""
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text())
    assert not set(removed) - values.keys()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in removed}))
    return folder


def check(model: LoadedModel, folder: pathlib.Path, ids: list[int]) -> None:
    """transformers' logits of a folder are those of the model that it was written from."""
    tokens_1L = jnp.array([ids])
    inputs = (tokens_1L, jnp.arange(len(ids))[None], jnp.ones_like(tokens_1L))
    ours_LV = np.asarray(forward(model.config, model.params, *inputs)[0])[0, :, : model.config.vocab_size]
    theirs_LV = np.load(folder / "peer.npz")["logits"][:, : model.config.vocab_size]
    np.testing.assert_allclose(ours_LV, theirs_LV, rtol=0, atol=1e-5 * np.abs(ours_LV).max())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same(answered, name, style):
    models, folders, ids = answered
    check(models[name], folders[f"{name}-{style}"], ids)


@pytest.mark.parametrize("name", MODELS)
def test_prompts_have_the_same_ids_and_greedy_texts(answered, name):
    models, folders, _ = answered
    prompts = [*PROMPTS, *CHATS]
    encoder = Encoder(models[name], chat=False)
    ours = sample(models[name], prompts, False, GREEDY)
    theirs = json.loads((folders[f"{name}-both"] / "peer.json").read_text())
    assert [encoder.encode(prompt) for prompt in prompts] == [answer["ids"] for answer in theirs]
    assert [answer["text"] for answer in ours] == [answer["text"] for answer in theirs]
    for prompt, answer in zip(PROMPTS, theirs, strict=False):
        assert prompt + answer["text"] in TEXT  # it has learned them, and where they end


@pytest.mark.parametrize("damage", [*DAMAGES, "missing_tied_head"])
def test_a_damaged_export_is_noticed(answered, damage):
    models, folders, ids = answered
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(models["gqa_tied" if "tied" in damage else "gqa"], folders[damage], ids)
