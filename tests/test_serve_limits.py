"""`ctllm serve` under load: what clients can make it hold, clients that go or dawdle, a clean end."""

# ruff: noqa: F811 (fixtures)
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gc
import json
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
from tiny_server import (  # noqa: F401 (fixtures too)
    CHAT,
    CONFIG,
    JSON,
    TEXT,
    alone,
    chat,
    decoder,
    events,
    head_of,
    model,
    raw,
    server,
    serving,
    slow,
    start_stream,
    wait_until,
)

from ctllm_jax.common.errors import UserError
from ctllm_jax.generate import generate
from ctllm_jax.hf_export import export
from ctllm_jax.serve.server import Server

# ---- Limits


def test_64_clients_at_once_in_bounded_memory(server, model):
    """Streams and whole answers, twice: all come, each is the one it would be alone, and the memory is there again."""
    prompts = [[1, 40 + number, 50] for number in range(64)]
    stops = server.server._stop_ids
    ids = generate(model, prompts, max_tokens=10, stop_ids=stops)
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
