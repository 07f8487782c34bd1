"""Preference losses: every configuration of the reference, by formula and through the model; what they refuse."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align_reference import ALIGN, assert_diagnostics, golden, preference_pairs, torch_names
from test_losses import norm
from tiny_models import NO_REFERENCE, REFERENCE, tiny_model
from tiny_objectives import PREFERENCE, dpo
from tiny_stores import batch_of, preference_row

from ctllm_jax.data.record import Row
from ctllm_jax.loading import load_model
from ctllm_jax.objectives import _answer_sums, answer_logprobs, make_objective, whole_step
from ctllm_jax.preference import LOSSES, Pairs, PreferenceConfig, preference_loss

needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)
LENGTH = 473  # of the reference's batches

# TRL's settings in our words. Where there are several losses, the second is the SFT term.
KEYS = {"beta": "beta", "label_smoothing": "label_smoothing", "ld_alpha": "tail_weight"}
KEYS |= {"use_weighting": "policy_weighted", "f_divergence_type": "divergence"}


def ours(config: dict) -> dict:
    """A TRL configuration as changes of ours."""
    found = {KEYS[key]: value for key, value in config.items() if key in KEYS}
    if found.get("divergence") == "js_divergence":
        found["divergence"] = "js"
    if "loss_weights" in config:
        assert config["loss_type"][1] == "sft" and config["loss_weights"][0] == 1
        found["sft_weight"] = config["loss_weights"][1]
    return {**found, "loss": config.get("loss_type", ["sigmoid"])[0]}


def cases() -> dict[str, dict]:
    """{name: entry} of the reference's configurations."""
    return {case["name"]: case for case in golden("dpo_golden")["cases"]} if REFERENCE.exists() else {}


def cut_of(case: dict) -> tuple[int | None, bool]:
    """(most tokens of a sequence, whether its end is kept)."""
    return case["config"].get("max_length"), case["config"].get("truncation_mode") == "keep_end"


def kept_rows(limit: int | None, from_end: bool) -> list[Row]:
    """The reference's pairs, cut; without those of which nothing is left to learn."""
    if limit is None:
        return preference_pairs()
    part, rows = slice(-limit, None) if from_end else slice(limit), []
    for row in preference_pairs():
        cut = row.lengths[0]
        tokens, masks = ([whole[:cut][part], whole[cut:][part]] for whole in (row.tokens, row.mask))
        if all(mask[1:].any() for mask in masks):
            rows.append(Row(np.concatenate(tokens), list(map(len, tokens)), ["", ""], np.concatenate(masks), 0))
    return rows


def pairs_of(policy_P2, reference_P2, tokens_P2) -> Pairs:
    """Pairs that all count."""
    policy_P2, reference_P2, tokens_P2 = (jnp.asarray(x, jnp.float32) for x in (policy_P2, reference_P2, tokens_P2))
    size = len(policy_P2)
    share_P = jnp.full(size, size / tokens_P2[:, 0].sum())
    return Pairs(policy_P2, reference_P2, tokens_P2, jnp.ones(size, bool), share_P, None)


def given(case: dict) -> list[np.ndarray]:
    """[policy_P2, reference_P2] that TRL computed."""
    return [
        np.stack([case[f"{kind}_chosen_logps"], case[f"{kind}_rejected_logps"]], axis=1) for kind in ("policy", "ref")
    ]


# ---- Formulas


