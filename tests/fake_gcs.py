"""A server that speaks as much of Google Cloud Storage's JSON API as the libraries need that read and write runs.

Objects are files below a folder, so tests can look at them and spoil them. Uploads are simple, multipart or resumable;
reads take ranges; preconditions (ifGenerationMatch, ifGenerationNotMatch) hold for reads, uploads and deletions; copies
and moves are whole. There is no authentication, no versioning, no paging, no folder.
"""

import base64
import contextlib
import datetime
import hashlib
import http.server
import itertools
import json
import os
import pathlib
import re
import struct
import threading
import urllib.parse
from collections.abc import Iterator

import google_crc32c

_PLACE = re.compile(r"/b/([^/]+)(?:/o(?:/([^/]+))?)?(?:/(rewriteTo/b/([^/]+)|moveTo)/o/([^/]+))?$")


class _Refused(Exception):
    """An answer that is no success: status and what is said."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one_request(self):
        super().handle_one_request()
        if self.server.down:
            self.close_connection = True

    def do_GET(self):
        self._serve(self._get)

    def do_POST(self):
        self._serve(self._post)

    def do_PUT(self):
        self._serve(self._post)

    def do_DELETE(self):
        self._serve(self._delete)

    def _serve(self, answer) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.down:  # hangs up, as a host does that is gone
            return
        self.server.requests.append(self.path)
        url = urllib.parse.urlparse(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
        found = _PLACE.search(url.path)
        try:
            if not found:
                raise _Refused(404, f"{url.path} is nothing that this server knows")
            place = [urllib.parse.unquote(part or "") for part in found.groups()]
            with self.server.lock:
                self._refuse()
                status, content, headers = answer(place, query, body)
        except _Refused as refusal:
            status, said = refusal.args
            content, headers = {"error": {"code": status, "message": said, "errors": []}}, {}
        self._answer(status, content if isinstance(content, bytes) else json.dumps(content).encode(), headers)

    def _refuse(self) -> None:
        address, refusals = urllib.parse.unquote_plus(self.path), self.server.refusals
        if refusals and refusals[0] in address:
            raise _Refused(403, f"{refusals.pop(0)} is not for you")

    # ---- What can be asked: (status, content, headers)

    def _get(self, place: list[str], query: dict, _) -> tuple:
        bucket, name = place[:2]
        if name:
            path = self._existing(bucket, name, query)
            return self._media(path) if query.get("alt") == "media" else (200, self._metadata(bucket, path), {})
        if not (self.server.root / bucket).is_dir():
            raise _Refused(404, "The specified bucket does not exist.")
        if urllib.parse.urlparse(self.path).path.endswith("/o"):
            return 200, self._listing(bucket, query), {}
        about = {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "HERE", "metageneration": "1"}
        return 200, about, {}

    def _post(self, place: list[str], query: dict, body: bytes) -> tuple:
        bucket, name, action, to_bucket, to_name = place
        if action:
            source = self._existing(bucket, name, {})
            copy = self._write(to_bucket or bucket, to_name, source.read_bytes(), query)
            if action == "moveTo":
                self._remove(source)
                return 200, copy, {}
            return 200, {"kind": "storage#rewriteResponse", "done": True, "resource": copy}, {}
        if query.get("upload_id"):
            return self._chunk(self.server.uploads[query["upload_id"]], query["upload_id"], body)
        if query["uploadType"] == "media":
            return 200, self._write(bucket, query["name"], body, query), {}
        if query["uploadType"] == "multipart":
            about, content = _parts(self.headers["Content-Type"], body)
            return 200, self._write(bucket, about["name"], content, query), {}
        number = str(next(self.server.numbers))
        name = query.get("name") or json.loads(body)["name"]
        self.server.uploads[number] = (bucket, name, query, bytearray())
        host = f"http://{self.headers['Host']}"
        where = f"{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
        return 200, {}, {"Location": where}

    def _chunk(self, upload: tuple, number: str, body: bytes) -> tuple:
        bucket, name, query, content = upload
        content += body
        if self.headers["Content-Range"].endswith("/*"):
            return 308, b"", {"Range": f"bytes=0-{len(content) - 1}"}
        del self.server.uploads[number]
        return 200, self._write(bucket, name, bytes(content), query), {}

    def _delete(self, place: list[str], query: dict, _) -> tuple:
        self._remove(self._existing(*place[:2], query))
        return 204, b"", {}

    # ---- Objects

    def _path(self, bucket: str, name: str) -> pathlib.Path:
        return self.server.root / bucket / name

    def _existing(self, bucket: str, name: str, query: dict) -> pathlib.Path:
        path = self._path(bucket, name)
        self._check(path, query)
        if not path.is_file():
            raise _Refused(404, f"No such object: {bucket}/{name}")
        return path

    def _check(self, path: pathlib.Path, query: dict) -> None:
        generation = self._generation(path) if path.is_file() else 0
        if int(query.get("ifGenerationMatch", generation)) != generation:
            raise _Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if query.get("ifGenerationNotMatch") == str(generation):
            raise _Refused(304, "not modified")

    def _generation(self, path: pathlib.Path) -> int:
        return path.stat().st_mtime_ns  # grows with every write, one by a test too

    def _write(self, bucket: str, name: str, content: bytes, query: dict) -> dict:
        path = self._path(bucket, name)
        self._check(path, query)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.server.root / f".{next(self.server.numbers)}"
        temporary.write_bytes(content)
        os.replace(temporary, path)
        return self._metadata(bucket, path)

    def _remove(self, path: pathlib.Path) -> None:
        path.unlink()
        folder = path.parent
        while folder.parent != self.server.root and not any(folder.iterdir()):  # a folder is what lies in it
            folder.rmdir()
            folder = folder.parent

    def _metadata(self, bucket: str, path: pathlib.Path) -> dict:
        name, content = str(path.relative_to(self.server.root / bucket)), path.read_bytes()
        when = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{self._generation(path)}",
            "name": name,
            "bucket": bucket,
            "generation": str(self._generation(path)),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "size": str(len(content)),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "crc32c": base64.b64encode(struct.pack(">I", google_crc32c.value(content))).decode(),
            "timeCreated": when,
            "updated": when,
        }

    def _listing(self, bucket: str, query: dict) -> dict:
        root, prefix, delimiter = self.server.root / bucket, query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            name = str(path.relative_to(root))
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            inner, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if found:
                prefixes.add(prefix + inner + delimiter)
            else:
                items.append(self._metadata(bucket, path))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _media(self, path: pathlib.Path) -> tuple:
        content, about = path.read_bytes(), {"x-goog-generation": str(self._generation(path))}
        wanted = self.headers.get("Range")
        if not wanted:
            return 200, content, about
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            raise _Refused(416, "range not satisfiable")
        return 206, content[start:stop], {**about, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        body = b"" if status in (204, 304) else body
        with contextlib.suppress(ConnectionError):  # a client that has read enough hangs up
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            if status not in (204, 304):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def _parts(content_type: str, body: bytes) -> tuple[dict, bytes]:
    """(metadata, content) of a multipart upload."""
    boundary = b"--" + re.search(r'boundary="?([^";]+)', content_type)[1].encode()
    newline = b"\r\n" if body.startswith(boundary + b"\r\n") else b"\n"
    _, about, rest = body.split(boundary + newline, 2)
    content = rest[: rest.rindex(newline + boundary + b"--")]
    texts = [part.partition(2 * newline)[2] for part in (about, content)]
    return json.loads(texts[0]), texts[1]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        pass  # clients that hang up


@contextlib.contextmanager
def serving(root: pathlib.Path) -> Iterator[_Server]:
    """Serves the folders below `root` as buckets.

    `.requests` lists what was asked for, `.server_port` is the port; while `.down` is True it hangs up on everybody.
    The next request whose address holds the first text of `.refusals` is refused, and the text taken off.
    """
    server = _Server(("127.0.0.1", 0), _Handler)
    server.root, server.requests, server.down, server.refusals = root, [], False, []
    server.lock, server.uploads, server.numbers = threading.RLock(), {}, itertools.count(1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def settings(server: _Server) -> dict[str, str]:
    """Environment of a program whose gs:// is this server, for every library that goes there."""
    url = f"http://127.0.0.1:{server.server_port}"
    return {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # gcsfs would ask another service
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # ArrayRecord
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore would look for credentials
        "NO_GCE_CHECK": "true",  # google-auth, the same
    }
