"""A server of a tiny model in this process, on a real socket."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import threading

from ctllm_jax.sampling import SamplingConfig
from ctllm_jax.serve.config import ServeConfig
from ctllm_jax.serve.server import Server
from ctllm_jax.serve.worker import warm_up
from ctllm_jax.slots import Decoder

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

    # ---- Clients

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


def warm_decoder(model) -> Decoder:
    decoder = Decoder(model, CONFIG.slots)
    warm_up(decoder)
    return decoder