@needs_reference
def test_losses_of_the_original_code():
    case = cases()["sigmoid_b0.1"]
    policy_P2, reference_P2 = given(case)
    for original in golden("dpo_golden")["original_dpo"]:
        changes = {key: original["config"][key] for key in ("beta", "label_smoothing") if key in original["config"]}
        changes["loss"] = "ipo_sum" if original["config"].get("ipo") else "sigmoid"
        free = original["config"].get("reference_free", False)
        config = PreferenceConfig(**PREFERENCE | changes)
        for row, expected in enumerate(original["losses"]):
            one = pairs_of(policy_P2[[row]], 0 * reference_P2[[row]] if free else reference_P2[[row]], [[1, 1]])
            loss, sums = preference_loss(one, config)
            np.testing.assert_allclose(loss, expected, rtol=1e-4)
            if not free:  # its rewards are still against the reference
                np.testing.assert_allclose(sums["reward_chosen"], original["chosen_rewards"][row], rtol=1e-5)
                np.testing.assert_allclose(sums["reward_rejected"], original["rejected_rewards"][row], rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_pairs_that_do_not_count_change_nothing(loss):
    """Not even where a loss compares pairs with one another, and their gradient is 0 and no NaN."""
    random = np.random.default_rng(2)
    policy_P2, reference_P2 = -50 * random.random((2, 6, 2))
    whole = pairs_of(policy_P2, reference_P2, random.integers(1, 20, (6, 2)))
    config = PreferenceConfig(**PREFERENCE | {"loss": loss, "label_smoothing": 0.1 if loss == "exo_pair" else 0.0})
    order = np.array([6, 0, 1, 7, 2, 3, 4, 5])  # places 6 and 7 are empty rows

    def spread(x):
        return jnp.concatenate([x, jnp.zeros((2, *x.shape[1:]), x.dtype)])[order]

    padded = Pairs(*map(spread, whole[:3]), spread(whole.valid_P), jnp.full(8, whole.token_share_P[0]), None)

    def total(policy_P2, pairs):
        return preference_loss(pairs._replace(policy_P2=policy_P2), config)

    (expected, sums), grad_P2 = jax.value_and_grad(total, has_aux=True)(whole.policy_P2, whole)
    (found, padded_sums), padded_grad_P2 = jax.value_and_grad(total, has_aux=True)(padded.policy_P2, padded)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), padded_sums, sums)
    np.testing.assert_allclose(padded_grad_P2, spread(grad_P2), rtol=1e-5, atol=1e-7)


def test_kl_is_how_much_likelier_the_answers_are_to_the_reference():
    _, sums = preference_loss(pairs_of([[-5.0, -7.0]], [[-4.0, -4.0]], [[3, 3]]), PreferenceConfig(**PREFERENCE))
    assert float(sums["kl"]) == 2.0


def test_dpo_gradient_pulls_the_answers_apart_by_the_sigmoid_of_the_margin():
    pairs, config = pairs_of([[-5.0, -3.0]], [[-4.0, -4.0]], [[1, 1]]), PreferenceConfig(**PREFERENCE)
    grad_P2 = jax.grad(lambda x: preference_loss(pairs._replace(policy_P2=x), config)[0])(pairs.policy_P2)
    pull = 0.5 / (1 + np.exp(-1.0))  # beta x s(-margin), margin -1
    np.testing.assert_allclose(grad_P2, [[-pull, pull]], rtol=1e-6)


# ---- Through the model


@functools.cache
def reference_models():
    """The reference's policy and frozen model."""
    return tuple(load_model(str(REFERENCE / name)) for name in ("tiny_gqa", "tiny_gqa_ref"))


def stepped(config, rows: list[Row]):
    """((loss, sums), gradient) of the reference's models on 8 rows, empty ones at the end."""
    policy, frozen = reference_models()
    batch = batch_of(rows, LENGTH, "preference", empty=8 - len(rows))
    step = jax.jit(jax.value_and_grad(make_objective(config, policy.config, 1), has_aux=True))
    return jax.device_get(step(policy.params, frozen.params, batch))


@functools.cache
def one_pair():
    """(params, batch of one pair) -> (the answers' log-probabilities [2], the gradient of each), compiled once."""
    config = reference_models()[0].config

    def sums_2(params, batch):
        found = answer_logprobs(dpo(), config, params, batch)[0]
        return found, found

    return jax.jit(jax.jacrev(sums_2, has_aux=True))


@functools.cache
def answers(limit: int | None, from_end: bool, tail_weight: float):
    """(pairs, Gram matrix of the gradients of the log-probabilities of all answers): any loss's gradient follows."""
    rows, sums, gradients = kept_rows(limit, from_end), [], []
    batch = batch_of(rows, LENGTH, "preference")
    tokens_P2 = batch["weights"].sum(-1)
    beyond = np.cumsum(batch["weights"], -1) > tokens_P2.min(-1)[:, None, None]
    batch["weights"] = (batch["weights"] * np.where(beyond, tail_weight, 1.0)).astype(np.float32)
    for row in range(len(rows)):
        one = {name: array[row : row + 1] for name, array in batch.items()}
        (gradient, own), (_, frozen) = (one_pair()(model.params, one) for model in reference_models())
        sums.append((own, frozen))
        gradients.append(np.concatenate([np.reshape(leaf, (2, -1)) for leaf in jax.tree.leaves(gradient)], axis=1))
    policy_P2, reference_P2 = (jnp.stack(column) for column in zip(*sums, strict=True))
    flat = np.concatenate(gradients).astype(np.float64)
    return pairs_of(policy_P2, reference_P2, tokens_P2), flat @ flat.T


