"""What a run says of itself: every figure is defined, none costs it anything or changes it, and a kill loses none."""

import dataclasses
import io
import json
import os
import pathlib
import signal
import struct
import sys
import types

import jax
import numpy as np
import pytest
from test_report import told
from tiny_models import tiny_config
from tiny_runs import assert_same_run, at_step, compiled_once, config_of  # noqa: F401 (a fixture applies here too)
from tiny_stores import tiny_store

from ctllm_jax import train
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.progress import Progress
from ctllm_jax.data.store import open_store
from ctllm_jax.hardware import CHIPS
from ctllm_jax.metrics import LogConfig, MetricsLog, definitions, goodput, meter, profile, read_metrics
from ctllm_jax.model import flops_per_token
from ctllm_jax.sharding import MeshConfig, make_mesh

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLAIN = LogConfig(every=1, tensorboard=False, wandb=None, profile=())


# ---- A run that everything looks at


class FakeRun:
    """Stands in for a run of Weights & Biases."""

    def __init__(self):
        self.axes, self.lines, self.finished = [], [], False

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, values):
        self.lines.append(values)

    def finish(self):
        self.finished = True


class FakeWandb(types.ModuleType):
    """Stands in for the library, which is not among the test's: what it was asked for, and what it got."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.run = [], FakeRun()

    def init(self, **options):
        self.calls.append(options)
        return self.run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("stores") / "store").folder


@pytest.fixture(scope="module")
def plain(store, tmp_path_factory):
    """A run that only writes metrics.jsonl."""
    workdir = tmp_path_factory.mktemp("runs") / "plain"
    train.run(config_of(store), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def watched(store, tmp_path_factory):
    """(run directory, fake library) of the same run with every tracker, a profile by config and one by signal."""
    workdir, wandb = tmp_path_factory.mktemp("runs") / "watched", FakeWandb()
    asks = at_step(8, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        patch.setattr(train, "prefetched", asks)
        patch.setattr(profile, "_ON_SIGNAL", 2)
        before = signal.getsignal(signal.SIGUSR1)
        config = config_of(store, log__tensorboard=True, log__wandb="a project", log__profile=[3, 4])
        train.run(config, str(workdir))
        assert signal.getsignal(signal.SIGUSR1) is before
    return workdir, wandb


def lines_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_trackers_and_profiles_leave_no_trace_in_the_result(plain, watched):
    assert_same_run(watched[0], plain)


def test_whatever_is_logged_is_defined(watched):
    logged = {(entry["kind"], key) for entry in lines_of(watched[0]) for key in entry}
    assert {kind for kind, _ in logged} == set(definitions.KINDS)
    assert not [found for found in logged if definitions.find(*found) is None]
    assert definitions.find("train", "evaluation_seconds") is definitions.find("eval", "nosuch") is None
    names = [metric.name for metric in definitions.METRICS]
    assert len(set(names)) == len(names)
    assert all(metric.unit and metric.meaning for metric in definitions.METRICS)
    assert not [metric for metric in definitions.METRICS if not (ROOT / "ctllm_jax" / metric.origin).is_file()]


def test_the_table_in_the_docs_is_the_one_of_the_definitions():
    renew = "python -m ctllm_jax.metrics.definitions > docs/metrics.md"
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == definitions.document(), renew


def events(folder: pathlib.Path) -> list:
    """The records of TensorBoard event files, in the order of the files' names."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_tensorboard_and_wandb_get_every_line(watched):
    workdir, wandb = watched
    logged = lines_of(workdir)[1:]  # the first one is written before there is a tracker
    version, start, *rest = events(workdir / "tensorboard")
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (start.session_log.START, 1)
    assert [event.step for event in rest] == [entry["step"] for entry in logged]
    assert [event.wall_time for event in rest] == [entry["time"] for entry in logged]
    for entry, event, line in zip(logged, rest, wandb.run.lines, strict=True):
        values = {f"{entry['kind']}/{k}": v for k, v in entry.items() if k not in ("kind", "step", "time")}
        for name in [name for name, value in values.items() if isinstance(value, list)]:
            values |= {f"{name}/{layer:02d}": value for layer, value in enumerate(values.pop(name))}
        assert {value.tag: value.simple_value for value in event.summary.value} == pytest.approx(values)
        assert line == {"step": entry["step"], **values}
    (asked,) = wandb.calls
    assert (asked["project"], asked["name"], asked["resume"]) == ("a project", "watched", "allow")
    assert asked["config"]["optimizer"]["learning_rate"] == 2e-2
    assert ("*", "step") in wandb.run.axes and wandb.run.finished


