"""`ctllm chat`: turns, Ctrl-C, pipes."""

import dataclasses
import io
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from tiny_models import tiny_model

from ctllm_jax import chat as verb
from ctllm_jax.chat import ChatConfig, Conversation
from ctllm_jax.common.errors import UserError
from ctllm_jax.data.chat import own_template
from ctllm_jax.hf_export import export
from ctllm_jax.samples import sample
from ctllm_jax.sampling import SamplingConfig
from ctllm_jax.slots import Decoder

GREEDY = SamplingConfig(max_tokens=10, temperature=0.0, top_k=0, top_p=1.0, seed=0)
CONFIG = ChatConfig(model="MODEL", step=None, dtype=None, tensor=1, context=None, system="山", sampling=GREEDY)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, 1)


def talk(decoder, **changes) -> Conversation:
    return Conversation(decoder, own_template(decoder.model.tokenizer), dataclasses.replace(CONFIG, **changes))


def answer(conversation, text: str) -> str:
    return "".join(conversation.ask(text))


def message(role, content):
    return {"role": role, "content": content}


def test_every_turn_is_asked_with_those_before(model, decoder):
    conversation, messages = talk(decoder), [message("system", "山")]
    for text in ("你好", "水"):
        messages.append(message("user", text))
        expected = sample(model, [list(messages)], True, GREEDY)[0]["text"]
        assert answer(conversation, text) == expected
        messages.append(message("assistant", expected))
    assert len(expected) > 1


def test_the_oldest_turns_go_when_the_context_is_full(model, decoder, capsys, monkeypatch):
    conversation, template, asked = talk(decoder), own_template(model.tokenizer), []
    submit = decoder.submit
    monkeypatch.setattr(decoder, "submit", lambda request: asked.append(request.prompt) or submit(request))
    turns, most = [], model.config.max_length - 10
    for number in range(6):
        turns.append(message("user", f"水{number}"))
        text = answer(conversation, turns[-1]["content"])
        fitting = (template.render_prompt([message("system", "山"), *turns[start:]]) for start in range(0, 99, 2))
        assert asked[-1] == next(ids for ids in fitting if len(ids) <= most)
        turns.append(message("assistant", text))
    assert "the oldest 2 messages no longer fit" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is room for 54"):
        answer(conversation, "The quick brown " * 40)
    assert answer(conversation, "水")  # and it goes on


def test_ctrl_c_ends_the_answer_and_the_next_one_the_program(model, decoder):
    before = signal.getsignal(signal.SIGINT)
    whole = answer(talk(decoder), "你好")
    conversation, parts = talk(decoder), []
    for part in conversation.ask("你好"):
        parts.append(part)
        if len(parts) == 2:
            signal.raise_signal(signal.SIGINT)
    half = "".join(parts)
    assert half and whole.startswith(half) and half != whole
    assert signal.getsignal(signal.SIGINT) == before
    messages = [message("system", "山"), message("user", "你好"), message("assistant", half), message("user", "水")]
    assert answer(conversation, "水") == sample(model, [messages], True, GREEDY)[0]["text"]
    with pytest.raises(KeyboardInterrupt):
        for _ in conversation.ask("从前"):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
    decoder.advance()  # the slot is free again
    assert decoder.idle


def test_a_pipe_is_read_line_by_line(model, decoder, monkeypatch, capsys):
    class Pipe(io.TextIOWrapper):
        def isatty(self):
            return False

    monkeypatch.setattr(verb, "load_model", lambda *_: model)
    lines = ["你好".encode(), b"", b"The quick brown " * 40, b"\xff", "水".encode()]
    monkeypatch.setattr(sys, "stdin", Pipe(io.BytesIO(b"\n".join(lines))))
    verb.run(dataclasses.replace(CONFIG, sampling=dataclasses.replace(GREEDY, max_tokens=4)), None)
    out, err = capsys.readouterr()
    first = sample(model, [[message("system", "山"), message("user", "你好")]], True, GREEDY)[0]["text"]
    assert first.startswith(out.split("\n")[0]) and out.count("\n") >= 3
    assert "there is room for" in err


@pytest.mark.slow
def test_in_a_terminal(model, tmp_path):
    """Ctrl-C in an answer, then another question, then Ctrl-D."""
    export(model.config, model.params, model.tokenizer, tmp_path / "hf", "float32")
    own, other = pty.openpty()
    command = [sys.executable, "-m", "ctllm_jax.cli", "chat", f"--config.model={tmp_path / 'hf'}"]
    with subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True) as process:
        os.close(other)
        screen = until(own, b"> ")
        os.write(own, "你好\n".encode())
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)  # in the answer, or while it is compiled
        screen = until(own, b"> ")
        os.write(own, "水\n".encode())
        screen = until(own, b"> ")
        os.write(own, b"\x04")
        assert process.wait(60) == 0
    assert b"Traceback" not in screen


def until(terminal: int, mark: bytes) -> bytes:
    """What appears on the terminal until it ends with a mark."""
    seen, end = b"", time.monotonic() + 120
    while not seen.endswith(mark):
        assert time.monotonic() < end, seen
        seen += os.read(terminal, 4096)
    return seen