@needs_reference
@pytest.mark.parametrize("name", [name for name in cases() if name not in ("wpo", "policy_is_ref")])
def test_losses_gradient_norms_and_diagnostics_equal_trls(name):
    case = cases()[name]
    config = PreferenceConfig(**PREFERENCE | ours(case["config"]))
    pairs, gram = answers(*cut_of(case), config.tail_weight)
    step = jax.value_and_grad(lambda own: preference_loss(pairs._replace(policy_P2=own), config), has_aux=True)
    (loss, sums), pull_P2 = step(pairs.policy_P2)
    pull = np.asarray(pull_P2, np.float64).ravel()
    assert_case(case, loss, sums, np.sqrt(pull @ gram @ pull))


def assert_case(case: dict, loss, sums: dict, gradient_norm: float) -> None:
    """Loss, gradient norm, rewards and log-probabilities are TRL's."""
    count, expected = float(sums["count"]), case["metrics"]
    assert count == len(case["rows_kept"])
    # exp(-log ratio) of forward KL magnifies what rounding leaves in log-probabilities of 1,000 nats.
    beyond = case["name"] == "f_forward_kl"
    np.testing.assert_allclose(loss / count, case["loss"], rtol=1e-3 if beyond else 1e-4, atol=2e-6)
    np.testing.assert_allclose(gradient_norm / count, case["grad_norm"], rtol=2e-3 if beyond else 1e-3)
    assert_diagnostics(sums, expected, atol=2e-4)


def assert_logit_metrics(expected: dict, sums: dict) -> None:
    """Entropy, accuracy and mean logits are TRL's."""
    means = {name: float(value) / float(sums["count"]) for name, value in sums.items()}
    np.testing.assert_allclose(means["mean_logit_chosen"], expected["logits/chosen"], atol=1e-6)
    np.testing.assert_allclose(means["mean_logit_rejected"], expected["logits/rejected"], atol=1e-6)
    np.testing.assert_allclose(means["token_accuracy_chosen"], expected["mean_token_accuracy"], atol=1e-6)
    weighted = [means[f"entropy_{side}"] * means[f"tokens_{side}"] for side in ("chosen", "rejected")]
    tokens = means["tokens_chosen"] + means["tokens_rejected"]
    np.testing.assert_allclose(sum(weighted) / tokens, expected["entropy"], rtol=1e-5)


@needs_reference
def test_sigmoid_dpo_with_all_metrics_and_its_whole_gradient_equal_trls():
    case = cases()["sigmoid_b0.5"]
    (loss, sums), grads = stepped(dpo(logit_metrics=True), preference_pairs())
    assert_case(case, loss, sums, norm(grads))
    assert_logit_metrics(case["metrics"], sums)
    assert float(sums["tokens_chosen"]) == sum(case["completion_tokens_chosen"])
    theirs, found = np.load(ALIGN / "dpo_sigmoid_b0.5_grads.npz"), torch_names(reference_models()[0].config, grads)
    for name, gradient in theirs.items():
        np.testing.assert_allclose(found[name] / 8, gradient, atol=1e-3 * np.abs(gradient).max(), err_msg=name)


@needs_reference
@pytest.mark.slow
@pytest.mark.parametrize("name", ["wpo", "ld_alpha0.5", "aot_b0.1", "sigmoid+sft_w1_0.2", "trunc96_keep_end"])
def test_what_more_than_the_log_probabilities_decides_equals_trls(name):
    case = cases()[name]
    (loss, sums), grads = stepped(dpo(logit_metrics=True, **ours(case["config"])), kept_rows(*cut_of(case)))
    assert_case(case, loss, sums, norm(grads))
    assert_logit_metrics(case["metrics"], sums)


@needs_reference
def test_a_policy_that_is_the_reference_has_ln_2_and_no_rewards():
    policy, _ = reference_models()
    case = cases()["policy_is_ref"]
    objective = jax.jit(make_objective(dpo(beta=case["config"]["beta"]), policy.config, 1))
    _, sums = objective(policy.params, policy.params, batch_of(preference_pairs(), LENGTH, "preference"))
    np.testing.assert_allclose(sums["loss"] / 8, case["expected"], rtol=1e-7)
    assert [float(sums[name]) for name in ("margin", "reward_chosen", "reward_rejected", "kl")] == [0.0] * 4


