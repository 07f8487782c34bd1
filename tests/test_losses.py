"""Losses and objectives: the textbook formulas in float64, other tools' answers, invariance to how rows are laid."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from align_reference import golden, sft_rows
from tiny_models import NO_REFERENCE, REFERENCE, tiny_model
from tiny_objectives import dpo, lm
from tiny_stores import batch_of, packed_row, preference_row

from ctllm_jax.data.record import Row
from ctllm_jax.loading import load_model
from ctllm_jax.losses import dft_loss, lm_loss, logit_metrics, token_logprobs
from ctllm_jax.objectives import ObjectiveConfig, make_objective
from ctllm_jax.optim import Optimizer
from ctllm_jax.step import TrainState, train_step

needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)
LENGTH = 32
LM, DPO = lm(cross_entropy="dense"), dpo("dense")


def pretrain_rows(count: int = 8) -> list[Row]:
    random = np.random.default_rng(3)
    return [packed_row(random, LENGTH, str(n)) for n in range(count)]


def preference_rows(count: int = 8) -> list[Row]:
    random = np.random.default_rng(4)
    return [preference_row(random, LENGTH, str(n)) for n in range(count)]


# ---- Formulas


def logprobs_64(logits_BLV: np.ndarray, labels_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits_BLV = logits_BLV.astype(np.float64)
    top_BL1 = logits_BLV.max(-1, keepdims=True)
    lse_BL = (top_BL1 + np.log(np.exp(logits_BLV - top_BL1).sum(-1, keepdims=True)))[..., 0]
    return np.take_along_axis(logits_BLV, labels_BL[..., None], -1)[..., 0] - lse_BL, lse_BL


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_lm_loss_equals_the_formula_in_float64(scale, z_loss):
    random = np.random.default_rng(0)
    logits_BLV = (scale * random.normal(size=(3, 17, 50))).astype(np.float32)
    logits_BLV[..., 45:] = -np.inf  # padding of the vocabulary
    labels_BL, weights_BL = random.integers(0, 45, (3, 17)), (random.random((3, 17)) < 0.7).astype(np.float32)
    total, nll_B = lm_loss(
        *token_logprobs(jnp.asarray(logits_BLV), jnp.asarray(labels_BL)), jnp.asarray(weights_BL), z_loss
    )
    logprob_BL, lse_BL = logprobs_64(logits_BLV, labels_BL)
    expected_B = -(logprob_BL * weights_BL).sum(-1)
    np.testing.assert_allclose(nll_B, expected_B, rtol=2e-6)
    np.testing.assert_allclose(total, expected_B.sum() + z_loss * (weights_BL * lse_BL**2).sum(), rtol=2e-6)
    found_BL, found_lse_BL = token_logprobs(jnp.asarray(logits_BLV), jnp.asarray(labels_BL))
    np.testing.assert_allclose(found_BL, logprob_BL, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found_lse_BL, lse_BL, rtol=1e-6)


def test_lm_loss_of_uniform_logits_is_the_logarithm_of_the_vocabulary():
    total, _ = lm_loss(*token_logprobs(jnp.zeros((2, 5, 64)), jnp.zeros((2, 5), int)), jnp.ones((2, 5)), 0.0)
    np.testing.assert_allclose(total / 10, np.log(64), rtol=1e-6)


def test_dft_weighs_each_tokens_gradient_by_its_probability():
    logprob_BL, weights_BL = jnp.log(jnp.array([[0.5, 0.01, 0.9]])), jnp.array([[1.0, 1.0, 0.0]])
    (total, nll_B), grad_BL = jax.value_and_grad(dft_loss, has_aux=True)(logprob_BL, weights_BL)
    np.testing.assert_allclose(total, -0.5 * np.log(0.5) - 0.01 * np.log(0.01), rtol=1e-6)
    np.testing.assert_allclose(nll_B, [-np.log(0.5) - np.log(0.01)], rtol=1e-6)
    np.testing.assert_allclose(grad_BL, [[-0.5, -0.01, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("padded", [64, 80])
def test_logit_metrics_of_uniform_and_of_certain_logits(padded):
    logits_BLV = jnp.full((1, 2, padded), 3.0).at[0, 1, 5].set(100.0).at[..., 64:].set(-jnp.inf)
    found = logit_metrics(logits_BLV, jnp.array([[1, 5]]), 64)
    np.testing.assert_allclose(found["entropy"], [[np.log(64), 0.0]], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found["mean_logit"], [[3.0, 3.0 + 97 / 64]], rtol=1e-6)
    assert found["token_accuracy"].tolist() == [[0.0, 1.0]]


# ---- Objectives


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def reference():
    return tiny_model(seed=1).params


@functools.cache
def compiled(config: ObjectiveConfig):
    """((objective, sums), gradients by parameters and reference) as numpy; batches of 8 rows share the compilation."""
    objective = make_objective(config, tiny_model().config, 2)
    step = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    return lambda *arguments: jax.device_get(step(*arguments))


def norm(tree) -> float:
    """Euclidean norm over all leaves, in float64."""
    return float(np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(tree))))


def sums_over(config, params, reference, rows: list[Row], kind: str, **options):
    """(sums, gradients) over any number of rows, 8 at a time."""
    total = None
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        batch = batch_of(part, LENGTH, kind, empty=8 - len(part), **options)
        (_, sums), (grads, _) = compiled(config)(params, reference, batch)
        total = (sums, grads) if total is None else jax.tree.map(np.add, total, (sums, grads))
    return total


def test_the_lm_objective_counts_by_source_what_it_counts_in_all(model):
    (loss, sums), _ = compiled(LM)(model.params, None, batch_of(pretrain_rows(), LENGTH, "pretrain"))
    np.testing.assert_allclose(loss, sums["loss"], rtol=1e-6)
    np.testing.assert_allclose(sums["source_loss"].sum(), sums["loss"], rtol=1e-6)
    expected = [sum(sum(row.lengths) - len(row.lengths) for row in pretrain_rows()[part::2]) for part in (0, 1)]
    assert sums["source_tokens"].tolist() == expected and float(sums["count"]) == sum(expected)


@pytest.mark.parametrize("kind", ["pretrain", "chat"])
def test_the_same_documents_give_the_same_loss_packed_or_one_to_a_row(model, kind):
    random = np.random.default_rng(3)
    packed = [packed_row(random, LENGTH, str(n), masked=kind == "chat") for n in range(8)]
    single = []
    for row in packed:
        for name, size, end in zip(row.ids, row.lengths, np.cumsum(row.lengths), strict=True):
            part = slice(end - size, end)
            single.append(Row(row.tokens[part], [size], [name], None if row.mask is None else row.mask[part], 0))
    assert len(single) > len(packed)
    one, grads = sums_over(LM, model.params, None, packed, kind)
    other, other_grads = sums_over(LM, model.params, None, single, kind)
    assert float(one["count"]) == float(other["count"])
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)
    assert_close(other_grads, grads, 1e-5)


def test_without_document_masks_packed_documents_see_each_other(model):
    rows = [row for row in pretrain_rows() if len(row.lengths) > 1]
    apart, _ = sums_over(LM, model.params, None, rows, "pretrain")
    across, _ = sums_over(LM, model.params, None, rows, "pretrain", mask_documents=False)
    assert float(across["count"]) == float(apart["count"]) + sum(len(row.lengths) - 1 for row in rows)
    assert abs(float(across["loss"] / across["count"] - apart["loss"] / apart["count"])) > 1e-2


@pytest.mark.parametrize(
    ("config", "kind", "rows"), [(LM, "pretrain", pretrain_rows()), (DPO, "preference", preference_rows())]
)
def test_empty_rows_add_nothing(model, reference, config, kind, rows):
    frozen = reference if config is DPO else None
    whole, grads = sums_over(config, model.params, frozen, rows, kind)
    parts = [sums_over(config, model.params, frozen, part, kind) for part in (rows[:6], rows[6:])]
    sums, part_grads = jax.tree.map(np.add, *parts)
    for name, value in whole.items():
        np.testing.assert_allclose(sums[name], value, rtol=2e-6, atol=1e-4, err_msg=name)
    assert_close(part_grads, grads, 1e-6)


def test_a_policy_equal_to_its_reference_has_loss_ln_2_and_no_reward(model):
    # Without the gradient: compilers may round a pass that keeps its activations otherwise than one that does not.
    objective = jax.jit(make_objective(DPO, model.config, 2))
    _, sums = objective(model.params, model.params, batch_of(preference_rows(), LENGTH, "preference"))
    assert float(sums["count"]) == 8
    np.testing.assert_allclose(sums["loss"] / 8, np.log(2), rtol=1e-7)
    assert [float(sums[name]) for name in ("margin", "reward_chosen", "reward_rejected", "accuracy")] == [0.0] * 4


def test_dpo_does_not_train_its_reference(model, reference):
    batch = batch_of(preference_rows(), LENGTH, "preference")
    _, (grads, reference_grads) = compiled(DPO)(model.params, reference, batch)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(reference_grads))


def test_bfloat16_compute_stays_close_to_float32(model):
    batch = batch_of(pretrain_rows(), LENGTH, "pretrain")
    config = dataclasses.replace(model.config, dtype="bfloat16")
    rough, _ = jax.jit(make_objective(LM, config, 2))(model.params, None, batch)
    (exact, _), _ = compiled(LM)(model.params, None, batch)
    assert float(rough) != float(exact)
    np.testing.assert_allclose(rough, exact, rtol=1e-2)


# ---- A step


def assert_close(found, expected, tolerance: float) -> None:
    """Every leaf equal within `tolerance` of the leaf's largest value."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-3, np.abs(b).max())),
        found,
        expected,
    )


