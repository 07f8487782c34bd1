"""What is taken out of a text, or put in another form, before it is measured and kept.

Every function runs in linear time on any text. `reference_links` has the released script's three expressions as they
are; `remove_links_as_released` does the same without their quadratic worst case.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

from ctllm_jax.common.errors import UserError

LINK_RULES = ("keep", "remove", "released")


@dataclasses.dataclass(frozen=True)
class RewriteConfig:
    """What filters change in a text.

    punctuation: full-width punctuation becomes ASCII, as in the released MAP-CC. It harms: models learn to write so.
    links: 'keep' them, 'remove' web addresses, or all that the 'released' script takes for one (`numpy.array`).
    simplify: Chinese texts in traditional characters become simplified, by OpenCC's phrases and characters (乾隆 stays,
      餅乾 is 饼干). Deduplication, which only compares, has classes of characters instead (`dedup/variants.py`).
    licence_headers: of code files, the leading comment with a licence or copyright moves to `meta.licence_header`.
    """

    punctuation: bool
    links: str
    simplify: bool
    licence_headers: bool

    def __post_init__(self) -> None:
        if self.links not in LINK_RULES:
            raise UserError(f"filters.rewrite.links: {self.links!r} is not one of {', '.join(LINK_RULES)}")


def rewrite(text: str, config: RewriteConfig) -> str:
    """A natural text in the form in which it is kept."""
    if config.punctuation:
        text = unify_punctuation(text)
    return {"keep": str, "remove": remove_links, "released": remove_links_as_released}[config.links](text)


def simplify(text: str) -> str:
    """The text in the simplified characters of mainland China."""
    return _to_simplified()(text)


@functools.cache
def _to_simplified() -> Callable[[str], str]:
    import opencc  # only where it is asked for

    return opencc.OpenCC("t2s").convert


_WIDE = "。！“”＃＄％＆‘’（）＊＋，－／：；＜＝＞？＠［＼］＾＿｀｛｜｝～"
_NARROW = ".!\"\"#$%&''()*+,-/:;<=>?@[\\]^_`{|}~"
_TO_NARROW = str.maketrans(_WIDE, _NARROW)


def unify_punctuation(text: str) -> str:
    """The released script's 34 replacements; 、《》〈〉「」… and full-width letters stay."""
    return text.translate(_TO_NARROW)


_MARKDOWN_LINK = re.compile(r"\[([^\[\]\n]{0,200})\]\((?:https?|ftp)://[^\s()<>]*\)")
_WEB_LINK = re.compile(r"(?:(?:https?|ftp)://|(?<![a-zA-Z0-9_.])www\.)[^\s\"<>\\^`{|}\u0080-\U0010ffff]+")
_HOSTED = r"(?:com|cn|net|org|edu|gov|top|xyz|info|cc|me|io|tv)"
_BARE_LINK = re.compile(rf"(?<![a-zA-Z0-9_@./-])(?:[a-zA-Z0-9-]{{1,63}}\.){{1,4}}{_HOSTED}/[!#-;=?-Z_a-z~]+")
_OPENING = {")": "(", "]": "["}


def remove_links(text: str) -> str:
    """Without web addresses: a scheme or `www.` in front, or a well-known domain with a path behind.

    Marks that end the sentence around an address stay; of a Markdown link its words stay. `numpy.array`, file names
    and version numbers are no addresses.
    """
    if "/" not in text and "www." not in text:
        return text
    text = _MARKDOWN_LINK.sub(r"\1", text)
    text = _WEB_LINK.sub(_trailing_marks, text)
    return _BARE_LINK.sub(_trailing_marks, text)


def _trailing_marks(match: re.Match) -> str:
    """What of a matched address is the sentence's: marks at its end, brackets that it did not open."""
    link = match.group()
    surplus = {closing: link.count(closing) - link.count(opening) for closing, opening in _OPENING.items()}
    end = len(link)
    while end:
        mark = link[end - 1]
        if surplus.get(mark, 0) > 0:
            surplus[mark] -= 1
        elif mark not in ".,;:!?'*":
            break
        end -= 1
    return link[end:]


