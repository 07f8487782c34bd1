"""What does not go together in a training config, or between it, its store and its mesh, is refused by name."""

# ruff: noqa: F811 (fixtures)
import dataclasses

import pytest
from tiny_objectives import dpo
from tiny_runs import config_of, stores  # noqa: F401 (a fixture too)
from tiny_stores import tiny_store

from ctllm_jax import train
from ctllm_jax.common.errors import UserError


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("preference", {}, "is a preference store; objective lm reads pretrain or chat"),
        ("pretrain", {"objective": dataclasses.asdict(dpo())}, "is a pretrain store; objective dpo reads preference"),
        ("preference", {"objective": dataclasses.asdict(dpo())}, "objective dpo starts from a model"),
        ("pretrain", {"model__vocab_size": 300}, "its tokenizer has 370 ids, the model only 300"),
        (
            "pretrain",
            {"model__vocab_size": 300, "model__padded_vocab_size": 300, "model__max_length": 31},
            "300; rows of 32 tokens, the model takes 31; --config.model.vocab_size=370 "
            "--config.model.padded_vocab_size=384 --config.model.max_length=32 would do",
        ),
        ("pretrain", {"model__max_length": 31}, "rows of 32 tokens, the model takes 31"),
        ("pretrain", {"data__rates": {"code": 1.0}}, "mixture rate given for 'code'"),
        ("nowhere", {}, "manifest.json is missing"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_folder_is_claimed(stores, tmp_path, kind, change, message):
    with pytest.raises(UserError, match=message):
        train.run(config_of(stores.get(kind, tmp_path / kind), **change), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh__fsdp": 3}, "does not fit 8 devices"),
        ({"batch_size": 12}, r"batch_size / microbatches = 12 does not divide over 8 devices .*slice x data x fsdp"),
        ({"microbatches": 2}, r"batch_size / microbatches = 4 does not divide over 8 devices"),
        (
            {"mesh__data": 1, "mesh__fsdp": 1, "mesh__tensor": 1, "mesh__context": 8, "data__store": "short"},
            "length 30",
        ),
        ({"model__num_kv_heads": 1, "mesh__tensor": 2}, "layers/k .*does not divide over 2 devices of axis tensor"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_by_name(stores, tmp_path, change, message):
    if change.get("data__store"):
        change = {**change, "data__store": str(tiny_store(tmp_path / "short", length=30, rows=4).folder)}
    with pytest.raises(UserError, match=message):
        train.run(config_of(stores["pretrain"], **change), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"microbatches": 3}, "batch_size 8 does not divide into 3 microbatches"),
        ({"init_from": "somewhere"}, "give either model .* or init_from"),
        ({"model": None}, "give either model .* or init_from"),
        ({"init_step": 4}, "init_step 4 is a checkpoint of init_from"),
        (
            {"objective": dataclasses.asdict(dpo(loss="aot")), "microbatches": 2},
            "preference loss 'aot' compares the pairs of a step; it needs microbatches 1",
        ),
        ({"objective__name": "ppo"}, "objective 'ppo' is unknown; there are: lm, dft, dpo"),
        ({"model__remat": "some"}, "remat 'some' is unknown"),
        ({"checkpoints__kept": 0}, "every and kept must be at least 1"),
        ({"checkpoints__keep_every": 7}, "keep_every 7 is not a multiple of every 5"),
        ({"checkpoints__keep_best": 1}, "not every step of checkpoints.every 5 is evaluated"),
        ({"microbatches": 0}, "batch_size and microbatches must be at least 1"),
        ({"batch_size": 0}, "batch_size and microbatches must be at least 1"),
        ({"eval__every": 0}, "eval: every must be at least 1"),
        ({"eval__batches": -1}, "eval: .*batches must not be negative"),
        ({"checkpoints__minutes": -1.0}, "minutes, keep_every and keep_best must not be negative"),
        ({"model__num_kv_heads": 0}, "num_kv_heads 0 is below 1"),
        ({"model__num_layers": 0}, "num_layers 0 is below 1"),
        ({"model__dtype": "fp32"}, "dtype 'fp32' is unknown; there are: bfloat16, float32, float64"),
    ],
)
def test_contradictions_in_a_config_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        config_of("store", **change)