def test_profiles_of_the_configs_steps_and_of_those_after_a_signal(watched):
    folders = sorted(path.name for path in (watched[0] / "profile").iterdir())
    assert folders == ["step-3", "step-8"]
    for folder in folders:
        (trace,) = (watched[0] / "profile" / folder).rglob("*.xplane.pb")
        assert trace.stat().st_size > 1000
    assert read_metrics(watched[0], "job")[-1]["seconds/profile"] > 0
    slow = {entry["step"] for entry in read_metrics(watched[0], "train") if "step_ms" not in entry}
    # The first step only sets the clock, and so does the one after a profile's start or end, an evaluation or a save.
    assert slow == {1, 3, 5, 6, 8, 9, 10, 11}


def test_the_timesheet_is_told_after_every_save_and_adds_up_to_the_time_that_has_passed(plain):
    lines = read_metrics(plain, "job")  # some more where a minute passes
    saves = [line for line in lines if "checkpoint_seconds" in line]
    assert lines[0]["step"] == 0 and [line["step"] for line in saves] == [5, 10, 12]
    for line in lines:
        seconds = {name: line[f"seconds/{name}"] for name in goodput.ACCOUNTS}
        assert seconds["lost"] == seconds["down"] == 0 and line["starts"] == 1
        assert line["goodput"] == pytest.approx(seconds["steps"] / sum(seconds.values()), abs=1e-3)
    first, *_, last = lines
    passed = sum(last[f"seconds/{name}"] - first[f"seconds/{name}"] for name in goodput.ACCOUNTS)
    assert passed == pytest.approx(last["time"] - first["time"], abs=0.5)
    evaluations = sum(entry.get("evaluation_seconds", 0.0) for entry in read_metrics(plain, "eval"))
    assert last["seconds/evaluation"] == pytest.approx(evaluations, abs=0.01)
    assert last["seconds/checkpoint"] == pytest.approx(sum(save["checkpoint_seconds"] for save in saves), abs=0.01)


# ---- Goodput across restarts


FIRST = [
    told(0, 1000, start=10),
    told(4, 1050, kind="train"),
    told(5, 1060, start=30, steps=38, checkpoint=2),
    told(10, 1110, start=30, steps=80, evaluation=6, checkpoint=4),
    told(12, 1130, kind="train"),
]  # then it was killed


@pytest.mark.parametrize(
    ("lines", "step", "expected"),
    [
        (FIRST, 10, {"start": 30, "steps": 80, "evaluation": 6, "checkpoint": 4, "lost": 20, "down": 70}),
        # Its newest checkpoint is damaged: what came after the one before was for nothing.
        (FIRST, 5, {"start": 30, "steps": 38, "checkpoint": 2, "lost": 20 + 42 + 6 + 2, "down": 70}),
        (FIRST, 0, {"start": 30, "lost": 20 + 80 + 6 + 4, "down": 70}),
        # Stopped and saved: nothing is lost.
        (FIRST[:-1], 10, {"start": 30, "steps": 80, "evaluation": 6, "checkpoint": 4, "down": 90}),
        # Killed again, before another checkpoint; down time and earlier losses stay.
        (
            [*FIRST[:4], told(10, 1160, 2, start=33, steps=80, evaluation=6, checkpoint=4, lost=20, down=27)],
            5,
            {"start": 33, "steps": 38, "checkpoint": 2, "lost": 20 + 42 + 6 + 2, "down": 67},
        ),
    ],
)
def test_a_process_that_takes_up_knows_what_was_lost_and_what_was_down_time(lines, step, expected):
    taken = goodput.take_up(lines, step, started=1200.0)
    assert taken.seconds == dict.fromkeys(goodput.ACCOUNTS, 0.0) | expected
    assert sum(taken.seconds.values()) == pytest.approx(1200 - 1000 + FIRST[0]["seconds/start"])
    assert taken.starts == lines[-1].get("starts", 1) + 1


