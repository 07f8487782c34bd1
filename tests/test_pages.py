"""HTML pages: their text, in whatever encoding; and pages that are made to cost."""

import gzip
import re
import time
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from tiny_archives import answer, by_member, entry, page

from data_pipeline.archives import Unusable
from data_pipeline.documents import DocumentReader, Fields, InputFile

pages = pytest.importorskip("data_pipeline.pages", exc_type=ImportError)
HTMLTree = pages.HTMLTree

FIELDS = Fields(id="id", url="url", source="source", text="text")
PARAGRAPHS = [f"第{i}段讲述黄河下游的水利工程，泥沙在这里沉积了几千年，两岸的人们修筑堤坝。" for i in range(6)]
TEXT = "\n\n".join(PARAGRAPHS)


def text_of(tmp_path, *records: bytes, limit=1 << 23):
    (tmp_path / "a.warc.gz").write_bytes(by_member(*records))
    reader = DocumentReader(InputFile(0, str(tmp_path / "a.warc.gz"), "a"), FIELDS, "zh_cc", limit)
    items = list(reader)
    assert reader.damage is None
    return items


@pytest.mark.parametrize("charset", ["utf-8", "gb18030", "big5", "utf-8-sig"])
@pytest.mark.parametrize("said", ["text/html", "text/html; charset={}", "text/html; charset=utf-8"])
def test_the_main_content_is_the_text_whatever_the_encoding_and_what_is_said_of_it(charset, said):
    paragraphs = [text.encode(charset, "ignore").decode(charset) for text in PARAGRAPHS]  # big5 lacks some
    body = page(paragraphs, charset)
    assert pages.text_of(body, said.format(charset)) == "\n\n".join(paragraphs)


def test_one_wrong_byte_or_a_cut_does_not_change_the_encoding():
    body = page(PARAGRAPHS, "gb18030").replace("泥沙".encode("gb18030"), b"\x80\xff", 1)
    assert "水利工程" in pages.text_of(body, "text/html; charset=gbk")
    body = page(PARAGRAPHS)
    cut = body[: body.index("堤坝".encode()) + 2]  # inside a character
    assert pages.text_of(cut).endswith("修筑")


@pytest.mark.parametrize("charset", ["x-mac-cyrillic", "windows-874", "iso-2022-kr", "replacement", "no-such", "\0"])
def test_an_encoding_that_is_unknown_or_wrong_is_no_error(charset):
    body = page(PARAGRAPHS, "gb18030").replace(b'charset="gb18030"', f'charset="{charset}"'.encode())
    assert pages.text_of(body, f"text/html; charset={charset}")
    assert pages.text_of(bytes(range(128, 256)) * 20, f"text/html; charset={charset}")


@pytest.mark.parametrize(
    "record",
    [
        answer(page(PARAGRAPHS)),
        answer(page(PARAGRAPHS), version="HTTP/2"),
        answer(page(PARAGRAPHS), content_length="10000000"),  # cut short by the archive
        answer(gzip.compress(page(PARAGRAPHS)), content_encoding="gzip"),
        answer(zlib.compress(page(PARAGRAPHS)), content_encoding="deflate"),
        answer(page(PARAGRAPHS), content_encoding="gzip"),  # unpacked by the archive, with the old header
        answer(page(PARAGRAPHS), content_encoding="br"),
        answer(page(PARAGRAPHS), transfer_encoding="chunked"),
        answer(b"<!--" + b"x" * 70_000 + b"-->" + page(PARAGRAPHS), transfer_encoding="chunked"),
        answer(b"%x\r\n" % len(page(PARAGRAPHS)) + page(PARAGRAPHS) + b"\r\n0\r\n\r\n", transfer_encoding="chunked"),
    ],
    ids=[
        *("plain", "http2", "cut", "gzip", "deflate", "gzip undone", "br undone"),
        *("chunked undone", "chunked undone, a long line", "chunked"),
    ],
)
def test_a_response_gives_its_page_however_it_was_sent(tmp_path, record):
    (item,) = text_of(tmp_path, entry("response", record, url="http://a.cn/页"))
    assert (item.text, item.url, item.source) == (TEXT, "http://a.cn/页", "zh_cc")


