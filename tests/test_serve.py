"""`ctllm serve` over real sockets: the words of OpenAI's API, many clients, bad ones, a clean end."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gc
import json
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import hypothesis
import pytest
from hypothesis import strategies as st
from tiny_models import tiny_model
from tiny_server import CONFIG, GREEDY, JSON, Running, serving, warm_decoder

from ctllm_jax.common.errors import UserError
from ctllm_jax.generate import generate
from ctllm_jax.hf_export import export
from ctllm_jax.samples import sample
from ctllm_jax.serve import protocol
from ctllm_jax.serve.protocol import Refusal, parse_request
from ctllm_jax.serve.server import Server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_length=500)


@pytest.fixture(scope="module")
def decoder(model):
    return warm_decoder(model)


@pytest.fixture(scope="module")
def server(decoder):
    with serving(decoder) as running:
        yield running


@pytest.fixture
def alone(server, decoder):
    """The decoder, while the module's server has nothing to do: its thread never touches an idle decoder."""
    return decoder


def chat(**changes) -> dict:
    return {"model": "tiny", "messages": QUESTION, **changes}


def head_of(length: int, *more: str) -> bytes:
    """The header of a chat's request."""
    lines = (f"POST {CHAT} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *more)
    return "\r\n".join((*lines, f"Content-Length: {length}", "", "")).encode()


def events(running: Running, path: str, body: dict) -> list:
    """What a stream's lines say; the last is "[DONE]"."""
    with contextlib.closing(running.connect()) as connection:
        connection.request("POST", path, json.dumps(body), JSON)
        response = connection.getresponse()
        assert response.status == 200 and response.getheader("Content-Type") == "text/event-stream"
        parts = response.read().decode().split("\n\n")
    assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


def wait_until(holds, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- Answers


def test_models_and_health(server, model):
    status, _, listed = server.request("GET", "/v1/models")
    assert status == 200 and [card["id"] for card in listed["data"]] == ["tiny"]
    assert server.request("GET", "/v1/models/tiny")[2] == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 500
    assert server.request("GET", "/v1/models/other")[0] == 404
    assert server.request("GET", "/health")[2] == {"status": "ok", "open": 0, "slots": 4}


def test_an_answer_is_that_of_ctllm_generate(server, model):
    expected = sample(model, [QUESTION], True, GREEDY)[0]
    status, _, found = server.request("POST", CHAT, chat())
    assert status == 200 and found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": expected["text"]},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    prompt = len(server.server._template.render_prompt(QUESTION))
    assert found["usage"] == {"prompt_tokens": prompt, "completion_tokens": 10, "total_tokens": prompt + 10}

    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    again = server.request("POST", CHAT, chat(messages=[{"role": "user", "content": parts}], user="me", n=1.0))[2]
    assert again["choices"] == found["choices"]


def test_text_is_continued_from_text_or_ids(server, model):
    expected = sample(model, ["The quick"], False, dataclasses.replace(GREEDY, max_tokens=5))[0]["text"]
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("The quick")]
    for prompt in ("The quick", ["The quick"], ids, [ids]):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 5, "echo": False}
        status, _, found = server.request("POST", TEXT, body)
        assert status == 200 and found["choices"][0]["text"] == expected and found["object"] == "text_completion"


def test_a_stream_says_the_same_bit_by_bit(server):
    whole = server.request("POST", CHAT, chat(max_tokens=40))[2]
    *parts, usage, end = events(
        server, CHAT, chat(stream=True, max_completion_tokens=40, stream_options={"include_usage": True})
    )
    assert end == "[DONE]" and usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert len({part["id"] for part in parts}) == 1 and {part["object"] for part in parts} == {"chat.completion.chunk"}
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {} and len(deltas) > 5
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]

    body = {"model": "tiny", "prompt": "水", "max_tokens": 8}
    text = server.request("POST", TEXT, body)[2]["choices"][0]["text"]
    *parts, end = events(server, TEXT, {**body, "stream": True})
    assert end == "[DONE]" and "".join(part["choices"][0]["text"] for part in parts) == text


