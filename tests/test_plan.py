"""Plans: the arithmetic against what compilers said, the search, and what the command prints."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
from tiny_objectives import dpo

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

from aot_cases import CASES, case_config

from configs import hardware, pretrain
from ctllm_jax import cli
from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.hardware import parse_slice
from ctllm_jax.model import REMAT_POLICIES, count_params, flops_per_token
from ctllm_jax.plan import arithmetic, search, traffic
from ctllm_jax.plan.compile import Compiled, compiled, missing
from ctllm_jax.plan.estimate import make_plan
from ctllm_jax.plan.text import render
from ctllm_jax.train_config import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What compilers said: python benchmarks/aot.py --part memory --record tests/compiled_steps.jsonl
RECORDED = [json.loads(line) for line in (ROOT / "tests" / "compiled_steps.jsonl").read_text().splitlines()]
SIX = ["v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v5p:4x8x8", "v6e:4x4", "v6e:16x16", "h200x8", "h100x64"]


@pytest.fixture(autouse=True)
def own_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ctllm"])


def config_for(name: str) -> TrainConfig:
    return build(TrainConfig, pretrain.get_config(f"ct_llm_2b@{name}").to_dict())


def with_model(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def with_mesh(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **changes))


def planned(config: TrainConfig, name: str):
    return make_plan(config, parse_slice(name), tokens=0.0, compiling=False)


# ---- Arithmetic against compilers


def test_the_record_has_every_case():
    assert [entry["case"] for entry in RECORDED] == [*CASES]


@pytest.mark.parametrize("entry", RECORDED, ids=lambda entry: " ".join(map(str, entry["case"].values())))
def test_arguments_are_exact_and_temporary_memory_is_near(entry):
    config, target = case_config(entry["case"]), parse_slice(entry["case"]["slice"])
    assert sum(arithmetic.arguments(config, target).values()) == entry["arguments"]
    found = sum(arithmetic.temporary(config, target).values())
    assert found == pytest.approx(entry["peak"] - entry["arguments"], rel=0.15)


# ---- Work and traffic


def test_flops_are_the_models_and_what_is_computed_again():
    config = config_for("v5e:4x4")
    target, model = parse_slice("v5e:4x4"), config.model
    tokens = 512 * 4096 / 16
    none = arithmetic.work(with_model(config, remat="none"), target)
    assert none.model_flops == none.hardware_flops == tokens * flops_per_token(model, 4096, causal=True)
    assert none.model_flops_full == tokens * flops_per_token(model, 4096, causal=False)
    again = [arithmetic.work(with_model(config, remat=name), target).hardware_flops for name in REMAT_POLICIES]
    assert again == sorted(again, reverse=True) and again[-1] == again[-2]
    # `full` computes the forward pass of every layer again, but for the last product.
    layer = 2 * (4 * 2048 * 2048 + 2 * 2048 * 5504) + 2 * 2048 * 4096
    assert again[0] - none.hardware_flops == tokens * 32 * layer
    chunked = dataclasses.replace(config, objective=dataclasses.replace(config.objective, cross_entropy="chunked"))
    assert arithmetic.work(chunked, target).hardware_flops == tokens * (
        flops_per_token(model, 4096, causal=True) + 2 * 2048 * 125_824
    )


def test_dpo_counts_the_reference():
    config = config_for("v5e:4x4")
    config = dataclasses.replace(config, objective=dpo(), batch_size=256, microbatches=16)
    target = parse_slice("v5e:4x4")
    memory = arithmetic.arguments(config, target)
    assert memory["reference"] == memory["parameters"]
    assert arithmetic.work(config, target).model_flops == pytest.approx(
        4 / 3 * 512 * 4096 / 16 * flops_per_token(config.model, 4096, causal=True)
    )


def test_what_needs_the_logits_is_planned_with_them():
    target = parse_slice("v5e:4x4")
    config = dataclasses.replace(config_for("v5e:4x4"), objective=dpo(), batch_size=256, microbatches=4)
    part = arithmetic.share(config, target)
    assert arithmetic.loss_form(config, part, target) == "chunked"
    for changes in ({"logit_metrics": True}, {"policy_weighted": True}):
        needy = dataclasses.replace(config, objective=dpo(**changes))
        assert arithmetic.loss_form(needy, part, target) == "dense"
        assert arithmetic.temporary(needy, target)["loss"] > arithmetic.temporary(config, target).get("loss", 0)


def test_collectives_of_a_mesh():
    config = dataclasses.replace(
        config_for("v5e:4x4"),
        microbatches=8,
        mesh=dataclasses.replace(config_for("v5e:4x4").mesh, fsdp=4, tensor=2, data=2),
    )
    found = {(one.kind, one.axis): one for one in traffic.collectives(config, parse_slice("v5e:4x4"))}
    parameters = 2 * count_params(config.model) / 2  # bf16, half of them on a tensor shard
    gathered = found["all-gather", "fsdp"]
    assert gathered.bytes == pytest.approx(parameters * 3 / 4, rel=1e-3) and gathered.times == 16
    assert found["reduce-scatter", "fsdp"].times == 8
    assert found["all-reduce", "data"].bytes == pytest.approx(2 * parameters / 4 / 2, rel=1e-3)
    assert found["all-reduce", "tensor"].awaited and not gathered.awaited
    assert ("all-gather", "context") not in found and {one.link for one in found.values()} == {"link"}


@pytest.mark.parametrize(
    ("name", "axis", "link"),
    [("2*v5e:16x16", "slice", "network"), ("2*v5e:16x16", "fsdp", "link"), ("h100x64", "slice", "network"),
     ("h100x64", "fsdp", "link")],
)  # fmt: skip
def test_slices_and_hosts_are_joined_by_the_network(name, axis, link):
    assert {one.link for one in traffic.collectives(config_for(name), parse_slice(name)) if one.axis == axis} == {link}


def test_parameters_over_several_hosts_cross_the_network():
    config = dataclasses.replace(
        config_for("h100x64"), mesh=dataclasses.replace(config_for("h100x64").mesh, slice=1, fsdp=64)
    )
    (gathered, _) = traffic.collectives(config, parse_slice("h100x64"))
    assert (gathered.axis, gathered.link) == ("fsdp", "network")


# ---- Shipped configs


@pytest.mark.parametrize("name", hardware.SLICES)
def test_a_shipped_config_fits_its_slice(name):
    plan = planned(config_for(name), name)
    assert plan.fits and plan.parameters == 2_134_509_568 and plan.tokens_per_step == 512 * 4096
    assert plan.needed < 0.95 * plan.memory


@pytest.mark.parametrize("name", hardware.SLICES)
def test_every_shipped_config_has_an_answer_on_every_slice(name, capsys):
    """Its plan, or the nearest layout that fits."""
    arguments = [
        "plan",
        f"--config=configs/pretrain.py:ct_llm_2b@{name}",
        f"--slice={','.join(SIX)}",
        "--nocompile",
        "--json",
    ]
    cli.main(arguments)
    plans = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    fitting = {
        plan["slice"]
        for plan in plans
        if sum(plan["arguments"].values()) + sum(plan["temporary"].values()) <= plan["memory"]
    }
    assert fitting == {*SIX}


# ---- Search


def test_a_ranking_fits_and_is_in_order():
    config, target = config_for("v5e:16x16"), parse_slice("v5e:16x16")
    ranking = search.rank(config, target, 0.0)
    assert len(ranking) == search.SHOWN
    assert all(one.plan.needed <= search.MARGIN * target.chip.memory for one in ranking)
    floors = [max(one.plan.floor_seconds.values()) for one in ranking]
    assert floors[0] == min(floors)
    assert all(one.config.batch_size == config.batch_size for one in ranking)


def test_the_nearest_that_fits_changes_least():
    config, target = with_model(config_for("v5e:4x4"), remat="none"), parse_slice("v5e:4x4")
    assert not planned(config, "v5e:4x4").fits
    nearest = search.nearest(config, target, 0.0, compiling=False)
    assert nearest.plan.fits and nearest.changes == 1 and nearest.flags == "--config.model.remat=matmuls"


def test_a_slice_that_is_too_small_has_no_proposal(capsys):
    assert search.nearest(config_for("v5e:4x4"), parse_slice("v5e:1x1"), 0.0, compiling=False) is None
    with pytest.raises(UserError, match="nothing that was tried fits v5e:1x1"):
        search.rank(config_for("v5e:4x4"), parse_slice("v5e:1x1"), 0.0)


# ---- The command


def test_what_is_printed(capsys, tmp_path):
    cli.main(
        ["plan", "--config=configs/pretrain.py:ct_llm_2b@v5p:4x4x4", "--slice=v5p-128", "--tokens=100", "--nocompile",
         f"--workdir={tmp_path}"]
    )  # fmt: skip
    text = capsys.readouterr().out
    for line in (
        "2,134,509,568 parameters on v5p:4x4x4: 64 x TPU v5, mesh fsdp 64",
        "2,097,152 tokens a step; a device takes 8 sequences at a time, 1 times",
        "fits in 95.74",
        "arithmetic only: as --nocompile asks",
        "bound by FLOPs",
        "100.00 billion tokens: 47,684 steps, at least",
    ):
        assert line in text
    (plan,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert (plan["devices"], plan["mesh"]["fsdp"], plan["budget_tokens"]) == (64, 64, 100e9)


def test_a_time_without_the_kernels_is_a_least_time():
    found = next(entry for entry in RECORDED if entry["case"]["slice"] == "v6e:16x16")
    step = Compiled(**{name: value for name, value in found.items() if name != "case"})
    without = dataclasses.replace(planned(config_for("v6e:16x16"), "v6e:16x16"), compiled=step, compiler_seconds=0.2)
    whole = dataclasses.replace(without, kernel_seconds=0.1)
    plain = dataclasses.replace(without, compiled=dataclasses.replace(step, kernels={}))
    assert (without.estimated, whole.estimated, plain.estimated) == (False, True, True)
    assert "not counted" in render(without, None) and "at most" in render(without, None)
    assert "at least" in render(without, None).splitlines()[-1] and "estimated" in render(whole, None).splitlines()[-1]


def test_a_config_that_does_not_fit_is_followed_by_one_that_does(capsys):
    cli.main(["plan", "--config=configs/pretrain.py:ct_llm_2b", "--slice=h200x8", "--nocompile"])
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text and "The nearest that fits: --config.model.attention=pallas_gpu" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/pretrain.py:ct_llm_2b"], "give --slice=NAME, such as v5e:16x16"),
        (["--config=configs/pretrain.py:ct_llm_2b", "--slice=v5e-3"], "'v5e-3' is unknown; there are: v5e-1"),
        (["--config=configs/sft.py", "--config.init_from=RUN", "--slice=v5e:4x4"], "model is None"),
        (["--slice=v5e:4x4"], "give --config=FILE.py"),
        (["--config=configs/pretrain.py:ct_llm_2b@v5e:9x9"], "no values for slice 'v5e:9x9'; there are: v4:4x4x4"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err


# ---- With a compiler

needs_libtpu = pytest.mark.skipif(
    missing(parse_slice("v5e:4x4")) is not None, reason="libtpu is not installed: pip install '.[tpu]'"
)


@pytest.mark.slow
@needs_libtpu
def test_a_proposal_is_compiled_to_prove_it(tmp_path, monkeypatch):
    """The config that keeps every activation does not fit a v5e:4x4; the compiler says so, and takes the proposal."""
    monkeypatch.setattr("ctllm_jax.plan.compile.CACHE", tmp_path)
    target = parse_slice("v5e:4x4")
    config = dataclasses.replace(with_model(config_for("v5e:4x4"), remat="none"), microbatches=1, batch_size=16)
    refused = compiled(config, target)
    assert refused.refusal and "hbm" in refused.refusal.lower()
    nearest = search.nearest(config, target, 0.0, compiling=True)
    assert nearest.plan.compiled.peak < target.chip.memory and nearest.plan.compiled.refusal is None
    assert nearest.plan.compiler_seconds > 0
    assert len(list(tmp_path.iterdir())) >= 2
    assert compiled(nearest.config, target) == nearest.plan.compiled  # from the cache


@pytest.mark.slow
@needs_libtpu
def test_the_command_compiles(tmp_path):
    """As a user starts it, with a small model: no accelerator, no warnings of libtpu, a sign of life."""
    command = [sys.executable, "-m", "ctllm_jax.cli", "plan", "--config=configs/pretrain.py:tiny", "--slice=v5e:2x2"]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "by the compiler's estimate" in ended.stdout and "libtpu" not in ended.stderr