def test_the_log_of_a_run_that_goes_on_tells_its_timesheet_and_drops_later_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in FIRST) + '{"kind": "tr')
    log = MetricsLog(tmp_path, 5, started=FIRST[-1]["time"] + 70)
    log.close()
    *kept, start = lines_of(tmp_path)
    assert kept == FIRST[:3]
    assert (start["kind"], start["step"], start["starts"]) == ("job", 5, 2)
    assert start["seconds/lost"] == 70 and start["seconds/down"] == 70
    assert start["goodput"] == pytest.approx(38 / sum(start[f"seconds/{name}"] for name in goodput.ACCOUNTS))


def test_a_timesheet_spends_time_on_one_thing_at_a_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(goodput.time, "time", lambda: 5000.0)
    own = goodput.Timesheet({"steps": 7.0}, 1, started=4990.0)
    now[0] += 5
    assert own.switch("steps") == 15 and not own.due()
    now[0] += 61
    assert own.due() and own.entry()["seconds/steps"] == 68 and not own.due()
    now[0] += 2
    assert own.switch("evaluation") == 2
    now[0] += 3
    entry = own.entry()
    assert (entry["seconds/start"], entry["seconds/steps"], entry["seconds/evaluation"]) == (15, 70, 3)
    assert entry["goodput"] == 70 / 88


# ---- The meter


def metered(
    tmp_path, store, monkeypatch, chip: str | None, first: int = 0, seconds: float = 0.1, rows: int = 8
) -> tuple[list[dict], str]:
    """(lines, progress) of eight made-up steps after `first`; 30 % of their time their batches are waited for."""
    now = [0.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(meter, "chip_of", lambda device: CHIPS.get(chip))
    config, opened, stream = dataclasses.replace(PLAIN, every=4), open_store(store), io.StringIO()
    log = MetricsLog(tmp_path, 0)
    own = meter.Meter(log, config, ["en", "zh"], {"en": 0, "zh": 0})
    own.measure(tiny_config(max_length=32), opened, rows, make_mesh(MeshConfig(1, -1, 1, 1)))

    def batches():
        for number in range(8):
            now[0] += 0.3 * seconds
            yield number

    with Progress("train lm", 598_278, "steps", stream) as progress:
        for step, _ in own.steps(batches(), first, progress):
            now[0] += 0.7 * seconds
            sums = {"count": 10.0, "loss": 10.0 * (step - first), "tokens": 30.0, "grad_norm": 3.0, "skipped": 1}
            sums |= {"source_loss": [0.0, 5.0], "source_tokens": [0.0, 10.0], "layers/grad_norm": [1.0, 1 / 3]}
            own.dispatched(step, {name: jax.numpy.asarray(value) for name, value in sums.items()})
        now[0] += seconds
        own.pause("checkpoint")
        assert own.ledger == {"en": 0, "zh": 80}
    log.close()
    return [line for line in lines_of(tmp_path) if line["kind"] == "train"], stream.getvalue()


def test_sums_become_means_and_layers_lists_and_speeds_are_of_finished_steps(tmp_path, store, monkeypatch):
    lines, _ = metered(tmp_path, store, monkeypatch, None)
    assert [line["step"] for line in lines] == [1, 4, 8]
    last = lines[-1]
    assert (last["count"], last["loss"], last["tokens"], last["grad_norm"], last["skipped"]) == (10, 8, 3, 3, 1)
    assert last["loss/zh"] == 0.5 and "loss/en" not in last
    assert last["layers/grad_norm"] == [1.0, 0.33333]
    assert "step_ms" not in lines[0]
    # Finished steps are read when the next one has been dispatched; the last one is not followed by any.
    assert lines[1]["step_ms"] == pytest.approx(100) and lines[1]["input_wait_ms"] == pytest.approx(30)
    assert lines[1]["tokens_per_second"] == pytest.approx(8 * 32 / 0.1)
    assert 0.01 < last["host_memory_gib"] < 100
    assert not last.keys() & {"mfu_causal", "mfu_full", "device_memory_peak_gib"}  # nobody knows them of a CPU


def skipping(tmp_path, steps: list[tuple[int, float]], patience: float, first: int = 1) -> None:
    """A meter is told of steps: how many have been skipped by then, and the gradient's norm."""
    own = meter.Meter(MetricsLog(tmp_path, 0), PLAIN, [], {}, patience)
    for step, _ in own.steps(iter(steps), first - 1, Progress("train", None, "steps", io.StringIO())):
        skipped, norm = steps[step - first]
        values = {"count": 1.0, "loss": 1.0, "skipped": skipped, "grad_norm": norm}
        own.dispatched(step, {name: np.asarray(value) for name, value in values.items()})
    own.pause("checkpoint")


def test_a_step_that_is_skipped_is_said_once_in_a_row(tmp_path, capsys):
    skipping(tmp_path, [(0, 1.0), (1, 30.0), (1, 1.0), (2, np.nan), (3, np.inf), (3, 1.0), (4, np.nan)], 2)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "train: step 2 changed nothing: its gradient is a spike (norm 30)",
        "train: step 4 changed nothing: its gradient is not finite",
        "train: step 7 changed nothing: its gradient is not finite",
    ]


