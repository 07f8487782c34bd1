"""Runs that stand still, and machines that say that they will be gone: who notices, what is written, how it ends."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
from test_processes import LONG, ROOT, started, wait_for_step
from tiny_stores import tiny_store

from ctllm_jax import processes, stopping, watch
from ctllm_jax.common.status import EXIT_LOST
from ctllm_jax.stopping import Stopping, stop_on_notice
from ctllm_jax.watch import LoopWatch, WatchConfig

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
CONFIG = WatchConfig(stall_minutes=10.0, slow_minutes=30.0, stop_minutes=5.0, notices="")


class Clock:
    """Seconds as a test sets them."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        clock = types.SimpleNamespace(monotonic=lambda: self.now, strftime=time.strftime, gmtime=time.gmtime)
        monkeypatch.setattr(watch, "time", clock)
        monkeypatch.setattr(stopping, "time", clock)


class Left(Exception):
    """In place of the end of the process."""


@pytest.fixture
def clock(monkeypatch):
    def exit_lost(news):
        raise Left(news)

    monkeypatch.setattr(processes, "exit_lost", exit_lost)
    return Clock(monkeypatch)


def stacks(run_dir) -> list[str]:
    return [path.read_text() for path in sorted((run_dir / "stacks").glob("process-0-*.txt"))]


def steady(run_dir, clock, asked: Stopping | None = None) -> LoopWatch:
    """A watch over a loop that waits for the batch of step 4."""
    loop = LoopWatch(run_dir, CONFIG, asked or Stopping())
    for step in (1, 2, 3):
        loop.at("step", step)
        loop.at("input", step + 1)
    return loop


def look(loop: LoopWatch, clock: Clock, minutes: float) -> None:
    clock.now += 60 * minutes
    loop.check(clock.now)


def test_a_loop_that_stands_still_is_shown_once_and_ended_after_as_long_again(tmp_path, clock, capfd):
    loop = steady(tmp_path, clock)
    look(loop, clock, 9.9)
    assert not stacks(tmp_path)
    look(loop, clock, 0.2)
    look(loop, clock, 9.8)
    (text,) = stacks(tmp_path)
    assert text.startswith("process 0: nothing has moved for 10 min, at input of step 4\n")
    assert "in test_a_loop_that_stands_still" in text and text.count("hread 0x") >= 2  # of all threads
    (file,) = (tmp_path / "stacks").iterdir()
    said = "train: process 0: nothing has moved for 10 min, at input of step 4; stacks of all its threads in"
    assert capfd.readouterr().err == f"{said} {file}\n"
    with pytest.raises(Left, match="nothing has moved for 20 min"):
        look(loop, clock, 0.2)


def test_a_loop_that_moves_is_left_alone(tmp_path, clock):
    loop = steady(tmp_path, clock)
    for step in range(4, 30):
        look(loop, clock, 9.0)
        loop.at("step", step)
        look(loop, clock, 9.0)
        loop.at("input", step + 1)
    assert not stacks(tmp_path)
    # A stall that passes is shown, and the next one anew.
    look(loop, clock, 15)
    loop.at("step", 30)
    assert len(stacks(tmp_path)) == 1
    look(loop, clock, 9.0)
    assert len(stacks(tmp_path)) == 1


@pytest.mark.parametrize("places", [["start"], ["step"], ["step", "input", "step"], ["evaluation"], ["save"]])
def test_starting_evaluating_and_saving_have_room_of_their_own(tmp_path, clock, places):
    loop = LoopWatch(tmp_path, CONFIG, Stopping()) if len(places) > 1 or places[0] in ("start", "step") else None
    loop = loop or steady(tmp_path, clock)
    for place in places:
        loop.at(place, 1)
    look(loop, clock, 29)
    assert not stacks(tmp_path)
    look(loop, clock, 2)
    assert f"nothing has moved for 30 min, at {places[-1]}" in stacks(tmp_path)[0]
    with pytest.raises(Left, match="60 min"):
        look(loop, clock, 30)


def test_a_stop_has_a_bound_whatever_the_loop_is_at(tmp_path, clock):
    asked = Stopping()
    loop = steady(tmp_path, clock, asked)
    asked.request("a signal")
    loop.at("save", 4)
    look(loop, clock, 4.9)
    asked.request("a notice")  # changes nothing
    with pytest.raises(Left, match=r"the run was to stop \(a signal\) but has not in 5 min"):
        look(loop, clock, 0.2)
    assert "at save of step 4" in stacks(tmp_path)[0]


