"""Judges that are slow, rude, down or mad delay the marks; they never change, lose or pay for them twice."""

import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from rude_judge import Judge, free_port, mark, serve
from tiny_models import write_jsonl

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json, read_jsonl
from ctllm_jax.evaluate.judged import client, prompts
from ctllm_jax.evaluate.judged.client import JudgeConfig
from ctllm_jax.evaluate.judged.collect import BudgetConfig, CallConfig
from ctllm_jax.evaluate.judged.run import JudgingConfig, run

ROOT = pathlib.Path(__file__).resolve().parent.parent
CALLS = {"at_once": 4, "timeout_seconds": 0.6, "attempts": 6, "first_wait_seconds": 0.02, "longest_wait_seconds": 5.0}
TRANSIENT = (
    *("error", "busy", "busy_until", "busy_nonsense", "reset", "hang", "drip", "cut", "no_http", "html"),
    *("broken_bytes", "no_choices", "another_shape", "no_content", "deep", "huge"),
)


def answer_rows(count: int = 8, text: str = "答案") -> list[dict]:
    return [
        {"id": f"q{i}", "category": "甲乙"[i % 2], "turns": ["一问", "二问"], "answers": [text * (i + 1), text * 3]}
        for i in range(count)
    ]


@pytest.fixture
def answers(tmp_path) -> pathlib.Path:
    return write_jsonl(tmp_path / "model.jsonl", answer_rows())


def config(answers, url: str, budget=(None, None), key: str = "", keep_refused=False, samples: int = 1, **calls):
    names = {"url": url, "model": "m", "key": key, "temperature": 0.0, "max_tokens": 100, "limit_name": "max_tokens"}
    locations = answers if isinstance(answers, tuple) else (answers,)
    return JudgingConfig(
        tuple(str(location) for location in locations),
        {"j": JudgeConfig(**names)},
        samples,
        50,
        CallConfig(**CALLS | calls, keep_refused=keep_refused),
        BudgetConfig(*budget),
    )


def expected(rows: list[dict]) -> dict[tuple, int]:
    """The polite judge's mark of each answer."""
    return {
        (row["id"], turn + 1): mark(prompts.grade(row, turn)[1]["content"])
        for row in rows
        for turn in range(len(row["turns"]))
    }


def marks(folder: pathlib.Path) -> dict[tuple, float]:
    return {(row["id"], row["turn"]): row["value"] for row in read_jsonl(folder / "judgements.jsonl")}


def test_every_mischief_is_outlasted_and_nothing_is_paid_twice(tmp_path, answers):
    judge = Judge(rude=lambda number: [TRANSIENT[number], TRANSIENT[-1 - number]])
    with serve(judge) as url:
        result = run(config(answers, url), str(tmp_path / "marks"))
    assert marks(tmp_path / "marks") == expected(answer_rows())
    assert len(judge.paid) == 16 and set(judge.paid.values()) == {1}
    assert set(judge.attempts.values()) == {3}
    assert result["all"]["n"] == 16 and result["all"]["without"] == 0
    replies = [read_json(path) for path in (tmp_path / "marks" / "replies").iterdir()]
    assert {reply["attempts"] for reply in replies} == {3} and {reply["tokens"] for reply in replies} == {50}
    with serve(Judge(rude=lambda number: ["unauthorized"])) as url:  # a finished folder asks nobody
        assert run(config(answers, url), str(tmp_path / "marks")) == result


def test_retry_after_holds_all_requests_back(tmp_path, answers):
    times = []

    def rude(number):
        times.append(time.monotonic())
        return ["busy"] if number == 0 else []

    with serve(Judge(rude=rude)) as url:
        run(config(answers, url, at_once=1), str(tmp_path / "marks"))
    assert 0.95 < times[1] - times[0] < 3


def test_a_retry_after_that_is_none_is_no_pause():
    for value in ("", "soon", "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"):
        assert client._retry_after({"Retry-After": value}) is None


def test_a_judge_that_is_down_for_a_while_is_waited_for(tmp_path, answers):
    port, judge = free_port(), Judge()
    calls = config(answers, f"http://127.0.0.1:{port}/v1", attempts=12, first_wait_seconds=0.1)
    worker = threading.Thread(target=run, args=(calls, str(tmp_path / "marks")))
    worker.start()
    time.sleep(0.5)
    with serve(judge, port):
        worker.join(60)
    assert marks(tmp_path / "marks") == expected(answer_rows())