@pytest.mark.parametrize(("config", "microbatches"), [(LM, 1), (LM, 2), (LM, 4), (DPO, 4)])
def test_microbatches_change_neither_the_step_nor_its_metrics(model, reference, config, microbatches):
    if config is LM:  # rows of very unequal weight: a mean of means would differ
        masks = [np.arange(len(row.tokens)) > 4 * n for n, row in enumerate(pretrain_rows())]
        rows = [
            Row(row.tokens, row.lengths, row.ids, mask.astype(np.uint8), 0)
            for row, mask in zip(pretrain_rows(), masks, strict=True)
        ]
    else:
        rows = [*preference_rows(5), *[preference_rows(1)[0]] * 3]
    frozen = reference if config is DPO else None
    batch = batch_of(rows, LENGTH, "chat" if config is LM else "preference")
    (_, sums), (grads, _) = compiled(config)(model.params, frozen, batch)

    optimizer = Optimizer(optax.identity(), optax.constant_schedule(1.0), 1, 0.0)
    objective = make_objective(config, model.config, 2)
    step = functools.partial(train_step, objective=objective, optimizer=optimizer, microbatches=microbatches)
    before = TrainState(model.params, optimizer.direction.init(model.params), jnp.int32(4), jnp.int32(0), jnp.zeros(1))
    after, metrics = jax.device_get(jax.jit(step)(before, frozen, batch))
    assert (int(after.step), int(after.skipped)) == (5, 0)
    updates = jax.tree.map(np.subtract, after.params, jax.device_get(model.params))
    assert_close(updates, jax.tree.map(lambda g: -g / sums["count"], grads), 1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm(grads) / sums["count"], rtol=1e-5)
    for name, value in sums.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


