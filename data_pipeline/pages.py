"""The text of HTML pages. They come from anybody and parsers have worst cases, so size, depth and tags have bounds."""

import codecs
import re

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5
from resiliparse.parse.html import DOMContext, HTMLTree, traverse_dom

from data_pipeline.archives import Unusable

MAX_PAGE = 5 << 20  # bytes of HTML; Common Crawl cuts there, too
MAX_DEPTH = 512  # of elements in one another, as in browsers; the extractor's time grows with the square
_FEW_TAGS = 4096  # so many are never deep enough to matter
_WRONG = 0.01  # share of characters that may be wrong in a page's own encoding
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
# A tag with 2,000 attributes or more: a parser compares each with all before it.
_CROWDED = re.compile(r"<[a-zA-Z](?:(?:[^\s/\"'>]++|\"[^\"]*+\"|'[^']*+')*+[\s/]++){2000}")
_HIDDEN = re.compile(r"<(script|style)\b", re.IGNORECASE)
_HIDDEN_END = {name: re.compile(f"</{name}", re.IGNORECASE) for name in ("script", "style")}


def text_of(body: bytes, content_type: str = "") -> str:
    """The text of a page's main content, a line for each paragraph or other block.

    Raises:
      Unusable: the page is larger, deeper or has larger tags than any page for people.
    """
    if len(body) > MAX_PAGE:
        raise Unusable("page_too_large", f"{len(body):,} bytes, the limit is {MAX_PAGE:,}")
    html = _decode(body, content_type)
    if _CROWDED.search(_without_scripts(html)):
        raise Unusable("page_too_deep", "a tag with thousands of attributes")
    tree = HTMLTree.parse(html)
    if html.count("<") > _FEW_TAGS and tree.body is not None:
        traverse_dom(tree.body, _refuse_depth, elements_only=True)
    options = dict.fromkeys(("list_bullets", "alt_texts", "comments", "post_meta"), False)
    return extract_plain_text(tree, main_content=True, preserve_formatting=True, **options)


def _refuse_depth(place: DOMContext) -> None:
    if place.depth > MAX_DEPTH:
        raise Unusable("page_too_deep", f"more than {MAX_DEPTH} elements in one another")


def _without_scripts(html: str) -> str:
    """The page without scripts and style sheets, whose `<` and quotation marks are no tags'; in linear time."""
    pieces, end = [], 0
    while start := _HIDDEN.search(html, end):
        pieces.append(html[end : start.start()])
        closing = _HIDDEN_END[start.group(1).lower()].search(html, start.end())
        if closing is None:
            return "".join(pieces)
        end = closing.start()
    return "".join(pieces) + html[end:]


def _decode(body: bytes, content_type: str) -> str:
    """UTF-8 where it is valid, whatever the page says of itself; else what it says, else what it looks like."""
    try:  # a character cut in two at the end is no error
        return codecs.getincrementaldecoder("utf-8-sig")().decode(body)
    except UnicodeDecodeError:
        pass
    said = [match.group(1) for match in _CHARSET.finditer(content_type)]
    for name in (*said, detect_encoding(body, from_html_meta=True), detect_encoding(body)):
        name = map_encoding_to_html5(name or "utf-8")
        try:
            text = body.decode("gb18030" if name == "gbk" else name, "replace")
        except LookupError:  # one that browsers know and Python does not
            continue
        if text.count("\ufffd") <= _WRONG * len(text):
            return text
    return body.decode("utf-8", "replace")