_RELEASED_LINK = re.compile(r"(?:https?://|www\.)[^\s,，\u4e00-\u9fff]*")
_DOTTED = re.compile(r"(?:[a-zA-Z0-9-]+\.){3,}[a-zA-Z0-9.-]+")
_NAME = re.compile(r"(?<![\u4e00-\u9fff])\b[a-zA-Z0-9.-]+\.[a-z]{2,6}\b")
_RUN = re.compile(r"[a-zA-Z0-9.-]+")
_NAME_START = re.compile(r"(?<![\u4e00-\u9fff])\b[a-zA-Z0-9.-]")
_NAME_END = re.compile(r"\.[a-z]{2,6}\b")


def reference_links(text: str) -> str:
    """The released script's link removal, as its three expressions read."""
    for expression in (_RELEASED_LINK, _DOTTED, _NAME):
        text = expression.sub("", text)
    return text


def remove_links_as_released(text: str) -> str:
    """As `reference_links`, in linear time."""
    if "." not in text and "://" not in text:
        return text
    text = _RELEASED_LINK.sub("", text)
    text = _without(text, _dotted)
    return _without(text, _name)


def _without(text: str, find: Callable[[str, re.Match], tuple[int, int] | None]) -> str:
    """The text without what `find` returns, (begin, end), for each run of letters, digits, dots and hyphens."""
    pieces, done = [], 0
    for run in _RUN.finditer(text):
        if "." in run.group() and (span := find(text, run)):
            pieces.append(text[done : span[0]])
            done = span[1]
    return "".join(pieces) + text[done:]


def _dotted(text: str, run: re.Match) -> tuple[int, int] | None:
    """From the first three names in a row, each with a dot behind it and something after, to the run's end."""
    names = run.group().split(".")
    begin = run.start()
    for i in range(len(names) - 3):
        if names[i] and names[i + 1] and names[i + 2] and (i + 4 < len(names) or names[i + 3]):
            return begin, run.end()
        begin += len(names[i]) + 1
    return None


def _name(text: str, run: re.Match) -> tuple[int, int] | None:
    """From the first place where a name may begin to the last ending that looks like a top-level domain."""
    start = _NAME_START.search(text, run.start(), run.end())
    if start is None:
        return None
    end = None
    for ending in _NAME_END.finditer(text, start.start() + 1, run.end() + 1):  # what follows decides on the last \b
        end = ending.end()
    return (start.start(), end) if end else None


_COMMENT = re.compile(r"\s*(?://|#|/\*|\*|--|;|%|<!--|\"\"\"|''')")
_LICENCE = re.compile(r"copyright|licen[cs]e|\(c\)\s*(?:19|20)\d\d|spdx", re.IGNORECASE)
_FIRST_LINES = re.compile(r"#!|# ?-\*-|<\?")  # shebang, encoding, XML declaration: they stay where they are
_HEADER_LINES = 200


def take_licence_header(text: str) -> tuple[str, str]:
    """(licence header, rest) of a source file: its leading comment, if it speaks of licence or copyright; else ''."""
    lines = text.split("\n")
    begin = 0
    while begin < len(lines) and (not lines[begin].strip() or _FIRST_LINES.match(lines[begin])):
        begin += 1
    end = begin
    closing = None
    while end < min(len(lines), begin + _HEADER_LINES):
        line = lines[end].strip()
        if closing is None and not _COMMENT.match(line):
            break
        closing = _still_open(line, closing)
        end += 1
    header = "\n".join(lines[begin:end])
    if closing is not None or not _LICENCE.search(header):
        return "", text
    return header, "\n".join([*lines[:begin], *lines[end:]]).lstrip("\n")


_BLOCKS = {"/*": "*/", "<!--": "-->", '"""': '"""', "'''": "'''"}


def _still_open(line: str, closing: str | None) -> str | None:
    """What would close the block comment that is open after this line, if one is."""
    if closing is None:
        opening = next((mark for mark in _BLOCKS if line.startswith(mark)), None)
        if opening is None:
            return None
        line, closing = line[len(opening) :], _BLOCKS[opening]
    return None if closing in line else closing
