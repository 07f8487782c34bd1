"""A server that speaks as much of Google Cloud Storage's JSON API as reading needs: metadata, listing, ranges."""

import contextlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append(self.path)
        url = urllib.parse.urlparse(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
        # /storage/v1/b/BUCKET/o[/OBJECT]; a download may have a prefix before it
        place = url.path.partition("/b/")[2]
        bucket, _, name = place.partition("/o")
        path = self.server.root / bucket / urllib.parse.unquote(name.removeprefix("/"))
        if name in ("", "/"):
            self._answer(200, json.dumps(self._listing(bucket, query)).encode())
        elif not path.is_file():
            self._answer(404, json.dumps({"error": {"code": 404, "message": "no such object"}}).encode())
        elif query.get("alt") == "media":
            self._media(path.read_bytes())
        else:
            self._answer(200, json.dumps(self._metadata(bucket, path)).encode())

    def _listing(self, bucket: str, query: dict) -> dict:
        root, prefix, delimiter = self.server.root / bucket, query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            name = str(path.relative_to(root))
            if name.startswith(prefix):
                inner, found, _ = name[len(prefix) :].partition(delimiter or "\0")
                if found:
                    prefixes.add(prefix + inner + delimiter)
                else:
                    items.append(self._metadata(bucket, path))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _metadata(self, bucket: str, path: pathlib.Path) -> dict:
        name = str(path.relative_to(self.server.root / bucket))
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/1",
            "name": name,
            "bucket": bucket,
            "generation": "1",
            "metageneration": "1",
            "size": str(path.stat().st_size),
            "timeCreated": "2024-01-01T00:00:00.000Z",
            "updated": "2024-01-01T00:00:00.000Z",
        }

    def _media(self, content: bytes) -> None:
        wanted = self.headers.get("Range")
        if not wanted:
            self._answer(200, content, {"x-goog-generation": "1"})
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            self._answer(416, b"")
            return
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}", "x-goog-generation": "1"}
        self._answer(206, content[start:stop], span)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that has read enough hangs up
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        pass  # clients that hang up


@contextlib.contextmanager
def serving(root: pathlib.Path) -> Iterator[_Server]:
    """Serves the folders below `root` as buckets; `.requests` lists what was asked for, `.server_port` the port."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.root, server.requests = root, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
