"""A server of a tiny model in this process, on a real socket; its clients, good and bad; and fixtures of both."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time

import pytest
from tiny_models import tiny_model

from ctllm_jax.sampling import SamplingConfig
from ctllm_jax.serve.config import ServeConfig
from ctllm_jax.serve.server import Server
from ctllm_jax.serve.worker import warm_up
from ctllm_jax.slots import Decoder

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "你好"}]
JSON = {"Content-Type": "application/json"}
GREEDY = SamplingConfig(max_tokens=10, temperature=0.0, top_k=0, top_p=1.0, seed=0)
CONFIG = ServeConfig(
    model="",
    step=None,
    dtype=None,
    tensor=1,
    name="tiny",
    host="127.0.0.1",
    port=0,
    slots=4,
    context=None,
    queue=60,
    connections=100,
    body_bytes=10_000,
    header_seconds=30.0,
    seconds=60.0,
    stop_seconds=20.0,
    sampling=GREEDY,
)


class Running:
    """A server at work.

    Attributes:
      port: where it listens.
      worked: after `stop`, whether the model worked to the end.
    """

    def __init__(self, decoder: Decoder, config: ServeConfig):
        self._ready, self.worked = threading.Event(), None
        self.server = Server(decoder, config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.thread.start()
        assert self._ready.wait(30)

    async def _run(self) -> None:
        self._stop, self._loop = asyncio.Event(), asyncio.get_running_loop()

        def ready(host: str, port: int) -> None:
            self.port = port
            self._ready.set()

        self.worked = await self.server.run(self._stop, ready)

    def ask_to_stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended already
            self.ask_to_stop()
        self.thread.join(60)
        assert not self.thread.is_alive()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def request(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict, dict]:
        """(status, headers, JSON body)."""
        with contextlib.closing(self.connect()) as connection:
            data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
            connection.request(method, path, data, JSON | headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), json.loads(response.read())

    def open(self) -> int:
        """Requests that have not ended."""
        return self.request("GET", "/health")[2]["open"]


@contextlib.contextmanager
def serving(decoder: Decoder, **changes):
    """Serves until the block ends. A decoder may serve again."""
    running = Running(decoder, dataclasses.replace(CONFIG, **changes))
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_length=500)


@pytest.fixture(scope="module")
def decoder(model):
    """Compiled, so that no test's time has that in it."""
    decoder = Decoder(model, CONFIG.slots)
    warm_up(decoder)
    return decoder


@pytest.fixture(scope="module")
def server(decoder):
    with serving(decoder) as running:
        yield running


@pytest.fixture
def alone(server, decoder):
    """The decoder, while `server` has nothing to do: its thread never touches an idle decoder."""
    return decoder


# ---- Clients


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


def raw(running: Running, data: bytes, seconds: float = 0.1) -> bytes:
    """What the server says to some bytes, until it closes or is silent for so long."""
    found = b""
    with socket.create_connection(("127.0.0.1", running.port), timeout=seconds) as client:
        with contextlib.suppress(OSError):
            client.sendall(data)
            while part := client.recv(65_536):
                found += part
    return found


def start_stream(running: Running, **changes) -> socket.socket:
    """A client that has read the first words of a long answer."""
    body = json.dumps(chat(stream=True, max_tokens=200, **changes)).encode()
    client = socket.create_connection(("127.0.0.1", running.port), timeout=20)
    client.sendall(head_of(len(body)) + body)
    seen = b""
    while seen.count(b"data: ") < 2:
        part = client.recv(65_536)
        assert part, seen
        seen += part
    return client


def wait_until(holds, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def slow(decoder, monkeypatch, seconds: float = 0.02) -> None:
    """Makes each step take longer, as a larger model would."""
    advance = decoder.advance
    monkeypatch.setattr(decoder, "advance", lambda: (time.sleep(seconds), advance()))
