"""Small training runs: their config, ways to cut them short, and what two of them are compared by."""

import os
import pathlib
import signal
import time

import jax
import numpy as np
import pytest
from tiny_stores import tiny_store, train_values

from ctllm_jax import train
from ctllm_jax.common.config import build
from ctllm_jax.common.files import read_json
from ctllm_jax.loading import load_stored
from ctllm_jax.metrics import read_metrics
from ctllm_jax.metrics.definitions import METRICS
from ctllm_jax.train_config import TrainConfig

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 12
TIMINGS = {metric.name for metric in METRICS if metric.timing}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of all modules that use this, in processes of their own too, share what XLA compiled."""
    base = tmp_path_factory.getbasetemp()
    folder = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)


def config_of(store, **changes) -> TrainConfig:
    """A run of 12 steps over 8 devices; a key may reach into a group, as in `data__rates`."""
    values = train_values(store)
    for key, value in changes.items():
        *groups, name = key.split("__")
        target = values
        for group in groups:
            target = target[group]
        assert name in target
        target[name] = value
    return build(TrainConfig, values)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return {kind: tiny_store(folder / kind, kind).folder for kind in ("pretrain", "chat", "preference")}


@pytest.fixture(scope="module")
def finished(stores, tmp_path_factory):
    """(run directory, result) of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, train.run(config_of(stores["pretrain"]), str(workdir))


def at_step(number: int, act, prefetched=train.prefetched):
    """A stand-in for `prefetched` that acts before the batch of a step (counted from 1) is handed over."""

    def batches(stream, start, stop, mesh):
        for step, batch in enumerate(prefetched(stream, start, stop, mesh), start + 1):
            if step == number:
                act()
            yield batch

    return batches


def entries(workdir, *kinds) -> list[dict]:
    """Lines of metrics.jsonl without timings."""
    found = [entry for kind in kinds or ("train", "eval") for entry in read_metrics(workdir, kind)]
    return [{name: value for name, value in entry.items() if name not in TIMINGS} for entry in found]


def assert_close_entries(workdir, other, rtol: float) -> None:
    """The same lines, their counts exactly, everything else within a tolerance."""
    for ours, theirs in zip(entries(workdir), entries(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if name in ("kind", "step", "count", "skipped"):
                assert ours[name] == value, name
            else:
                np.testing.assert_allclose(ours[name], value, rtol=rtol, atol=1e-6, err_msg=f"{name} of {theirs}")


def params_of(workdir):
    return load_stored(str(workdir)).params


def assert_same_run(workdir, other):
    jax.tree.map(np.testing.assert_array_equal, params_of(workdir), params_of(other))
    assert entries(workdir) == entries(other)
    assert read_json(workdir / "manifest.json")["result"] == read_json(other / "manifest.json")["result"]


# ---- Cut short


def killed_run(store: str, workdir: str, **changes) -> None:
    """Trains and dies without warning in step 8, after the checkpoint of step 5 is committed."""

    def die():
        while not pathlib.Path(workdir, "checkpoints", "5").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    train.prefetched = at_step(8, die)
    train.run(config_of(store, **changes), workdir)


def stopped(monkeypatch, step: int, config: TrainConfig, workdir) -> None:
    """A run that gets SIGTERM at the start of a step."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(train, "prefetched", at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit) as stop:
            train.run(config, str(workdir))
    assert stop.value.code == train.EXIT_RESUME == 75
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
