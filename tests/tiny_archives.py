"""Web archives, made by hand as the standard says."""

import gzip
import zlib


def entry(kind: str, body: bytes, url: str = "http://a.cn/b", **headers: str) -> bytes:
    """One record; `content_length` may lie."""
    fields = {
        "WARC-Type": kind,
        "WARC-Record-ID": f"<urn:uuid:{zlib.crc32(url.encode() + body):08x}>",
        "WARC-Date": "2024-03-01T00:00:00Z",
        "WARC-Target-URI": url,
        "Content-Length": str(len(body)),
    } | {name.replace("_", "-").title(): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return b"WARC/1.0\r\n" + head.encode() + b"\r\n" + body + b"\r\n\r\n"


def answer(body: bytes, status: str = "200 OK", version: str = "HTTP/1.1", **headers: str) -> bytes:
    """An HTTP answer."""
    fields = {"Content-Type": "text/html"} | {name.replace("_", "-").title(): v for name, v in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{version} {status}\r\n{head}\r\n".encode() + body


def page(paragraphs: list[str], charset: str = "utf-8") -> bytes:
    """HTML with a menu, an article of these paragraphs, and a footer."""
    inner = "".join(f"<p>{paragraph}</p>\n" for paragraph in paragraphs)
    menu = "<nav><ul>" + '<li><a href="/x">首页</a></li>' * 5 + "</ul></nav>"
    head = f'<head><meta charset="{charset}"><title>题</title><script>if (a<b) document.write("<p>")</script></head>'
    html = f"<!DOCTYPE html><html>{head}<body>{menu}<article>{inner}</article><footer>版权</footer></body></html>"
    return html.encode(charset, "ignore")


def by_member(*records: bytes) -> bytes:
    """As Common Crawl packs them: a gzip member for each record."""
    return b"".join(gzip.compress(record, mtime=0) for record in records)
