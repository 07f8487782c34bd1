"""Progress lines."""

import io

import pytest

from ctllm_jax.common import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_progress_shows_total_rate_time_left_and_a_remark(clock):
    stream = io.StringIO()
    with progress.Progress("train", 2000, "steps", stream) as shown:
        shown.at(1)
        clock[0] += 20
        shown.at(1001, "loss 2.5")
    first, last = stream.getvalue().splitlines()
    assert first == "train: 1,001/2,000 steps  50/s  0:19 left  loss 2.5"
    assert last == "train: 1,001/2,000 steps  50/s  20.0 s  loss 2.5"


def test_the_rate_leaves_out_what_was_done_before_and_the_time_until_the_first_report(clock):
    stream = io.StringIO()
    with progress.Progress("train", None, "steps", stream) as shown:
        clock[0] += 60
        shown.at(5000)
        clock[0] += 10
        shown.at(5020)
    assert stream.getvalue().splitlines()[-1] == "train: 5,020 steps  2/s  70.0 s"


def test_amounts_are_added_up_and_a_log_gets_a_line_now_and_then(clock):
    stream = io.StringIO()
    with progress.Progress("read", None, "documents", stream) as shown:
        for _ in range(100):
            clock[0] += 1
            shown.add(3)
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "read: 300 documents  3/s  100.0 s" and len(lines) == 11


def test_a_watch_shows_what_others_have_done(capsys):
    with progress.Watch("tokenize", 4, "shards", lambda: 4, every=0.001):
        pass
    assert "tokenize: 4/4 shards" in capsys.readouterr().err