def test_a_run_that_is_taken_up_does_not_take_earlier_skips_for_its_own(tmp_path, capsys):
    skipping(tmp_path, [(1, 1.0), (1, 1.0)], 0, first=5)
    assert "changed nothing" not in capsys.readouterr().err
    with pytest.raises(UserError, match="the last 1 steps, up to 5, changed nothing: the gradient is not finite"):
        skipping(tmp_path, [(2, np.nan), (2, 1.0)], 0, first=5)


def test_a_run_whose_gradients_stay_nan_ends_and_says_why(tmp_path):
    with pytest.raises(UserError, match="the last 3 steps, up to 4, changed nothing.*ctllm trace --step=4"):
        skipping(tmp_path, [(0, 1.0), (1, np.nan), (2, np.nan), (3, np.nan), (4, np.nan)], 2)


def test_mfu_is_flops_over_the_peak_of_all_devices(tmp_path, store, monkeypatch):
    lines, _ = metered(tmp_path, store, monkeypatch, "v5e")
    model, peak = tiny_config(max_length=32), 8 * CHIPS["v5e"].peak_flops
    for name, causal in (("mfu_causal", True), ("mfu_full", False)):
        assert lines[1][name] == pytest.approx(flops_per_token(model, 32, causal) * 2560 / peak)


def test_memory_is_that_of_the_fullest_device(tmp_path, store):
    own = meter.Meter(MetricsLog(tmp_path, 0), PLAIN, [], {})
    full = [types.SimpleNamespace(memory_stats=lambda i=i: {"peak_bytes_in_use": i << 29}) for i in (1, 3, 2)]
    own._devices = full
    assert own._memory()["device_memory_peak_gib"] == 1.5


def test_the_progress_line_says_what_a_person_wants_to_know_in_a_hundred_columns(tmp_path, store, monkeypatch):
    _, shown = metered(tmp_path, store, monkeypatch, "v5e", first=100_000, seconds=10, rows=500_000)
    line = shown.splitlines()[-2]  # the last one tells how long it all took
    smooth = np.average(np.arange(1, 9), weights=0.98 ** np.arange(7, -1, -1))
    assert line.startswith("train lm: 100,008/598,278 steps  ") and " left  " in line
    assert line.endswith(f"  loss 8.000 ({smooth:.3f})  1.6M tok/s  MFU 0%")
    assert all(len(line) < 100 for line in shown.splitlines())
