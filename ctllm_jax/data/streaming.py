"""Text while its ids are still coming: no broken character, nothing of a stop string, in linear time.

What comes out, put together, is what `Tokenizer.decode` gives of all ids.
"""

import codecs
import functools
import json
from collections.abc import Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.tokenizer import BYTE, SPECIAL, HuggingFaceTokenizer, Tokenizer

# Decoders of a tokenizer.json whose text of an id depends on nothing before but whether it is the first.
LOCAL_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class Detokenizer:
    """Ids to text, one at a time."""

    def push(self, token: int) -> str:
        """The text that is certain once this id is there."""
        raise NotImplementedError

    def finish(self) -> str:
        """The rest, when no further id comes: U+FFFD for what is left of a character."""
        raise NotImplementedError


def detokenizer(tokenizer: Tokenizer) -> Detokenizer:
    """A fresh one.

    Raises:
      UserError: the tokenizer.json decodes in a way that is not known here.
    """
    return _maker(tokenizer)()


@functools.lru_cache(maxsize=8)
def _maker(tokenizer: Tokenizer):
    """The class with its tables, which take a second to make for a large vocabulary."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return functools.partial(_Pieces, _PieceTable(tokenizer, by_character=True))
    kinds = _decoder_kinds(tokenizer)
    if kinds == {"ByteLevel"}:
        return functools.partial(_ByteLevel, _byte_level_table(tokenizer))
    if kinds <= LOCAL_DECODERS:
        return functools.partial(_Pieces, _PieceTable(tokenizer, by_character=False))
    raise UserError(
        f"{tokenizer.file}: its decoder ({', '.join(sorted(kinds))}) cannot be streamed; known are ByteLevel and "
        f"those made of {', '.join(sorted(LOCAL_DECODERS))}"
    )


def _decoder_kinds(tokenizer: HuggingFaceTokenizer) -> set[str]:
    settings = json.loads(tokenizer.file.read_text(encoding="utf-8")).get("decoder") or {"type": "none"}
    parts = settings["decoders"] if settings["type"] == "Sequence" else [settings]
    return {part["type"] for part in parts}


# ---- Byte-level vocabularies: every piece is bytes


class _ByteLevel(Detokenizer):
    def __init__(self, table: list[bytes]):
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._table[token])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def _byte_level_table(tokenizer: HuggingFaceTokenizer) -> list[bytes]:
    """The bytes of every id; special ones have none. A piece with a character that stands for no byte is text."""
    byte_of = _byte_of_character()

    def entry(kind: str, name: str | None) -> bytes:
        if kind == SPECIAL or name is None:
            return b""
        known = all(character in byte_of for character in name)
        return bytes(byte_of[character] for character in name) if known else name.encode()

    kinds = [kind for kind, _ in tokenizer.pieces()]
    return [entry(kind, tokenizer.piece_name(i)) for i, kind in enumerate(kinds)]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


# ---- Pieces of text with single bytes to fall back on


class _PieceTable:
    """What the ids of a vocabulary are.

    Attributes:
      silent: ids that give no text.
      byte_of: id to byte; None for a piece that holds a part of a character otherwise.
      by_character: whether each character of a run of bytes is decoded by itself, as SentencePiece does, and ids
        without text end a run. In a tokenizer.json one wrong byte makes the whole run U+FFFD, and such ids are gone
        before it is decoded.
    """

    def __init__(self, tokenizer: Tokenizer, by_character: bool):
        pieces = tokenizer.pieces()
        self.by_character = by_character
        self.byte_of = {i: _byte(name) for i, (kind, name) in enumerate(pieces) if kind == BYTE}
        self._tokenizer = tokenizer
        # A piece to stand before others: what comes first in a text is decoded in its own way.
        self._before, self._before_text = next(
            (i, text) for i in range(len(pieces)) if pieces[i][0] not in (BYTE, SPECIAL) and (text := self.first([i]))
        )
        special = [i for i, (kind, _) in enumerate(pieces) if kind == SPECIAL]
        self.silent = frozenset(i for i in special if not self.later([i]))

    def first(self, ids: Sequence[int]) -> str:
        """Text of the ids that a text begins with."""
        return self._tokenizer.decode(ids)

    def later(self, ids: Sequence[int]) -> str:
        """Text of ids that stand after others."""
        return self._tokenizer.decode([self._before, *ids])[len(self._before_text) :]


def _byte(name: str) -> int | None:
    return int(name[3:5], 16) if len(name) == 6 and name.startswith("<0x") else None


class _Pieces(Detokenizer):
    def __init__(self, table: _PieceTable):
        self._table = table
        self._run: list[int] = []  # ids of bytes whose text is not certain
        self._opening: list[int] | None = []  # all ids so far, while they have given no text

    def push(self, token: int) -> str:
        table = self._table
        if token in table.silent:
            return self.finish() if table.by_character else ""
        if token not in table.byte_of:
            return self.finish() + self._text([token])
        self._run.append(token)
        if not table.by_character:
            return ""
        certain = settled(bytes(table.byte_of[i] for i in self._run))
        ready, self._run = self._run[:certain], self._run[certain:]
        return self._text(ready)

    def finish(self) -> str:
        run, self._run = self._run, []
        return self._text(run)

    def _text(self, ids: list[int]) -> str:
        if not ids:
            return ""
        if self._opening is None:
            return self._table.later(ids)
        self._opening += ids
        text = self._table.first(self._opening)
        if text:
            self._opening = None
        return text


def settled(run: bytes) -> int:
    """How many bytes at the beginning belong to characters that are whole, or broken whatever follows."""
    done = 0
    while done < len(run):
        size = _character_size(run[done])
        there = run[done : done + size]
        if len(there) < size and all(0x80 <= byte < 0xC0 for byte in there[1:]):
            break  # may still become one
        try:
            there.decode()
            done += size
        except UnicodeDecodeError:
            done += 1
    return done


def _character_size(byte: int) -> int:
    return 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1


# ---- Stop strings


class StopFinder:
    """Text up to the stop string that is complete first. What may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that belongs to no stop string; once one is found, nothing more."""
        if self.found:
            return ""
        self._held += text
        ends = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            place = min(ends)[1]
            text, self._held = self._held[:place], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def finish(self) -> str:
        """What was held back, when no further text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
