"""Hugging Face folders: what is read, what is refused, and that nothing wrong is written."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import NO_REFERENCE, REFERENCE, TEXT, tiny_model

from ctllm_jax import convert, hf, hf_export, numpy_llama
from ctllm_jax.common.errors import UserError
from ctllm_jax.convert import ConvertConfig
from ctllm_jax.data.tokenizer import CHAT_PIECES, load_tokenizer
from ctllm_jax.loading import load_model, load_stored
from ctllm_jax.model import forward
from ctllm_jax.rotary import RopeScaling

needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)


def export(model, folder, dtype="float32", **options):
    return hf_export.export(model.config, model.params, model.tokenizer, folder, dtype, **options)


def edit(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 4}, {"tie_embeddings": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_exported_is_read_back_rounded_to_the_dtype(tmp_path, changes, dtype):
    model = tiny_model(**changes)
    check = export(model, tmp_path / "out", dtype)
    assert check["witness_error"] < 1e-5
    loaded = load_stored(str(tmp_path / "out"))
    stored = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_array_equal(np.asarray(ours).astype(stored).astype(np.float32), theirs),
        model.params,
        loaded.params,
    )
    same = dataclasses.replace(loaded.config, dtype="float32", init_std=model.config.init_std)
    assert same == model.config


def test_shards_hold_what_a_single_file_holds(tmp_path):
    model = tiny_model()
    export(model, tmp_path / "one")
    export(model, tmp_path / "many", shard_bytes=40_000)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 3 and all(shard.stat().st_size < 60_000 for shard in shards)
    merged = {name: array for shard in shards for name, array in load_file(shard).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert sorted(merged) == sorted(whole)
    for name in whole:
        np.testing.assert_array_equal(merged[name], whole[name])
    one, many = load_stored(str(tmp_path / "one")), load_stored(str(tmp_path / "many"))
    jax.tree.map(np.testing.assert_array_equal, one.params, many.params)


def test_both_styles_of_config_read_alike(tmp_path):
    export(tiny_model(rope_theta=5e5), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    both = hf.read_config(tmp_path / "out")
    edit(file, lambda v: [v.pop(key) for key in ("rope_parameters", "dtype")])
    assert hf.read_config(tmp_path / "out") == both
    assert both.rope_theta == 5e5
    edit(file, lambda v: v.update(rope_parameters={"rope_theta": v.pop("rope_theta"), "rope_type": "default"}))
    edit(file, lambda v: v.update(dtype=v.pop("torch_dtype")))
    assert hf.read_config(tmp_path / "out") == both


@pytest.mark.parametrize(
    "scaling",
    [RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0, low_frequency_factor=1.0, original_length=16)],
    ids=["linear", "llama3"],
)
def test_rope_scaling_goes_there_and_back(tmp_path, scaling):
    """The export is checked with the witness, which scales by code of its own."""
    export(tiny_model(rope_scaling=scaling), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    both = hf.read_config(tmp_path / "out")
    assert both.rope_scaling == scaling
    edit(file, lambda v: v.pop("rope_parameters"))  # transformers 4.x
    assert hf.read_config(tmp_path / "out") == both
    edit(file, lambda v: v["rope_scaling"].update(type=v["rope_scaling"].pop("rope_type")))  # older still
    assert hf.read_config(tmp_path / "out") == both
    edit(file, lambda v: v["rope_scaling"].pop("factor"))
    with pytest.raises(UserError, match="the rope scaling lacks 'factor'"):
        hf.read_config(tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0}),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("architectures", ["MistralForCausalLM"]),
        ("quantization_config", {"bits": 4}),
        ("dtype", "float8_e4m3fn"),
    ],
)
def test_what_the_model_cannot_follow_is_refused_by_name(tmp_path, key, value):
    export(tiny_model(), tmp_path / "out")
    edit(tmp_path / "out" / "config.json", lambda v: v.update({key: value}))
    with pytest.raises(UserError, match=key):
        load_model(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight' is missing"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}),
            "q_proj.bias",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(31, np.float32)}),
            "'model.norm.weight' is \\[31\\]",
        ),
        (lambda t: t.update({"model.norm.weight": np.zeros(32, np.int8)}), "stored as I8"),
    ],
)
def test_tensors_missing_left_over_or_misshapen_are_refused_by_name(tmp_path, change, message):
    export(tiny_model(), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / "out"))


def test_a_tied_model_with_another_head_is_refused_and_with_the_same_head_read(tmp_path):
    export(tiny_model(tie_embeddings=True), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
    load_model(str(tmp_path / "out"))
    save_file({**tensors, "lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}, file)
    with pytest.raises(UserError, match="lm_head.weight differs"):
        load_model(str(tmp_path / "out"))


def test_pickles_and_broken_files_are_refused(tmp_path):
    export(tiny_model(), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_model(str(tmp_path / "out"))
    file.unlink()
    (tmp_path / "out" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle"):
        load_model(str(tmp_path / "out"))


def test_a_digest_names_all_weights_and_what_lies_beside_the_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr("ctllm_jax.common.files._EDGE", 1024)  # the tiny model is all edges otherwise
    folder = tmp_path / "out"
    export(tiny_model(), folder)
    found = [load_model(str(folder)).digest]
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # of one size, and alike at either end
    file.write_bytes(content)
    found.append(load_model(str(folder)).digest)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    found.append(load_model(str(folder)).digest)
    edit(folder / "tokenizer_config.json", lambda values: values.update(pad_token="</s>"))
    found.append(load_model(str(folder)).digest)
    assert len(set(found)) == 4


def test_rows_beyond_the_tokenizer_are_kept_and_masked(tmp_path):
    model = tiny_model()
    export(model, tmp_path / "out")
    loaded = load_model(str(tmp_path / "out"))
    assert loaded.config.padded_vocab_size == 384
    assert loaded.config.vocab_size == model.tokenizer.vocab_size < 384
    assert loaded.params["embed"].shape == (384, 32)


def test_a_model_with_qk_norm_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="qk_norm"):
        export(tiny_model(qk_norm=True), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_refuses_and_leaves_nothing_if_a_matrix_is_not_transposed(tmp_path, monkeypatch):
    right = hf_export._their_array

    def wrong(params, name, *rest):
        array = right(params, name, *rest)
        return np.ascontiguousarray(array.T) if name.endswith("layers.1.self_attn.q_proj.weight") else array

    monkeypatch.setattr(hf_export, "_their_array", wrong)
    with pytest.raises(UserError, match="export refused"):
        export(tiny_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_refuses_if_names_are_exchanged_in_writing_and_reading_alike(tmp_path, monkeypatch):
    gate, up = hf.TABLE["layers/gate"], hf.TABLE["layers/up"]
    monkeypatch.setitem(hf.TABLE, "layers/gate", up)
    monkeypatch.setitem(hf.TABLE, "layers/up", gate)
    with pytest.raises(UserError, match="export refused"):
        export(tiny_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_refuses_weights_that_overflow_the_dtype(tmp_path):
    model = tiny_model()
    params = {**model.params, "final_norm": model.params["final_norm"] * 1e6}
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(UserError, match="export refused"):
        hf_export.export(model.config, params, model.tokenizer, tmp_path / "out", "float16")
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_travels_with_its_markers_and_template(tmp_path):
    model = tiny_model()
    export(model, tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert again.encode_batch(TEXT) == model.tokenizer.encode_batch(TEXT)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["additional_special_tokens"] == list(CHAT_PIECES)
    assert settings["added_tokens_decoder"][str(model.tokenizer.piece_id("<|end|>"))]["content"] == "<|end|>"
    assert settings["chat_template"] == (tmp_path / "out" / "chat_template.jinja").read_text()
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [model.tokenizer.eos_id, model.tokenizer.piece_id("<|end|>")]


def test_convert_to_a_run_and_back_gives_the_same_bits(tmp_path):
    model = tiny_model()
    export(model, tmp_path / "hf")

    def verb(source, to, workdir):
        config = ConvertConfig(source=str(source), step=None, all_steps=False, to=to, dtype="float32")
        return convert.run(config, str(workdir))["model"]

    run_dir = verb(tmp_path / "hf", "run", tmp_path / "a")
    loaded = load_stored(run_dir)
    assert loaded.name == "model@0"
    jax.tree.map(np.testing.assert_array_equal, model.params, loaded.params)
    back = verb(run_dir, "huggingface", tmp_path / "b")
    for name in ("model.safetensors", "config.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "b" / "model" / name).read_bytes()
    stamp = (tmp_path / "b" / "model" / "config.json").stat().st_mtime_ns
    assert verb(run_dir, "huggingface", tmp_path / "b") == back  # finished: not done again
    assert (tmp_path / "b" / "model" / "config.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="other inputs or settings"):
        verb(run_dir, "run", tmp_path / "b")


def test_a_folder_that_is_neither_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a run directory"):
        load_model(str(tmp_path))
    export(tiny_model(), tmp_path / "out")
    with pytest.raises(UserError, match="has no step 5"):
        load_model(str(tmp_path / "out"), step=5)


@needs_reference
@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa"])
def test_the_witness_agrees_with_transformers(name):
    golden = np.load(REFERENCE / "logits.npz")
    for row, expected in zip(golden["rand_input_ids"], golden[f"{name}/rand_logits"], strict=True):
        logits = numpy_llama.logits(REFERENCE / name, row.tolist())
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


@needs_reference
def test_a_reference_checkpoint_exported_and_read_again_gives_the_same_logits(tmp_path):
    model = load_model(str(REFERENCE / "tiny_gqa"))
    export(model, tmp_path / "out")
    again = load_model(str(tmp_path / "out"))
    tokens = np.load(REFERENCE / "logits.npz")["rand_input_ids"].astype(np.int32)
    inputs = (tokens, np.broadcast_to(np.arange(64, dtype=np.int32), tokens.shape), np.ones_like(tokens))
    run = jax.jit(forward, static_argnums=0)
    np.testing.assert_array_equal(
        run(model.config, model.params, *inputs)[0], run(again.config, again.params, *inputs)[0]
    )
