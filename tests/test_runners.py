"""`ctllm corpus` on job services with external workers: the local runner's bytes, also after a worker was killed."""

import ast
import contextlib
import os
import pathlib
import resource
import signal
import socket
import sys
import threading
import time

import pytest
from apache_beam import Create, FlatMap, Map, Reshuffle
from apache_beam.testing.util import assert_that, equal_to
from clusters import beam
from test_corpus import config, contents, make_inputs

from ctllm_jax.common.errors import UserError
from data_pipeline import corpus
from data_pipeline.records import entries
from data_pipeline.runner import BeamConfig, make_pipeline, make_runner

EXTERNAL = "--environment_type=EXTERNAL"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def local(inputs, tmp_path_factory):
    """A corpus by the local runner."""
    workdir = tmp_path_factory.mktemp("local") / "corpus"
    corpus.run(config(inputs), str(workdir))
    return workdir


def on(kind, inputs, workdir, folder):
    """Builds the corpus on a job service."""
    try:
        with beam.running(kind, folder) as found:
            options = list(ast.literal_eval(found["BEAM_OPTIONS"]))
            corpus.run(config(inputs, beam={"runner": found["BEAM_RUNNER"], "options": options}), str(workdir))
    except beam.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["service", "prism", "flink"])
def test_every_job_service_writes_the_bytes_of_the_local_runner(local, inputs, tmp_path, kind):
    on(kind, inputs, tmp_path / "corpus", tmp_path / kind)
    assert contents(tmp_path / "corpus") == contents(local)


def workers(pool: pathlib.Path) -> list[int]:
    """Processes that a pool has started: they write to its log."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"SdkHarness(" in (process / "cmdline").read_bytes() and (process / "fd" / "2").readlink() == pool:
                found.append(int(process.name))
    return found


@pytest.mark.slow
def test_a_killed_worker_fails_the_run_and_the_next_one_ends_in_the_same_bytes(local, inputs, tmp_path):
    """Prism starts no lost worker again: the verb ends with an error, and the same command goes on. (Beam's Python
    service waits for ever.)"""
    workdir, killed = tmp_path / "corpus", []

    def kill():
        while not killed:
            if list(workdir.glob("work/filtered/*.json")) and (found := workers(tmp_path / "first" / "pool.log")):
                os.kill(found[0], signal.SIGKILL)
                killed.append(found[0])
            time.sleep(0.01)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(RuntimeError, match="SDK worker disconnected"):
        on("prism", inputs, workdir, tmp_path / "first")
    assert killed and not (workdir / "manifest.json").exists()
    on("prism", inputs, workdir, tmp_path / "second")
    assert contents(workdir) == contents(local)


class Slow:
    """An element that takes longer to write than Beam's workers in threads would wait before they send."""

    def __reduce__(self):
        time.sleep(1.2)
        return (Slow, ())


def test_an_element_that_takes_long_to_write_arrives_whole():
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    enough = pages * resource.getpagesize() + (8 << 30)  # or a count that is none takes all memory
    resource.setrlimit(resource.RLIMIT_AS, (enough, limits[1]))
    try:
        options = ("--direct_running_mode=multi_threading", "--direct_num_workers=2")
        with make_pipeline(BeamConfig("local", options)) as pipeline:
            arrived = pipeline | Create([None]) | Map(lambda _: Slow()) | Reshuffle() | "Type" >> Map(type)
            assert_that(arrived, equal_to([Slow]))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("mode", ["in_memory", "multi_processing"])
def test_what_the_user_can_mend_is_said_as_a_worker_raised_it(tmp_path, mode, caplog):
    (tmp_path / "a.json").write_text("[1,")
    with pytest.raises(UserError) as here:
        list(entries(str(tmp_path / "a.json")))
    options = (f"--direct_running_mode={mode}", "--direct_num_workers=2")
    with pytest.raises(UserError) as elsewhere:
        with make_pipeline(BeamConfig("local", options)) as pipeline:
            _ = pipeline | Create([str(tmp_path / "a.json")]) | FlatMap(entries)
    assert str(elsewhere.value) == str(here.value) and elsewhere.value.__suppress_context__
    assert mode != "in_memory" or "Traceback" not in caplog.text


def test_a_job_service_that_is_not_there_is_said_at_once():
    with socket.socket() as taken:  # bound and not listening: refused
        taken.bind(("127.0.0.1", 0))
        options = (f"--job_endpoint=localhost:{taken.getsockname()[1]}", EXTERNAL)
        with pytest.raises(UserError, match=r"no Beam job service answers at --job_endpoint=localhost:\d+ \(unavail"):
            make_runner(BeamConfig("PortableRunner", options))


def test_what_listens_and_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr("data_pipeline.runner._SECONDS_TO_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        options = (f"--job_endpoint=127.0.0.1:{mute.getsockname()[1]}", EXTERNAL)
        for runner in ("PortableRunner", "FlinkRunner", "PrismRunner", "SparkRunner"):
            with pytest.raises(UserError, match="no Beam job service answers"):
                make_runner(BeamConfig(runner, options))


@pytest.mark.parametrize(
    ("runner", "options", "message"),
    [
        ("PortableRunner", (EXTERNAL,), "--job_endpoint"),
        ("PortableRunner", ("--job_endpoint=localhost:1",), "--environment_type"),
        ("PrismRunner", (), "--prism_location"),
    ],
)
def test_options_that_a_runner_cannot_do_without_are_named(runner, options, message):
    with pytest.raises(UserError, match=message):
        make_runner(BeamConfig(runner, options))


def test_dataflow_without_its_libraries_is_refused_before_it_waits_for_a_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "apitools", None)  # as where the extra is not installed
    for name in ("DataflowRunner", "apache_beam.runners.dataflow.DataflowRunner"):
        with pytest.raises(UserError, match=r"pip install -c requirements.lock 'ctllm-jax\[data,dataflow\]'"):
            make_runner(BeamConfig(name))