def test_a_judge_that_stays_down_ends_the_run_and_the_next_one_goes_on(tmp_path, answers):
    folder, port = str(tmp_path / "marks"), free_port()
    half = Judge(rude=lambda number: ["error"] * 99 if number >= 8 else [])
    calls = config(answers, f"http://127.0.0.1:{port}/v1", attempts=2)
    with serve(half, port), pytest.raises(UserError, match=r"8 of 16 .* missing: judge j: status 500 .*attempt 2"):
        run(calls, folder)
    with pytest.raises(UserError, match="8 of 16 .* missing: judge j: URLError.*refused"):
        run(calls, folder)
    whole = Judge()
    with serve(whole, port):
        run(calls, folder)
    assert marks(tmp_path / "marks") == expected(answer_rows())
    assert len(whole.attempts) == 8 and not whole.attempts.keys() & half.paid.keys()


def test_a_kill_loses_only_what_was_under_way(tmp_path):
    write_jsonl(tmp_path / "model.jsonl", answer_rows(30))
    judge, folder = Judge(seconds=0.1), tmp_path / "marks"
    with serve(judge) as url:
        command = [sys.executable, "-m", "ctllm_jax.cli", "judge", f"--workdir={folder}", "--config.calls.at_once=4"]
        command += [f"--config.answers=('{tmp_path / 'model.jsonl'}',)", f"--config.judges.judge.url={url}"]
        command += ["--config.judges.judge.model=m", "--config.judges.judge.key="]
        for kill_at in (10, 30, None):
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if kill_at is not None:
                while sum(judge.paid.values()) < kill_at and process.poll() is None:
                    time.sleep(0.01)
                process.send_signal(signal.SIGKILL)
            _, err = process.communicate(timeout=120)
            assert process.returncode == (-signal.SIGKILL if kill_at else 0), err
            for path in (folder / "replies").glob("*.json"):
                assert read_json(path)["text"]
    assert marks(folder) == expected(answer_rows(30))
    assert len(judge.paid) == 60 and sum(judge.paid.values()) <= 60 + 2 * 4


def test_a_budget_is_never_exceeded_and_may_be_raised(tmp_path, answers):
    folder, judge = str(tmp_path / "marks"), Judge()
    with serve(judge) as url:
        for most in (5, 5):  # the second run finds nothing left to spend
            with pytest.raises(UserError, match=r"11 of 16 .*config.budget.requests \(5 of 5 are spent\)"):
                run(config(answers, url, (most, None)), folder)
        assert sum(judge.attempts.values()) == 5
        with pytest.raises(UserError, match=r"config.budget.tokens"):
            run(config(answers, url, (None, 3_000)), folder)
        assert 250 < judge.tokens <= 3_000
        run(config(answers, url, (16, 32_000)), folder)
    assert sum(judge.attempts.values()) == 16
    assert marks(tmp_path / "marks") == expected(answer_rows())


def test_a_long_pause_ends_the_run(tmp_path, answers):
    judge = Judge(rude=lambda number: ["busy_all_day"])
    with serve(judge) as url, pytest.raises(UserError, match="daily quota; it asks for a pause of 86,400 s"):
        run(config(answers, url), str(tmp_path / "marks"))
    assert sum(judge.attempts.values()) <= CALLS["at_once"]


@pytest.mark.parametrize("mischief", ["unauthorized", "elsewhere"])
def test_a_key_reaches_the_endpoint_alone(tmp_path, answers, capsys, monkeypatch, mischief):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    judge = Judge(rude=lambda number: [mischief] if number > 3 else [], reply=lambda messages: "sk-very-secret [[5]]")
    with serve(judge) as url, pytest.raises(UserError, match="look at its url, its model and its key") as failure:
        run(config(answers, url, key="JUDGE_KEY"), str(tmp_path / "marks"))
    assert sum(judge.attempts.values()) <= 4 + CALLS["at_once"]
    assert judge.keys == {"Bearer sk-very-secret"}  # and the redirect was not followed, or there would be a None
    kept = [path.read_text(encoding="utf-8") for path in (tmp_path / "marks").rglob("*") if path.is_file()]
    assert len(kept) > 4 and not any(
        "very-secret" in text for text in (*kept, str(failure.value), *capsys.readouterr())
    )