def test_zero_minutes_are_no_bound(tmp_path, clock):
    asked = Stopping()
    loop = LoopWatch(tmp_path, WatchConfig(0.0, 0.0, 0.0, ""), asked)
    asked.request("a signal")
    look(loop, clock, 1e6)
    loop.at("input", 9)
    look(loop, clock, 1e6)
    assert not (tmp_path / "stacks").exists()
    with pytest.raises(ValueError, match="minutes cannot be negative"):
        WatchConfig(-1.0, 0.0, 0.0, "")


def test_a_metadata_server_without_http_is_refused():
    with pytest.raises(ValueError, match="'metadata.google.internal' is not an address such as http://"):
        WatchConfig(10.0, 30.0, 5.0, "metadata.google.internal")


def test_stacks_that_cannot_be_written_go_to_standard_error(tmp_path, clock, monkeypatch, capfd):
    monkeypatch.setattr(LoopWatch, "_write_file", lambda *_: None)
    monkeypatch.setattr(watch, "_WRITE", 0.01)
    look(steady(tmp_path, clock), clock, 11)
    said = capfd.readouterr().err
    assert "could not be written, so they are here:\n" in said and "test_stacks_that_cannot_be_written" in said


@FULL
def test_a_full_disk_under_standard_error_keeps_no_run_alive(tmp_path, clock, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "__stderr__", full)
        loop = steady(tmp_path, clock)
        look(loop, clock, 11)
        assert len(stacks(tmp_path)) == 1
        with pytest.raises(Left, match="nothing has moved for 20 min"):
            look(loop, clock, 10)


EXITS = [sys.executable, "-c", "from ctllm_jax import processes; processes.exit_lost('process 1 is gone')"]


@FULL
def test_a_process_without_the_others_ends_with_its_status_under_a_full_disk_too():
    with open("/dev/full", "w") as full:
        assert subprocess.run(EXITS, cwd=ROOT, stderr=full, check=False).returncode == EXIT_LOST


def test_a_process_without_the_others_ends_though_nobody_reads_what_it_says():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    try:
        assert subprocess.run(EXITS, cwd=ROOT, stderr=writer, check=False, timeout=60).returncode == EXIT_LOST
    finally:
        os.close(reader)
        os.close(writer)


def test_a_process_that_keeps_the_others_waiting_is_named_once(tmp_path, clock, monkeypatch, capsys):
    """Of three processes only this one is here; what the others post is given: process 2 waits 30 s of each minute."""
    loop = LoopWatch(tmp_path, CONFIG, Stopping())
    for minute in range(8):
        slow = 30.0 * min(minute, 5)
        waits = {0: 0.4 * minute, 1: 0.0, 2: slow}
        words = {i: {"place": "step", "step": minute, "clock": clock.now, "waited": w} for i, w in waits.items()}
        monkeypatch.setattr(processes, "posted", lambda _, words=words: {i: json.dumps(w) for i, w in words.items()})
        loop.at("step", minute + 1)
        look(loop, clock, 1)
        said = capsys.readouterr().err
        expected = "train: process 2 waits for its input 50% of the time, the others 0% (median); all go at its pace\n"
        assert said == (expected if minute == 3 else "")


def test_time_spent_waiting_for_input_is_what_is_posted(tmp_path, clock, monkeypatch):
    words = []
    monkeypatch.setattr(processes, "post", lambda board, text: words.append(json.loads(text)))
    loop = steady(tmp_path, clock)
    clock.now += 7
    loop.at("step", 4)
    clock.now += 100
    loop.at("input", 5)
    clock.now += 5
    loop.check(clock.now)
    assert words == [{"place": "input", "step": 5, "clock": clock.now, "waited": 12.0}]


# ---- Notices


