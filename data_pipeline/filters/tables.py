"""What Unicode says of each code point, as arrays that compiled code can look things up in.

Planes 4 to 13 hold nothing and planes 15 and 16 private characters: no rule tells them apart, so the tables are
filled for the others alone.
"""

import dataclasses
import functools
import string
import unicodedata
from collections.abc import Iterator

import numpy as np

CODES = 0x110000
SENTENCE_ENDS = '.!?;"…。！？；”'
BULLETS = "•●○■□▪▫※·➢‣▶◀◦–"
_HAN = (range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0xF900, 0xFB00), range(0x20000, 0x40000))
_KANA_HANGUL = (
    *(range(0x1100, 0x1200), range(0x3040, 0x3100), range(0x3130, 0x3190), range(0x31F0, 0x3200)),
    range(0xAC00, 0xD7B0),
)
SPACE, WORD, DIGIT, PUNCTUATION, ASCII_PUNCTUATION, SENTENCE_END, BULLET, HAN, KANA_HANGUL = (
    1 << bit for bit in range(9)
)


def _assigned() -> Iterator[int]:
    yield from range(0x40000)
    yield from range(0xE0000, 0xE0200)


@functools.cache
def categories() -> np.ndarray:
    """[CODES] uint8: first letter of each code point's Unicode category (L letter, N number, P ...)."""
    table = np.full(CODES, ord("C"), np.uint8)
    for code in _assigned():
        table[code] = ord(unicodedata.category(chr(code))[0])
    return table


@functools.cache
def flags() -> np.ndarray:
    """[CODES] uint16, a sum of: SPACE (as str.strip takes it), WORD (regular expressions' \\w), DIGIT (their \\d),
    PUNCTUATION (category P), ASCII_PUNCTUATION (and …), SENTENCE_END, BULLET, HAN and KANA_HANGUL (of WORD)."""
    table = np.zeros(CODES, np.uint16)
    for code in _assigned():
        character = chr(code)
        table[code] = SPACE * character.isspace() + WORD * character.isalnum() + DIGIT * character.isdecimal()
    table[ord("_")] |= WORD
    table[categories() == ord("P")] |= PUNCTUATION
    for flag, ranges in ((HAN, _HAN), (KANA_HANGUL, _KANA_HANGUL)):
        codes = np.concatenate([np.arange(part.start, part.stop) for part in ranges])
        table[codes[(table[codes] & WORD) != 0]] |= flag
    for flag, members in (
        (ASCII_PUNCTUATION, string.punctuation + "…"),
        (SENTENCE_END, SENTENCE_ENDS),
        (BULLET, BULLETS),
    ):
        table[[ord(member) for member in members]] |= flag
    return table


@dataclasses.dataclass(frozen=True)
class Compatibility:
    """NFKC, character by character.

    image: [CODES] uint32: what a code point becomes; from CODES on: CODES + k where it becomes several, namely
      text[starts[k] : starts[k + 1]].
    joins: [CODES] bool: it may combine or change places with what stands before. A text without such a character is
      normalised character by character.
    """

    image: np.ndarray
    text: np.ndarray
    starts: np.ndarray
    joins: np.ndarray


@functools.cache
def compatibility() -> Compatibility:
    """The table of NFKC."""
    seconds = {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}  # vowels and finals of Hangul, composed by rule
    for code in _assigned():
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            seconds.add(int(parts[1], 16))
    image, joins = np.arange(CODES, dtype=np.uint32), np.zeros(CODES, bool)
    text: list[int] = []
    starts = [0]
    for code in _assigned():
        if unicodedata.is_normalized("NFKC", chr(code)):
            first = unicodedata.normalize("NFKD", chr(code))[0]
        else:
            becomes = unicodedata.normalize("NFKC", chr(code))
            first = unicodedata.normalize("NFKD", becomes)[0]
            if len(becomes) == 1:
                image[code] = ord(becomes)
            else:
                image[code] = CODES + len(starts) - 1
                text += map(ord, becomes)
                starts.append(len(text))
        joins[code] = unicodedata.combining(first) != 0 or ord(first) in seconds
    return Compatibility(image, np.array(text, np.uint32), np.array(starts, np.int64), joins)
