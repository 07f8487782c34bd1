"""Work spread over eight devices: all are used, nothing is lost to an error, and each gives the bits that one gives."""

import threading

import jax
import numpy as np
import pytest
from test_evaluate import store_of_text
from tiny_models import tiny_model

from ctllm_jax.evaluate.devices import on_each_device, spread
from ctllm_jax.evaluate.engine import Request, score_groups
from ctllm_jax.evaluate.perplexity import PerplexityConfig, perplexity
from ctllm_jax.generate import generate

DEVICES = 8


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def models(model):
    return on_each_device(model)


def device_of(model) -> jax.Device:
    """Where a model's parameters lie, all of them."""
    [device] = {device for leaf in jax.tree.leaves(model.params) for device in leaf.devices()}
    return device


def test_every_device_works_at_the_same_time(models):
    meeting = threading.Barrier(DEVICES, timeout=60)

    def work(model, job):
        meeting.wait()
        return job, device_of(model)

    found = list(spread(models, work, range(2 * DEVICES)))
    assert sorted(job for job, _ in found) == list(range(2 * DEVICES))
    assert {device for _, device in found} == set(jax.local_devices()) and len(jax.local_devices()) == DEVICES


def test_a_single_device_works_through_the_jobs_in_the_callers_thread(model):
    found = list(spread([model], lambda model, job: (job, model, threading.current_thread()), range(3)))
    assert found == [(job, model, threading.main_thread()) for job in range(3)]


def test_an_error_ends_the_jobs_at_hand_well_and_begins_no_other(models):
    begun, ended, failed = [], [], threading.Event()

    def work(model, job):
        begun.append(job)
        if job == 1:
            failed.set()
            raise KeyboardInterrupt
        assert failed.wait(60)
        ended.append(job)

    with pytest.raises(KeyboardInterrupt):
        for _ in spread(models[:2], work, range(100)):
            pass
    assert sorted(begun) == sorted([1, *ended]) and 0 in ended and len(begun) < 100


@pytest.mark.slow  # every device compiles all of it
def test_scores_texts_and_perplexity_are_those_of_one_device_to_the_last_bit(model, models, tmp_path):
    """Options that share a beginning, continuations and rows of a store, all of them on each device."""
    random = np.random.default_rng(0)
    ids = lambda n: random.integers(4, 370, n).tolist()  # noqa: E731
    common = ids(30)
    groups = [[Request([*common, *ids(4), *ids(n)], 34, 0) for n in (1, 1, 3)] for _ in range(3)]
    prompts = [ids(n) for n in (3, 12, 20)]
    meeting = threading.Barrier(DEVICES, timeout=600)

    def work(model, alone):
        scores = score_groups(model, groups, 128, "test")
        texts = generate(model, prompts, stop_ids=[5], max_tokens=8)
        if not alone:
            meeting.wait()  # no device takes another's job
        return device_of(model), scores, texts

    [(_, *expected)] = spread([model], work, [True])
    found = list(spread(models, work, [False] * DEVICES))
    assert {device for device, *_ in found} == set(jax.local_devices())
    for _, *own in found:
        assert own == expected

    store = store_of_text(tmp_path, model.tokenizer)
    config = PerplexityConfig(store=str(tmp_path), split="validation", rows=100, baseline_rows=100)
    assert perplexity(models, store, config, 48) == perplexity([model], store, config, 48)