@contextlib.contextmanager
def metadata_server(answers: dict[str, str]):
    """Its address; it answers as Google's does, with what `answers` has at the moment, 503 where that is nothing."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.removeprefix("/computeMetadata/v1/instance/")
            known = self.headers.get("Metadata-Flavor") == "Google" and answers.get(key)
            self.send_response(200 if known else 503)
            self.end_headers()
            self.wfile.write((known or "").encode())
            answers["asked"] = str(int(answers.get("asked", 0)) + 1)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def until(condition) -> bool:
    return any(condition() or time.sleep(0.01) for _ in range(3000))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(stopping, "_PAUSE", 0.01)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # is not asked


def asked_again(answers: dict) -> bool:
    """Whether the server has been asked everything once more."""
    before = int(answers.get("asked", 0))
    return until(lambda: int(answers["asked"]) >= before + 4)


TERMINATE = "TERMINATE_ON_HOST_MAINTENANCE"


@pytest.mark.parametrize(("key", "value"), [("maintenance-event", TERMINATE), ("preempted", "TRUE")])
def test_a_notice_is_a_request_to_stop(quick, key, value):
    answers, asked = {"maintenance-event": "NONE", "preempted": "FALSE", "asked": "0"}, Stopping()
    with metadata_server(answers) as server, stop_on_notice(server, asked):
        assert asked_again(answers) and not asked.requested
        answers["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"  # is over by itself
        assert asked_again(answers) and not asked.requested
        answers[key] = value
        assert until(lambda: asked.requested) and asked.reason == f"a notice ({key}: {value})"


def test_a_notice_that_stands_when_a_run_begins_does_not_stop_it_again(quick):
    answers, asked = {"maintenance-event": TERMINATE, "preempted": "FALSE", "asked": "0"}, Stopping()
    with metadata_server(answers) as server, stop_on_notice(server, asked):
        assert asked_again(answers) and not asked.requested
        answers["preempted"] = "TRUE"
        assert until(lambda: asked.requested) and "preempted" in asked.reason


def test_a_server_that_does_not_answer_is_mentioned_once_and_asked_again(quick, capfd):
    answers, asked = {"preempted": "FALSE", "asked": "0"}, Stopping()
    with metadata_server(answers) as server, stop_on_notice(server, asked):
        assert asked_again(answers)
        answers["maintenance-event"] = "NONE"
        assert asked_again(answers)
        answers["preempted"] = "TRUE"
        assert until(lambda: asked.requested)
    said = capfd.readouterr().err
    assert said.count("does not answer (HTTP Error 503") == 1 and said.count("\n") == 1


def test_no_server_no_thread():
    before = threading.active_count()
    with stop_on_notice("", Stopping()):
        assert threading.active_count() == before


# ---- Real processes


HANGS = """
import sys, time
from ctllm_jax import cli, train

def batches(stream, start, stop, mesh, prefetched=train.prefetched):
    for step, batch in enumerate(prefetched(stream, start, stop, mesh), start + 1):
        if step == 8:
            stuck()
        yield batch

def stuck():
    time.sleep(1000)

train.prefetched = batches
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_job_that_one_process_holds_up_shows_the_stacks_of_all_and_ends(tmp_path):
    options = (*LONG, "--config.watch.stall_minutes=0.2")
    running = started(2, 2, tiny_store(tmp_path / "store").folder, tmp_path / "run", *options, programs={1: HANGS})
    wait_for_step(tmp_path / "run", 6)
    running[0].send_signal(signal.SIGQUIT)  # shows the stacks at once, and changes nothing
    logs = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [EXIT_LOST] * 2, "\n".join(logs)
    files = {index: sorted((tmp_path / "run" / "stacks").glob(f"process-{index}-*.txt")) for index in (0, 1)}
    assert "in stuck" in files[1][0].read_text() and "in stuck" not in files[0][0].read_text()
    assert files[0][0].read_text().startswith("process 0: nothing has moved for 0.2 min, at step of step 8\n")
    assert "process 1 said last: at input of step 8\n" in files[1][0].read_text()
    for index, log in enumerate(logs):
        assert f"nothing has moved for 0.2 min, at {('step', 'input')[index]} of step 8; stacks of all" in log
        assert f"{files[index][0]}\n" in log
    assert any("ctllm: error: nothing has moved for 0.4 min; process" in log for log in logs)
    assert "Current thread" in logs[0] or "Thread 0x" in logs[0]


SAVES_FOR_EVER = """
import sys, time
from ctllm_jax import cli
from ctllm_jax.checkpoint import Checkpoints

Checkpoints.save = lambda *_, **__: time.sleep(1000)
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_stopped_run_whose_save_hangs_ends_within_its_bound(tmp_path):
    options = (*LONG, "--config.watch.stop_minutes=0.1")
    store = tiny_store(tmp_path / "store").folder
    (running,) = started(1, 2, store, tmp_path / "run", *options, programs={0: SAVES_FOR_EVER})
    wait_for_step(tmp_path / "run", 3)
    running.send_signal(signal.SIGTERM)
    since = time.monotonic()
    _, log = running.communicate(timeout=240)
    assert running.returncode == EXIT_LOST and time.monotonic() - since < 60, log
    assert "the run was to stop (a signal) but has not in 0.1 min; process 0 ends" in log
    assert "in save" in next((tmp_path / "run" / "stacks").iterdir()).read_text() or "at save of step" in log


def test_a_signal_that_arrives_twice_at_once_is_one_and_a_later_one_ends_it():
    program = (
        "import time; from ctllm_jax.stopping import stop_on_signal\n"
        "with stop_on_signal() as stopping:\n    print('ready', flush=True)\n"
        "    while not stopping.requested: time.sleep(0.01)\n    print('asked', flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        time.sleep(0.2)
        process.terminate()  # what stood before it has passed it on
        assert process.stdout.readline() == "asked\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM
