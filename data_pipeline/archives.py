"""Web archives: WARC, and WET, their form with texts alone. Headers and bodies have bounds."""

import dataclasses
import http.client
import io
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from data_pipeline.damage import Damaged

_HEADER_BYTES, _HEADERS = 1 << 16, 200  # of a line, and lines, of one record's header
_STEP = 1 << 20  # bytes skipped at a time
_HTML = ("text/html", "application/xhtml+xml")


class Unusable(Exception):
    """An entry that gives no text; `reason` is a fixed name, the message says what was found."""

    def __init__(self, reason: str, found: str):
        super().__init__(found)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Entry:
    """One page of an archive. `body` is empty where `size` is over the limit."""

    kind: str  # response, resource, conversion
    headers: Mapping[str, str]  # names in small letters
    size: int
    body: bytes

    @property
    def url(self) -> str:
        return self.headers.get("warc-target-uri", "").strip("<>")


def entries(stream: BinaryIO, limit: int) -> Iterator[Entry]:
    """The pages of an archive in its order; requests, metadata and repeated visits hold none and are passed over.

    Raises:
      Damaged: what follows is no record, or one that is cut short.
    """
    while line := stream.readline(_HEADER_BYTES):
        if not line.strip():
            continue
        headers = _headers(stream, line)
        try:
            size = int(headers.get("content-length", ""))
        except ValueError:
            size = -1
        if size < 0:
            raise Damaged(f"a record's Content-Length is {headers.get('content-length')!r}")
        kind = headers.get("warc-type", "")
        wanted = kind in ("response", "resource", "conversion")
        body = _take(stream, size, keep=wanted and size <= limit)
        if wanted:
            yield Entry(kind, headers, size, body)


def _headers(stream: BinaryIO, version: bytes) -> dict[str, str]:
    if not version.startswith(b"WARC/"):
        raise Damaged(f"no record of a web archive begins with {version[:20]!r}")
    headers: dict[str, str] = {}
    for _ in range(_HEADERS):
        line = stream.readline(_HEADER_BYTES)
        if not line.endswith(b"\n"):
            raise Damaged("a record's header is cut short or longer than 64 KiB")
        if not line.strip():
            return headers
        name, _, value = line.decode("utf-8", "replace").partition(":")
        headers[name.strip().lower()] = value.strip()
    raise Damaged(f"a record has more than {_HEADERS} header lines")


def _take(stream: BinaryIO, size: int, keep: bool) -> bytes:
    """The next bytes, or none of them where they are only to be passed over."""
    kept, left = [], size
    while left:
        piece = stream.read(min(left, _STEP))
        if not piece:
            raise Damaged(f"a record of {size:,} bytes is cut short")
        left -= len(piece)
        if keep:
            kept.append(piece)
    return b"".join(kept)


def page(entry: Entry, limit: int) -> dict[str, Any]:
    """{id, url, text, and where they are known date and language} of an archive's page.

    Raises:
      Unusable: no HTML or text, an answer other than 200, a form that is not known, or a page that is out of bounds.
    """
    content_type = entry.headers.get("content-type", "")
    body = entry.body
    if entry.kind == "response":
        content_type, body = _answer(body, limit)
    if entry.kind == "conversion":
        text = _utf8(body)
    elif content_type.partition(";")[0].strip().lower() in _HTML:
        from data_pipeline import pages  # parsers, which only HTML needs

        text = pages.text_of(body, content_type)
    else:
        raise Unusable("no_page", f"Content-Type {content_type[:80]!r}")
    found = {
        "id": entry.headers.get("warc-record-id", "").strip("<>").removeprefix("urn:uuid:"),
        "url": entry.url,
        "text": text,
        "date": entry.headers.get("warc-date"),
        "language": entry.headers.get("warc-identified-content-language"),
    }
    return {name: value for name, value in found.items() if value is not None}


_NEWER_HTTP = re.compile(rb"\AHTTP/[23](?:\.\d)?(?= )")


class _Bytes:
    """What http.client takes for a socket."""

    def __init__(self, content: bytes):
        self._content = content

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._content)


def _answer(raw: bytes, limit: int) -> tuple[str, bytes]:
    """(Content-Type, body) of an HTTP answer."""
    answer = http.client.HTTPResponse(_Bytes(_NEWER_HTTP.sub(b"HTTP/1.1", raw, count=1)))
    try:
        answer.begin()
    except (http.client.HTTPException, ValueError) as error:
        raise Unusable("broken_http", f"{type(error).__name__}: {error}"[:200]) from None
    if answer.status != 200:
        raise Unusable("no_page", f"HTTP status {answer.status}")
    try:
        body = answer.read(limit + 1)
    except (http.client.HTTPException, ValueError):  # cut short, or put together by the archive with the old header
        body = raw.partition(b"\r\n\r\n")[2]
    return answer.headers.get("Content-Type", ""), _unpacked(body, answer.headers.get("Content-Encoding", ""), limit)


def _unpacked(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its Content-Encoding. Archives often keep the header of what they have unpacked."""
    if encoding.strip().lower() in ("br", "zstd") and b"<" not in body[:1024]:
        raise Unusable("unknown_encoding", encoding)
    if not body.startswith((b"\x1f\x8b", b"\x78\x01", b"\x78\x9c", b"\x78\xda")):
        return body
    try:
        unpacked = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, limit + 1)
    except zlib.error as error:
        raise Unusable("broken_http", f"Content-Encoding {encoding!r}: {error}") from None
    if len(unpacked) > limit:
        raise Unusable("record_too_long", f"{len(body):,} bytes expand to more than {limit:,}")
    return unpacked


def _utf8(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unusable("invalid_utf8", str(error)) from None