def test_stop_strings_and_stop_ids_end_an_answer(server, model):
    text = server.request("POST", CHAT, chat(max_tokens=20))[2]["choices"][0]["message"]["content"]
    stop = text[4:6]
    found = server.request("POST", CHAT, chat(max_tokens=20, stop=stop))[2]
    assert found["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert found["choices"][0]["finish_reason"] == "stop" and found["usage"]["completion_tokens"] < 20
    parts = events(server, CHAT, chat(max_tokens=20, stop=[stop, "never"], stream=True))[:-1]
    said = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert said == text[: text.index(stop)] and parts[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_seed_decides_and_without_one_answers_differ(server):
    def text(**changes):
        body = chat(temperature=1.2, max_tokens=12, **changes)
        return server.request("POST", CHAT, body)[2]["choices"][0]["message"]["content"]

    assert text(seed=1) == text(seed=1) and len({text(seed=1), text(seed=2), text(), text()}) == 4


# ---- Refusals


REFUSED = [
    (chat(n=2), 400, "n"),
    (chat(n=True), 400, "n"),
    (chat(logprobs=True), 400, "logprobs"),
    (chat(tools=[{"type": "function"}]), 400, "tools"),
    (chat(response_format={"type": "json_object"}), 400, "response_format"),
    (chat(presence_penalty=0.5), 400, "presence_penalty"),
    (chat(best_of=1), 400, "best_of"),
    (chat(temprature=1), 400, "temprature"),
    (chat(prompt="a"), 400, "prompt"),
    (chat(temperature="hot"), 400, "temperature"),
    (chat(temperature=-1), 400, None),
    (chat(top_p=0), 400, None),
    (chat(top_k=2.5), 400, "top_k"),
    (chat(seed=2**40), 400, "seed"),
    (chat(max_tokens=0), 400, None),
    (chat(stop=[""]), 400, "stop"),
    (chat(stop=["a"] * 17), 400, "stop"),
    (chat(stream="yes"), 400, "stream"),
    (chat(stream_options={"x": 1}), 400, "stream_options"),
    (chat(model="gpt-4"), 404, "model"),
    ({"messages": QUESTION}, 404, "model"),
    ({"model": "tiny"}, 400, "messages"),
    (chat(messages=[]), 400, "messages"),
    (chat(messages=[*QUESTION, {"role": "assistant", "content": "a"}]), 400, "messages"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages"),
    (chat(messages=[{"role": "user", "content": "水" * 600}]), 400, None),
    (chat(messages=[{"role": "user", "content": "\ud800"}]), 400, None),
    (b"{", 400, None),
    (b"[1]", 400, None),
    (b"\xff\xfe", 400, None),
    (b'{"temperature": NaN}', 400, None),
    (b"[" * 9_000, 400, None),
    (b" " * 20_000, 413, None),
]


def test_what_is_not_supported_is_refused_in_openais_form(server):
    for body, wanted, param in REFUSED:
        status, _, found = server.request("POST", CHAT, body)
        assert (status, found["error"]["param"]) == (wanted, param), (body, found)
        assert set(found["error"]) == {"message", "type", "param", "code"} and found["error"]["message"]
    for prompt in ("", [], [1, "a"], ["a", "b"], [-1], [10**6], 5):
        status, _, found = server.request("POST", TEXT, {"model": "tiny", "prompt": prompt})
        assert status == 400, (prompt, found)
    assert server.request("GET", CHAT)[0] == 405 and server.request("POST", "/v1/embeddings", {})[0] == 404
    assert server.open() == 0


def test_web_pages_of_others_reach_nothing(server):
    """What a browser sends for them: forms and plain text without asking, and any name that they give this machine."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        status, _, found = server.request("POST", CHAT, chat(max_tokens=1), **{"Content-Type": kind})
        assert status == 415 and "Content-Type: application/json" in found["error"]["message"]
    assert (
        server.request("POST", CHAT, chat(max_tokens=1), **{"Content-Type": "application/json; charset=utf-8"})[0]
        == 200
    )
    assert server.request("OPTIONS", CHAT)[0] == 405  # what it asks before it sends JSON
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "",
    ):
        for method, path, body in (("POST", CHAT, chat(max_tokens=1)), ("GET", "/v1/models", None)):
            status, _, found = server.request(method, path, body, Host=host)
            assert status == 403 and found["error"]["code"] == "foreign_host", host
    for host in (
        "localhost",
        f"LocalHost:{server.port}",
        "127.0.0.1:1",
        "127.8.8.8",
        "[::1]",
        "[::1]:80",
        "me.localhost",
    ):
        assert server.request("GET", "/v1/models", Host=host)[0] == 200, host


def test_who_listens_for_others_is_asked_by_any_name(alone):
    with serving(alone, host="0.0.0.0") as running:
        assert running.request("POST", CHAT, chat(max_tokens=1), Host="models.example")[0] == 200


def test_a_model_without_a_template_completes_texts_only(alone, model, monkeypatch):
    def none(tokenizer):
        raise UserError("no template")

    monkeypatch.setattr("ctllm_jax.serve.server.own_template", none)
    with serving(alone) as running:
        status, _, found = running.request("POST", CHAT, chat())
        assert status == 400 and "/v1/completions" in found["error"]["message"]
        assert running.request("POST", TEXT, {"model": "tiny", "prompt": "水"})[0] == 200


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
OTHER_KEYS = ("messages", "prompt", "stream", "stream_options", "user", "what")
KEYS = st.sampled_from(sorted({*protocol.CHAT_SAMPLING, *protocol.CHAT_NEUTRAL, *OTHER_KEYS}))


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(values=st.dictionaries(KEYS, VALUES, max_size=4), whole=st.booleans(), is_chat=st.booleans())
def test_any_body_is_read_or_refused(values, whole, is_chat):
    body = {**chat(), **values} if whole else {"model": "tiny", **values}
    try:
        parsed = parse_request(json.dumps(body).encode(), is_chat, "tiny", GREEDY)
    except Refusal as refusal:
        assert refusal.status in (400, 404) and refusal.body["error"]["message"]
    else:
        assert parsed.messages if is_chat else parsed.prompt


def raw(running: Running, data: bytes, seconds: float = 0.1) -> bytes:
    """What the server says to some bytes, until it closes or is silent for so long."""
    found = b""
    with socket.create_connection(("127.0.0.1", running.port), timeout=seconds) as client:
        with contextlib.suppress(OSError):
            client.sendall(data)
            while part := client.recv(65_536):
                found += part
    return found


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data())
def test_malformed_requests_do_no_harm(server, data):
    """Sound requests with bytes cut, put in or changed; random bytes; headers that lie."""
    body = json.dumps(chat(max_tokens=2)).encode()
    head = head_of(len(body), "Connection: close")
    request = head + body
    cut = data.draw(st.integers(0, len(request)))
    junk = data.draw(st.binary(max_size=30))
    kind = data.draw(st.sampled_from(["cut", "junk inside", "changed", "random", "length", "chunks"]))
    sent = {
        "cut": request[:cut],
        "junk inside": request[:cut] + junk + request[cut:],
        "changed": request[:cut] + junk + request[cut + len(junk) :],
        "random": junk * 20,
        "length": head.replace(str(len(body)).encode(), junk) + body,
        "chunks": head.replace(b"Content-Length: ", b"Transfer-Encoding: chunked\r\nX: ") + junk + body,
    }[kind]
    answer = raw(server, sent, seconds=20 if sent == request else 0.1)
    assert (answer == b"" and sent != request) or re.match(rb"HTTP/1\.[01] (200|4\d\d) ", answer)
    assert b"Traceback" not in answer


def test_after_the_fuzzing_it_works_as_before(server):
    wait_until(lambda: server.open() == 0)
    assert server.request("POST", CHAT, chat())[0] == 200


# ---- Limits


def test_64_clients_at_once_in_bounded_memory(server, model):
    """Streams and whole answers, twice: all come, each is the one it would be alone, and the memory is there again."""
    prompts = [[1, 40 + number, 50] for number in range(64)]
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    stops = server.server._stop_ids
    ids = generate(model, prompts, max_tokens=10, stop_ids=stops, **greedy)
    wanted = [model.tokenizer.decode([i for i in own if i not in stops]) for own in ids]

    def one(number: int) -> str:
        body = {"model": "tiny", "prompt": prompts[number]}
        if number % 2:
            return "".join(part["choices"][0]["text"] for part in events(server, TEXT, {**body, "stream": True})[:-1])
        status, _, found = server.request("POST", TEXT, body)
        assert status == 200, found
        return found["choices"][0]["text"]

    def round_of_clients() -> int:
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            assert list(pool.map(one, range(64))) == wanted
        gc.collect()
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    round_of_clients()
    before = round_of_clients()
    assert max(round_of_clients() for _ in range(2)) - before < 8e6
    assert server.open() == 0


def test_a_full_line_refuses_with_when_to_come_again(alone):
    with serving(alone, queue=0) as running:
        streams = [start_stream(running) for _ in range(4)]
        status, headers, found = running.request("POST", CHAT, chat())
        assert status == 429 and int(headers["Retry-After"]) >= 1 and found["error"]["code"] == "queue_full"
        for stream in streams:
            stream.close()
        wait_until(lambda: running.open() == 0)
        assert running.request("POST", CHAT, chat())[0] == 200


def start_stream(running: Running, **changes) -> socket.socket:
    """A client that has read the first words of a long answer."""
    body = json.dumps(chat(stream=True, max_tokens=200, **changes)).encode()
    client = socket.create_connection(("127.0.0.1", running.port), timeout=20)
    client.sendall(head_of(len(body)) + body)
    seen = b""
    while seen.count(b"data: ") < 2:
        seen += client.recv(65_536)
    return client


def test_a_client_that_goes_frees_its_slot(server, alone, monkeypatch):
    slow(alone, monkeypatch)
    clients = [start_stream(server) for _ in range(4)]
    assert server.open() == 4
    waiting = socket.create_connection(("127.0.0.1", server.port))  # one that goes while it waits, without a stream
    body = json.dumps(chat(max_tokens=200)).encode()
    waiting.sendall(head_of(len(body)) + body)
    wait_until(lambda: server.open() == 5)
    for client in (*clients, waiting):
        client.close()
    start = time.monotonic()
    wait_until(lambda: server.open() == 0)
    assert time.monotonic() - start < 3  # 200 tokens take 4 s
    monkeypatch.undo()
    assert server.request("POST", CHAT, chat())[0] == 200


def slow(decoder, monkeypatch, seconds: float = 0.02) -> None:
    """Makes each step take longer, as a larger model would."""
    advance = decoder.advance
    monkeypatch.setattr(decoder, "advance", lambda: (time.sleep(seconds), advance()))


def test_an_answer_has_a_time_limit(alone, monkeypatch):
    slow(alone, monkeypatch)
    with serving(alone, seconds=0.3) as running:
        status, _, found = running.request("POST", CHAT, chat(max_tokens=200))
        assert status == 504 and found["error"]["code"] == "timeout"
        parts = events(running, CHAT, chat(max_tokens=200, stream=True))
        assert parts[-1]["error"]["code"] == "timeout"
        wait_until(lambda: running.open() == 0)


def test_connections_that_dawdle_are_closed_and_their_number_is_bounded(alone):
    with serving(alone, header_seconds=0.4, connections=3) as running:

        def silent(data: bytes) -> float:
            """Seconds until the server closes."""
            start = time.monotonic()
            with socket.create_connection(("127.0.0.1", running.port), timeout=10) as client:
                client.sendall(data)
                with contextlib.suppress(ConnectionResetError):
                    while client.recv(1000):
                        pass
            return time.monotonic() - start

        head = head_of(100)
        for data in (b"", b"POST /v1", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", head + b"{"):
            assert 0.3 < silent(data) < 4, data
        late = raw(running, head + b"{", seconds=5)
        assert late.startswith(b"HTTP/1.1 408 ") and b"the body did not come within 0.4 seconds" in late
        idle = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(3)]
        assert raw(running, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""  # the fourth
        for client in idle:
            client.close()
        wait_until(
            lambda: b"200 OK" in raw(running, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        )


def test_a_client_that_does_not_read_is_left(alone):
    """Every event of the stream carries the model's name, here a long one: more than buffers hold."""
    name = "x" * 100_000
    with serving(alone, name=name, header_seconds=0.4, body_bytes=200_000) as running:
        body = json.dumps(chat(model=name, stream=True, max_tokens=200)).encode()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.settimeout(20)
            client.connect(("127.0.0.1", running.port))
            client.sendall(head_of(len(body)) + body)
            wait_until(lambda: running.open() == 1)
            wait_until(lambda: running.open() == 0)
            time.sleep(1)
            seen = b""
            with contextlib.suppress(ConnectionResetError):
                while part := client.recv(65_536):
                    seen += part
        assert b"[DONE]" not in seen


# ---- The end


def test_stopping_finishes_what_is_running_and_refuses_what_comes(alone, monkeypatch):
    slow(alone, monkeypatch)
    with serving(alone) as running, contextlib.closing(running.connect()) as kept:
        kept.request("GET", "/health")
        kept.getresponse().read()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(running.request, "POST", CHAT, chat(max_tokens=40))
            wait_until(lambda: running.open() == 1)
            running.ask_to_stop()
            wait_until(lambda: running.server._stopping)
            kept.request("POST", CHAT, json.dumps(chat()), JSON)
            assert kept.getresponse().status == 503
            with pytest.raises(OSError):
                running.request("GET", "/health")
            assert answer.result()[0] == 200
    assert running.worked


def test_stopping_ends_within_its_bound(alone, monkeypatch):
    slow(alone, monkeypatch)
    with serving(alone, stop_seconds=0.2) as running:
        client = start_stream(running)
        start = time.monotonic()
        running.stop()
        assert time.monotonic() - start < 3
        seen = b""
        while part := client.recv(65_536):
            seen += part
        assert b"the server is being stopped" in seen and b"[DONE]" not in seen
        client.close()
    monkeypatch.undo()
    assert settle(alone)


def settle(decoder) -> bool:
    """What a stopped server leaves in its slots is cancelled, and gone with the next step."""
    decoder.advance()
    return decoder.idle


def test_a_model_that_fails_ends_the_server(model, alone, monkeypatch, capsys):
    def fail():
        raise RuntimeError("out of memory")

    with serving(alone) as running:
        monkeypatch.setattr(alone, "advance", fail)
        status, _, found = running.request("POST", CHAT, chat())
        assert status == 500 and "the model failed" in found["error"]["message"]
        running.thread.join(20)
        assert running.worked is False
    monkeypatch.undo()
    assert "out of memory" in capsys.readouterr().err and settle(alone)


def test_an_address_in_use_is_said(server, alone):
    taken = dataclasses.replace(CONFIG, port=server.port)
    with pytest.raises(UserError, match=f"127.0.0.1:{server.port}: cannot listen"):
        asyncio.run(Server(alone, taken).run(asyncio.Event(), print))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_real_program(model, tmp_path, number):
    """It finishes the answer at hand and ends with status 0; the port is free again."""
    export(model.config, model.params, model.tokenizer, tmp_path / "hf", "float32")
    command = [sys.executable, "-m", "ctllm_jax.cli", "serve", f"--config.model={tmp_path / 'hf'}", "--config.port=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stderr if line.startswith("serve: hf on http://127.0.0.1:"))
        port = int(line.rpartition(":")[2].removesuffix("/v1\n"))
        body = json.dumps(chat(model="hf", stream=True, max_tokens=200)).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(head_of(len(body)) + body)
            seen = client.recv(100)
            process.send_signal(number)
            while part := client.recv(65_536):
                seen += part
        assert b"data: [DONE]" in seen
        rest = process.stderr.read()
    assert process.returncode == 0 and "finishing what is running" in rest and "Traceback" not in rest
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