def test_a_resource_is_read_by_its_own_content_type(tmp_path):
    first, second = text_of(
        tmp_path,
        entry("resource", page(PARAGRAPHS), content_type="application/xhtml+xml; charset=utf-8"),
        entry("resource", b"x", content_type="image/png"),
    )
    assert (first.text, second.reason) == (TEXT, "no_page")


def test_an_encoding_said_a_thousand_times_is_tried_once():
    started = time.process_time()
    pages.text_of(b"\xff" * pages.MAX_PAGE, "text/html; " + "charset=big5; charset=euc-kr;" * 1000)
    assert time.process_time() - started < 10


def nested(depth: int) -> bytes:
    """So many elements in one another below the body, beside enough others to be worth a look."""
    return b"<body>" + b"<div>" * depth + TEXT.encode() + b"</div>" * depth + b"<br>" * 5000


def crowded(attributes: int) -> bytes:
    return b"<p " + b" ".join(b"a%d='>'" % i for i in range(attributes)) + b">" + TEXT.encode()


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        (nested(pages.MAX_DEPTH), nested(pages.MAX_DEPTH + 1), "page_too_deep"),
        (crowded(pages.MAX_ATTRIBUTES), crowded(pages.MAX_ATTRIBUTES + 1), "page_too_deep"),
        (b"x" * pages.MAX_PAGE, b"x" * (pages.MAX_PAGE + 1), "page_too_large"),
    ],
    ids=["depth", "attributes", "size"],
)
def test_each_bound_from_both_sides(tmp_path, good, bad, reason):
    first, second = text_of(tmp_path, entry("response", answer(good)), entry("response", answer(bad)))
    assert first.text and second.reason == reason


ENTITIES = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 30))
MANY = b" ".join(b"a%d" % i for i in range(500_000)) + b">"
EVIL = {
    "billion laughs": f'<!DOCTYPE html [<!ENTITY l0 "lol">{ENTITIES}]><body>&l29;'.encode(),
    "a million deep": b"<div>" * 900_000,
    "a million deep, foreign": b"<svg>" + b"<td>" * 900_000,
    "attributes": b"<div " + b"a b c/d\n" * 200_000,
    "attributes behind a comment": b"<!-- <script> --><p " + MANY,
    "attributes in a style sheet that is none": b"<svg><style><a " + MANY,
    "tags that never end": b"<a" * 2_500_000,
    "tags with spaces that never end": b"<a b" * 1_200_000,
    "tags with quotation marks": b"<a b=\"'" * 600_000,
    "quotation marks": b"<a '\"" * 200_000 + b'<a "' * 300_000,
    "scripts that never end": b"<script>" * 500_000,
    "styles within a script": b"<script>" + b"<style" * 500_000,
    "comments": b"<!--" * 1_000_000,
    "open brackets": b"<" * 4_000_000,
    "tables": b"<table><tr><td>" * 300_000,
}


S = " \t\n\f\r"
VALUE = rf"(?:\"[^\"]*(?:\"|\Z)|'[^']*(?:'|\Z)|[^{S}>\"'][^{S}>]*)?"
ATTRIBUTE = re.compile(rf"[{S}/]*[^{S}/>][^{S}/>=]*(?:[{S}]*=[{S}]*{VALUE})?")
TAGS = st.lists(st.sampled_from(["<a", "<", "a", "b", "=", '"', "'", "/", ">", " ", "\n", "<!--", "é"]), max_size=40)


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(TAGS.map("".join))
def test_attributes_are_counted_as_the_standard_reads_each_tag_and_never_fewer_than_the_parser_finds(html):
    most = 0
    for name in re.finditer(rf"(?=(<[a-zA-Z][^{S}/>]*))", html):  # one may hold another's beginning
        count, place = 0, name.end(1)
        while found := ATTRIBUTE.match(html, place):
            count, place = count + 1, found.end()
        most = max(most, count)
    counted = pages.most_attributes(np.frombuffer(html.encode(), np.uint8))
    assert counted == most
    elements = HTMLTree.parse(html).document.query_selector_all("*")
    assert counted >= max((len(element.attrs) for element in elements), default=0)


@pytest.mark.parametrize("name", EVIL)
def test_a_page_that_is_made_to_cost_takes_seconds_at_most(name):
    started = time.process_time()
    try:
        assert len(pages.text_of(EVIL[name])) <= len(EVIL[name])
    except Unusable as error:
        assert error.reason == "page_too_deep"
    assert time.process_time() - started < 10