# ---- What other tools answer


@needs_reference
@pytest.mark.parametrize("name", ["lm", "dft"])
def test_sft_losses_gradient_norms_and_accuracies_equal_trls(name):
    model = load_model(str(REFERENCE / "tiny_gqa"))
    cases = golden("sft_golden")
    longest = max(len(ids) for case in cases.values() for ids in case["input_ids"])
    objective = make_objective(lm(name=name, logit_metrics=True), model.config, 2)
    step = jax.jit(jax.value_and_grad(objective, has_aux=True))
    for mode in [mode for mode in cases if (mode == "dft") == (name == "dft")]:
        case, rows = cases[mode], sft_rows(cases[mode])
        (loss, sums), grads = step(model.params, None, batch_of(rows, longest, "chat", empty=8 - len(rows)))
        count = float(sums["count"])
        assert count == sum(case["label_tokens_per_row"])
        np.testing.assert_allclose(loss / count, case["loss"], rtol=1e-4, err_msg=mode)
        np.testing.assert_allclose(sums["loss"], sum(case["nll_sum_per_row"]), rtol=1e-4, err_msg=mode)
        np.testing.assert_allclose(norm(grads) / count, case["grad_norm"], rtol=1e-3, err_msg=mode)
        np.testing.assert_allclose(sums["token_accuracy"] / count, case["mean_token_accuracy"], atol=1e-6)