def test_a_key_that_is_not_set_is_missed_before_anything_is_sent(tmp_path, answers, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with serve(Judge()) as url, pytest.raises(UserError, match="environment variable JUDGE_KEY is not set"):
        run(config(answers, url, key="JUDGE_KEY"), str(tmp_path / "marks"))


@pytest.mark.parametrize("mischief", ["refused", "filtered"])
def test_refused_requests_are_an_error_until_they_are_accepted(tmp_path, answers, mischief):
    folder = str(tmp_path / "marks")
    judge = Judge(rude=lambda number: [mischief] * 99 if number < 3 else [])
    with serve(judge) as url:
        with pytest.raises(UserError, match=r"3 of 16 .*3 were refused.*keep_refused"):
            run(config(answers, url), folder)
        result = run(config(answers, url, keep_refused=True), folder)
    assert result["all"]["forms"] == {"brackets": 13, "refused": 3} and result["all"]["n"] == 13
    wanted, found = expected(answer_rows()), marks(tmp_path / "marks")
    assert list(found.values()).count(None) == 3
    assert all(value in (None, wanted[answer]) for answer, value in found.items())


def test_replies_without_a_mark_are_kept_and_counted(tmp_path, answers):
    odd = ["thought_too_long", "half_a_character"]
    judge = Judge(rude=lambda number: [odd[number]] if number < 2 else [], reply=lambda messages: "不好说。")
    with serve(judge) as url:
        result = run(config(answers, url), str(tmp_path / "marks"))
    assert result["all"]["forms"] == {"missing": 15, "brackets": 1} and result["all"]["mean"] == 7.0
    assert result["all"]["cut"] == 1
    assert sum(judge.attempts.values()) == 16  # asked once each: another judgement is no better by being another


def test_several_samples_are_several_requests(tmp_path, answers):
    judge = Judge()
    with serve(judge) as url:
        result = run(config(answers, url, samples=3), str(tmp_path / "marks"))
    assert sum(judge.attempts.values()) == 48 and result["all"]["n"] == 48
    assert result["repeatability"] == {"n": 16, "deviation": 0.0, "same": 1.0}
    body = judge.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 100)


def shown(messages: list[dict], name: str) -> str:
    return messages[1]["content"].split(f"【助手 {name} 的第 1 轮回答开始】\n")[1].split("\n【")[0]


def test_two_models_are_compared_in_both_orders(tmp_path, answers):
    other = write_jsonl(tmp_path / "other.jsonl", answer_rows(text="不"))

    def longer(messages):
        return "[[A]]" if len(shown(messages, "A")) > len(shown(messages, "B")) else "[[B]]"

    with serve(Judge(longer)) as url:
        result = run(config((answers, other), url), str(tmp_path / "longer"))
    assert result["models"] == ["model", "other"]
    assert (result["wins"], result["ties"], result["losses"]) == (8, 0, 0)
    assert (result["win_rate"]["mean"], result["consistent"], result["first"], result["longer"]) == (1.0, 1.0, 0.5, 1.0)
    with serve(Judge(lambda messages: "[[A]]")) as url:
        result = run(config((answers, other), url), str(tmp_path / "first"))
    assert (result["wins"], result["ties"], result["losses"]) == (0, 8, 0)
    assert (result["consistent"], result["first"], result["longer"]) == (0.0, 1.0, None)
    same = Judge(lambda messages: "[[A]]")
    with serve(same) as url:  # the two orders are one request, which is paid once
        result = run(config((answers, answers), url), str(tmp_path / "same"))
    assert result["ties"] == 8 and set(same.paid.values()) == {1} and sum(same.attempts.values()) == 8
    with serve(Judge(lambda messages: "[[A]] 或 [[B]]")) as url:
        result = run(config((answers, other), url), str(tmp_path / "neither"))
    assert result["without"] == 8 and result["win_rate"]["mean"] is None


def test_what_cannot_be_judged_is_named(tmp_path, answers):
    other = write_jsonl(tmp_path / "other.jsonl", answer_rows(7))
    broken = write_jsonl(tmp_path / "broken.jsonl", [{**answer_rows(1)[0], "answers": ["一个"]}])
    url = "http://127.0.0.1:9/v1"
    for locations, message in [
        ((), "give config.answers"),
        ((answers, other), "1 questions are not the same in both answers, such as 'q7'"),
        ((broken,), "broken.jsonl: line 1: needs id, category, turns, and as many answers"),
        ((tmp_path / "none.jsonl",), "none.jsonl: no such file"),
        ((tmp_path,), "not a finished folder of `ctllm answer`"),
    ]:
        with pytest.raises(UserError, match=message):
            run(config(locations, url), str(tmp_path / "marks"))
    with pytest.raises(
        UserError, match="a judge needs a model and a url such as https://HOST/v1, not 'm', 'api.openai.com'"
    ):
        run(config(answers, "api.openai.com"), str(tmp_path / "marks2"))


def test_another_judge_is_another_folder(tmp_path, answers):
    with serve(Judge()) as url:
        run(config(answers, url), str(tmp_path / "marks"))
        with pytest.raises(UserError, match="settings.samples: 1 there, 2 now"):
            run(config(answers, url, samples=2), str(tmp_path / "marks"))
    assert json.loads((tmp_path / "marks" / "stage.json").read_text())["settings"]["judges"]["j"]["model"] == "m"
