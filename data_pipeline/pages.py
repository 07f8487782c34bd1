"""The text of HTML pages. They come from anybody and parsers have worst cases, so size, depth and tags have bounds."""

import codecs
import re

import numba
import numpy as np
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5
from resiliparse.parse.html import DOMContext, HTMLTree, traverse_dom

from data_pipeline.archives import Unusable

MAX_PAGE = 5 << 20  # bytes of HTML; Common Crawl cuts there, too
MAX_ATTRIBUTES = 4096  # of a tag: a parser compares each with all before it
MAX_DEPTH = 512  # of elements in one another, as in browsers; the extractor's time grows with the square
_FEW_TAGS = 4096  # so many are never deep enough to matter
_WRONG = 0.01  # share of characters that may be wrong in a page's own encoding
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
# What a tokenizer of HTML is in, within a tag; all else, as a tag's end, is _OUTSIDE.
_TAG, _BEFORE, _NAME, _AFTER, _VALUE, _DOUBLE, _SINGLE, _BARE = range(8)
_OUTSIDE = -1


def text_of(body: bytes, content_type: str = "") -> str:
    """The text of a page's main content, a line for each paragraph or other block.

    Raises:
      Unusable: the page is larger, deeper or has larger tags than any page for people.
    """
    if len(body) > MAX_PAGE:
        raise Unusable("page_too_large", f"{len(body):,} bytes, the limit is {MAX_PAGE:,}")
    html = _decode(body, content_type)
    if most_attributes(np.frombuffer(html.encode("utf-8", "replace"), np.uint8)) > MAX_ATTRIBUTES:
        raise Unusable("page_too_deep", f"a tag with more than {MAX_ATTRIBUTES:,} attributes")
    tree = HTMLTree.parse(html)
    if html.count("<") > _FEW_TAGS and tree.body is not None:
        traverse_dom(tree.body, _refuse_depth, elements_only=True)
    options = dict.fromkeys(("list_bullets", "alt_texts", "comments", "post_meta"), False)
    return extract_plain_text(tree, main_content=True, preserve_formatting=True, **options)


def _refuse_depth(place: DOMContext) -> None:
    if place.depth > MAX_DEPTH:
        raise Unusable("page_too_deep", f"more than {MAX_DEPTH} elements in one another")


@numba.njit(cache=True, nogil=True)
def most_attributes(html_T: np.ndarray) -> int:
    """The most attributes of a tag, if one begins wherever a `<` stands before a letter: what is a comment or a script
    the parser knows, and a page may hide it. In linear time: of all tags that a tokenizer could be in at one place and
    in one state, the one with the most attributes stands for the others.

    html_T: uint8 [T], the page in UTF-8.
    """
    counts, later = np.full(8, -1, np.int64), np.empty(8, np.int64)  # by state; -1: no tag is in it
    most, inside, opened = 0, False, False
    for code in html_T:
        if inside:
            later[:] = -1
            inside = False
            for state in range(8):
                if counts[state] >= 0:
                    following = _next(state, code)
                    if following != _OUTSIDE:
                        begun = following == _NAME and state != _NAME
                        later[following] = max(later[following], counts[state] + begun)
                        most = max(most, later[following])
                        inside = True
            counts, later = later, counts
        if opened and (65 <= code <= 90 or 97 <= code <= 122):
            counts[_TAG] = max(counts[_TAG], 0)
            inside = True
        opened = code == 60
    return most


@numba.njit(cache=True, nogil=True)
def _next(state: int, code: int) -> int:
    """The state behind a character (HTML Living Standard, 13.2.5.8 and 13.2.5.32 to 13.2.5.40)."""
    space = code == 32 or code == 9 or code == 10 or code == 12 or code == 13
    if state == _DOUBLE:
        return _BEFORE if code == 34 else _DOUBLE
    if state == _SINGLE:
        return _BEFORE if code == 39 else _SINGLE
    if code == 62:  # >
        return _OUTSIDE
    if state == _BARE:
        return _BEFORE if space else _BARE
    if state == _VALUE:
        if space:
            return _VALUE
        return _DOUBLE if code == 34 else _SINGLE if code == 39 else _BARE
    if space:
        return _AFTER if state == _NAME or state == _AFTER else _BEFORE
    if code == 47:  # /
        return _BEFORE
    if code == 61 and (state == _NAME or state == _AFTER):  # =
        return _VALUE
    return _TAG if state == _TAG else _NAME


def _decode(body: bytes, content_type: str) -> str:
    """UTF-8 where it is valid, whatever the page says of itself; else what it says, else what it looks like."""
    try:  # a character cut in two at the end is no error
        return codecs.getincrementaldecoder("utf-8-sig")().decode(body)
    except UnicodeDecodeError:
        pass
    said = [match.group(1) for match in _CHARSET.finditer(content_type)]
    names = (*said, detect_encoding(body, from_html_meta=True), detect_encoding(body))
    for name in dict.fromkeys(map_encoding_to_html5(name or "utf-8") for name in names):
        try:
            text = body.decode("gb18030" if name == "gbk" else name, "replace")
        except LookupError:  # one that browsers know and Python does not
            continue
        if text.count("\ufffd") <= _WRONG * len(text):
            return text
    return body.decode("utf-8", "replace")
