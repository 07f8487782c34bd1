"""Barriers of a save: two processes, here threads, over a coordination service that is a dictionary."""

import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from fake_gcs import serving, settings

from ctllm_jax import processes
from ctllm_jax.save_barrier import SaveBarrier

ROOT = pathlib.Path(__file__).resolve().parent.parent

COMMIT, END = "after-0_async_write_complete.5", "after-0_ThreadSaveMultiHostValueHolder:set_value_start"


class Service:
    """The calls of JAX's client that a barrier makes."""

    def __init__(self):
        self.values, self._lock = {}, threading.Lock()

    def key_value_increment(self, key, amount):
        with self._lock:
            self.values[key] = self.values.get(key, 0) + amount
            return self.values[key]

    def key_value_try_get(self, key):
        return str(self.values[key])

    def key_value_dir_get(self, prefix):
        with self._lock:
            return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def key_value_set(self, key, value, allow_overwrite=False):
        with self._lock:
            self.values[key] = value

    def key_value_delete(self, key):
        with self._lock:
            del self.values[key]


@pytest.fixture
def pair(monkeypatch):
    """(the service, one barrier for each of two processes, what runs something in the background)"""
    service = Service()
    monkeypatch.setattr(processes, "client", lambda: service)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with ThreadPoolExecutor(4) as pool:
        yield service, SaveBarrier("after-0"), SaveBarrier("after-0"), pool.submit


def after_an_error(barrier: SaveBarrier, key: str) -> None:
    """As Orbax ends a save whose writing failed."""
    try:
        raise OSError("full")
    finally:
        barrier(key=key, timeout_ms=20_000)


def test_each_waits_for_the_other_and_the_same_key_may_come_again(pair):
    service, one, two, start = pair
    for _ in range(20):
        first = start(one, key=COMMIT, timeout_ms=20_000)
        time.sleep(0.01)
        assert not first.done()
        start(two, key=COMMIT, timeout_ms=20_000).result()
        first.result()
    assert not service.values  # a month of saves leaves nothing behind


def test_who_waits_for_a_commit_learns_at_once_that_the_other_has_failed_and_both_end_the_save(pair):
    _, one, two, start = pair
    waiting = start(one, key=COMMIT, timeout_ms=20_000)
    failing = start(after_an_error, two, END)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="another process could not write its part, and says why"):
        waiting.result()
    assert time.monotonic() - began < 5
    ending = start(after_an_error, one, END)
    for end in (failing, ending):
        with pytest.raises(OSError, match="full"):  # the barrier let both pass
            end.result()


def test_nobody_waits_for_one_that_is_absent_even_at_the_end(pair):
    _, one, two, start = pair
    two.absent()
    for key in (COMMIT, END):
        with pytest.raises(RuntimeError, match="another process could not write its part"):
            start(one, key=key, timeout_ms=20_000).result()


def test_an_error_around_the_main_thread_is_none_of_the_save(pair):
    _, one, two, start = pair
    waiting = start(one, key=END, timeout_ms=20_000)
    try:
        raise ValueError("of the caller")
    except ValueError:
        two(key=END, timeout_ms=20_000)
    waiting.result()
    both = [start(barrier, key=COMMIT, timeout_ms=20_000) for barrier in (one, two)]
    assert [end.result() for end in both] == [None, None]


def test_who_does_not_come_is_waited_for_no_longer_than_asked(pair):
    _, one, _, _ = pair
    with pytest.raises(TimeoutError, match="not all processes came to"):
        one(key=COMMIT, timeout_ms=100)


SAVES = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ctllm_jax import checkpoint, processes

checkpoint.PAUSES = (0,) * 4
with processes.job():
    spread = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    moved = jax.jit(lambda x: x + jnp.sum(x), out_shardings=spread)  # a collective, as a step has them
    x = jax.make_array_from_callback((8,), spread, lambda index: np.arange(8.0, dtype=np.float32)[index])
    policy = checkpoint.CheckpointConfig(every=1, minutes=0, kept=9, keep_every=0, keep_best=0)
    checkpoints = checkpoint.Checkpoints(sys.argv[1], policy, ask_every=1)
    for step in (1, 2, 3):
        x = moved(x)
        checkpoints.save(step, {"x": x}, {"y": x}, {"step": step}, wait=True)
    checkpoints.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["prefix=run/checkpoints/2/", "name=run/checkpoints/2/record/metadata"])
def test_a_storage_that_refuses_one_of_two_a_look_fails_the_save_of_both_and_is_got_over(tmp_path, first):
    """Refused are the look for a step that is to be written, or its record; then what the next attempt begins with."""
    (tmp_path / "bucket").mkdir()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    with serving(tmp_path) as server:
        server.refusals += [first, "prefix=run/checkpoints/&"]
        variables = {**os.environ, **settings(server), "JAX_NUM_CPU_DEVICES": "2"}
        variables |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        running = [
            subprocess.Popen(
                [sys.executable, "-c", SAVES, "gs://bucket/run"],
                cwd=ROOT,
                env={**variables, "JAX_PROCESS_ID": index},
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in "01"
        ]
        try:
            logs = [process.communicate(timeout=120)[1] for process in running]
        finally:
            for process in running:
                process.kill()
        assert not server.refusals
    assert [process.returncode for process in running] == [0, 0], "\n".join(logs)
    said = "the checkpoint of step 2 could not be written ("
    assert all(log.count(said) == 2 and "attempt 2 in 0 s" in log and "attempt 3 in 0 s" in log for log in logs)
    assert "Forbidden" in "".join(logs)
    steps = (tmp_path / "bucket" / "run" / "checkpoints").iterdir()
    assert {path.name: (path / "commit_success.txt").exists() for path in steps} == {"1": True, "2": True, "3": True}
