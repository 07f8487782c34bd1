"""A judge for tests: a chat endpoint on this machine that can be slow, rude, down, or out of its mind."""

import collections
import contextlib
import email.utils
import hashlib
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator


def mark(text: str) -> int:
    """The mark that the judge gives to what it is shown: any, but always the same."""
    return 1 + int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10


def graded(messages: list[dict]) -> str:
    return f"理由充分。\n评分：[[{mark(messages[1]['content'])}]]"


class Judge:
    """Replies with `reply(messages)`; before it does, each request meets the mischiefs of `rude`, one an attempt.

    Attributes:
      attempts: how often each request came.
      paid: how often each request was answered.
      keys: Authorization headers that came.
    """

    def __init__(self, reply: Callable = graded, rude: Callable[[int], list[str]] = lambda number: [], seconds=0.0):
        self.reply, self.rude, self.seconds = reply, rude, seconds
        self.attempts: collections.Counter = collections.Counter()
        self.paid: collections.Counter = collections.Counter()
        self.tokens = 0
        self.keys: set = set()
        self.bodies: list[dict] = []
        self.lock = threading.Lock()
        self.number: dict[str, int] = {}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    judge: Judge

    def log_message(self, *arguments):
        pass

    def do_GET(self):  # what a followed redirect becomes
        self.judge.keys.add(self.headers.get("Authorization"))
        self._send(200, b"{}")

    def do_POST(self):
        judge = self.judge
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        name = hashlib.sha256(raw).hexdigest()
        with judge.lock:
            number = judge.number.setdefault(name, len(judge.number))
            judge.bodies.append(body)
            judge.keys.add(self.headers.get("Authorization"))
            mischiefs = judge.rude(number)
            attempt = judge.attempts[name]
            judge.attempts[name] += 1
        self.close_connection = True
        with contextlib.suppress(OSError):  # a client that has given up
            if attempt < len(mischiefs):
                getattr(self, mischiefs[attempt])()
                return
            time.sleep(judge.seconds)
            text = judge.reply(body["messages"])
            usage = {"prompt_tokens": 30, "completion_tokens": 20}
            reply = {
                "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
                "model": "j-1",
                "usage": usage,
            }
            with judge.lock:
                judge.paid[name] += 1
                judge.tokens += 50
            self._send(200, json.dumps(reply).encode())

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    # ---- Mischiefs

    def error(self):
        self._send(500, b"<html>oops</html>")

    def busy(self):
        self._send(429, b"slow down", Retry_After="1")

    def busy_until(self):
        self._send(503, b"", Retry_After=email.utils.formatdate(time.time() + 1, usegmt=True))

    def busy_nonsense(self):
        self._send(429, b"", Retry_After="soon")

    def busy_all_day(self):
        self._send(429, b"daily quota", Retry_After="86400")

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def hang(self):
        time.sleep(2)

    def drip(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(30):
            self.wfile.write(b" ")
            time.sleep(0.1)

    def cut(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"choices": [')

    def no_http(self):
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")

    def html(self):
        self._send(200, "<html>网关</html>".encode())

    def broken_bytes(self):
        self._send(200, b"\xff\xfe\x00{")

    def no_choices(self):
        self._send(200, b'{"choices": []}')

    def another_shape(self):
        self._send(200, b'{"choices": {"0": 1}, "usage": "none"}')

    def no_content(self):
        self._send(200, b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}')

    def deep(self):
        self._send(200, b"[" * 200_000)

    def huge(self):
        self._send(200, b" " * (6 << 20))

    # ---- Final ones

    def unauthorized(self):
        self._send(401, f"bad key {self.headers.get('Authorization')}".encode())

    def refused(self):
        self._send(400, b"content policy")

    def elsewhere(self):
        self._send(302, b"", Location=f"http://127.0.0.1:{self.server.server_port}/stolen")

    def filtered(self):
        self._send(200, b'{"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}')

    def thought_too_long(self):
        self._send(200, b'{"choices": [{"message": {"content": ""}, "finish_reason": "length"}]}')

    def half_a_character(self):
        self._send(
            200,
            rb'{"model": "m\ud83d", "choices": [{"message": {"content": "\ud83d [[7]]"}, '
            rb'"finish_reason": "\udc00"}], "usage": {"prompt_tokens": -1}}',
        )


@contextlib.contextmanager
def serve(judge: Judge, port: int = 0) -> Iterator[str]:
    """The address of the judge while the block lasts."""
    handler = type("Handler", (_Handler,), {"judge": judge})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