# ---- What is read where


@functools.cache
def small():
    """(policy, reference parameters, a batch of 8 pairs) of the tiny models."""
    random = np.random.default_rng(4)
    rows = [preference_row(random, 32, str(n)) for n in range(8)]
    return tiny_model(), tiny_model(seed=1).params, batch_of(rows, 32, "preference")


def test_given_log_probabilities_of_the_reference_do_what_its_parameters_do():
    policy, frozen, batch = small()
    _, live = jax.jit(make_objective(dpo(), policy.config, 1))(policy.params, frozen, batch)
    scores_B2 = jax.jit(functools.partial(answer_logprobs, dpo(), policy.config))(frozen, batch)
    told = {**batch, "reference": scores_B2}
    _, cached = jax.jit(make_objective(dpo(reference="cached"), policy.config, 1))(policy.params, None, told)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), cached, live)


def test_the_sft_term_is_a_mean_over_the_tokens_of_the_whole_step():
    policy, frozen, batch = small()
    objective = make_objective(dpo(loss="sft"), policy.config, 1)
    whole = jax.jit(objective)(policy.params, frozen, batch)[1]
    expected = -float(whole["logprob_chosen"]) / float(whole["tokens_chosen"])
    np.testing.assert_allclose(whole["loss"] / 8, expected, rtol=1e-6)
    told = whole_step(batch)
    parts = [jax.tree.map(lambda x, half=half: x[half], told) for half in (slice(0, 4), slice(4, 8))]
    halves = [jax.jit(objective)(policy.params, frozen, part)[1]["loss"] for part in parts]
    np.testing.assert_allclose(sum(map(float, halves)), whole["loss"], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "orpo"}, "preference loss 'orpo' is unknown; there are: sigmoid, robust,"),
        ({"divergence": "chi"}, "preference divergence 'chi' is unknown; there are: reverse_kl,"),
        ({"reference": "old"}, "preference reference 'old' is unknown; there are: cached, live, none"),
        ({"beta": 0.0}, "beta 0.0 must be positive"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "loss 'ipo' has no label smoothing; it is for: sigmoid, robust"),
        ({"label_smoothing": 0.5}, "label_smoothing 0.5 must be at least 0 and less than 0.5"),
        ({"loss": "exo_pair"}, "loss 'exo_pair' needs label_smoothing above 0"),
        ({"loss": "aot", "divergence": "js"}, "leave divergence at"),
        ({"loss": "aot", "policy_weighted": True}, "none of its terms is a pair's own"),
        ({"loss": "aot_unpaired", "policy_weighted": True}, "loss 'aot_unpaired' sorts the pairs"),
        ({"tail_weight": 1.5}, "tail_weight 1.5 must lie between 0 and 1"),
        ({"sft_weight": -1.0}, "sft_weight -1.0 must not be negative"),
        ({"policy_weighted": True, "cross_entropy": "chunked"}, "need logits"),
    ],
)
def test_values_that_cannot_be_or_would_not_be_read_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dpo(**changes)


def test_constants_of_another_objective_are_refused():
    for change in ({"z_loss": 1e-4}, {"preference": None}, {"name": "lm"}):
        with pytest.raises(ValueError, match="objective '(dpo|lm)'"):
            dataclasses.replace(dpo(), **change)


def test_sums_of_long_answers_do_not_depend_on_the_order():
    """A thousand nats, of which fp32 keeps 6e-5; the difference of two such sums is wanted to far less."""
    random = np.random.default_rng(2)
    logprob_BL, weights_B2L = -random.exponential(2.0, (2, 600)).astype(np.float32), np.ones((1, 2, 600), np.float32)
    exact = logprob_BL.astype(np.float64).sum(axis=-1)
    assert -exact.max() > 1000
    for order in (np.arange(600), random.permutation(600)):
        sums_B2, rest_B2 = _answer_sums(dpo(), jnp.asarray(logprob_BL[:, order]), {"weights": jnp.asarray(weights_B2L)})
        np.testing.assert_array_equal(sums_B2[0], np.round(logprob_BL.astype(np.float64) * 1024).sum(axis=-1) / 1024)
        np.testing.assert_allclose(np.float64(sums_B2[0]) + np.float64(rest_B2[0]), exact, rtol=0, atol=1e-6)
