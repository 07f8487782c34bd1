"""Tokenizers: a SentencePiece model (ours, or Baichuan2's as CT-LLM used) or a Hugging Face tokenizer.json."""

import hashlib
import importlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Sequence

import numpy as np

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import atomic_file

# Special pieces inside the vocabulary. Control pieces: text that merely looks like one is never parsed as one.
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_PIECES = (SYSTEM, USER, ASSISTANT, END)

# Files that belong to a tokenizer file and lie beside it, where there are any.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

# Kinds of pieces, see `Tokenizer.pieces`.
SPECIAL, BYTE, TEXT = "special", "byte", "text"


class Tokenizer:
    """Text to ids and back. Special ids vanish in decoding and, unless asked for, are never produced from text.

    Attributes:
      file: the model file it was read from.
      vocab_size: number of ids.
      bos_id, eos_id: ids that open and close a document; bos_id is None where the vocabulary has none.
      pad_id: what others fill rows up with, or None; here padding is told by its place.
      digest: SHA-256 (16 hex digits) of the model file, which gives each id its piece. Settings and chat template
        beside it are not in it.
    """

    file: pathlib.Path
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    digest: str

    @property
    def opening_id(self) -> int:
        """What a text follows where something has to come before it: `bos_id`, or `eos_id` where there is none."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @property
    def start_ids(self) -> list[int]:
        """What a document or a conversation begins with: `bos_id`, or nothing where there is none."""
        return [] if self.bos_id is None else [self.bos_id]

    @property
    def files(self) -> list[pathlib.Path]:
        """The model file, and of COMPANIONS those that lie beside it."""
        beside = [self.file.with_name(name) for name in COMPANIONS]
        return [self.file, *(file for file in beside if file.exists())]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special ids; on one core (processes are the caller's business).

        Raises:
          UserError: a text holds a lone surrogate, which UTF-8 cannot.
        """
        raise NotImplementedError

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` as int32 arrays: the way to encode much."""
        return [np.array(ids, np.int32) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ids give nothing (SentencePiece shows its unknown piece), broken UTF-8 gives U+FFFD."""
        raise NotImplementedError

    def piece_id(self, piece: str) -> int | None:
        """Id of a special piece such as `<|user|>`, or None where the vocabulary lacks it."""
        raise NotImplementedError

    def pieces(self) -> list[tuple[str, str]]:
        """(kind, text) of every id: kind is SPECIAL, BYTE (it stands for a part of a character) or TEXT."""
        raise NotImplementedError

    def copy_to(self, folder: pathlib.Path) -> None:
        """Copies the file, and the settings and chat template beside it, named as `load_tokenizer` looks for them."""
        name = "tokenizer.json" if self.file.suffix == ".json" else "tokenizer.model"
        for source in self.files:
            with atomic_file(folder / (name if source == self.file else source.name)) as temporary:
                shutil.copyfile(source, temporary)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file.

    SentencePiece writes spaces as U+2581 and takes a U+2581 of the text for one: that character comes back as a space.
    Everything else survives where the model has byte fallback and neither normalises nor adds a dummy prefix.
    """

    def __init__(self, file: pathlib.Path):
        spm = importlib.import_module("sentencepiece")
        try:
            self._model = spm.SentencePieceProcessor(model_file=str(file))
        except Exception as error:
            raise UserError(f"{file}: not a SentencePiece model ({error})") from None
        self.file = file
        self.digest = _digest(file)
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_id = self._model.eos_id()
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else None
        if self.eos_id < 0:
            raise UserError(f"{file}: the vocabulary has no end-of-document piece")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return self._model.encode(list(texts), num_threads=1)
        except (RuntimeError, TypeError):
            _refuse_surrogates(texts)
            raise

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            return self._model.encode(list(texts), num_threads=1, return_type="numpy")
        except (RuntimeError, TypeError):
            _refuse_surrogates(texts)
            raise

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def piece_id(self, piece: str) -> int | None:
        found = self._model.piece_to_id(piece)
        return None if found == self._model.unk_id() else found

    def pieces(self) -> list[tuple[str, str]]:
        def kind(i: int) -> str:
            if self._model.is_control(i) or self._model.is_unknown(i) or self._model.is_unused(i):
                return SPECIAL
            return BYTE if self._model.is_byte(i) else TEXT

        names = self._model.id_to_piece(list(range(self.vocab_size)))
        return [(kind(i), name.replace("\u2581", " ")) for i, name in enumerate(names)]


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`; the special ids come from `tokenizer_config.json` beside it.

    A text that spells a special piece (`<s>`) is text here, not that piece's id as in transformers. Truncation and
    padding that the file sets are switched off: both would change documents in silence.
    """

    def __init__(self, file: pathlib.Path):
        tokenizers = importlib.import_module("tokenizers")
        try:
            self._model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise UserError(f"{file}: not a tokenizer.json ({error})") from None
        self._model.encode_special_tokens = True  # as the text that they are
        self._model.no_truncation()
        self._model.no_padding()
        self.file = file
        self.digest = _digest(file)
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())  # added ids may leave gaps
        settings_file = file.with_name("tokenizer_config.json")
        settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.exists() else {}
        self.bos_id = self._special(settings.get("bos_token"))
        eos_id = self._special(settings.get("eos_token"))
        if eos_id is None:
            raise UserError(f"{settings_file}: eos_token is missing or not in the vocabulary")
        self.eos_id, self.pad_id = eos_id, self._special(settings.get("pad_token"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [e.ids for e in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            _refuse_surrogates(texts)
            raise

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece_id(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def piece_name(self, token: int) -> str | None:
        """How the file writes the piece of an id, None where no piece has it."""
        return self._model.id_to_token(token)

    def pieces(self) -> list[tuple[str, str]]:
        added = self._model.get_added_tokens_decoder()

        def piece(i: int) -> tuple[str, str]:
            name = self._model.id_to_token(i)
            if name is None or (i in added and added[i].special):
                return SPECIAL, name or ""
            text = self._model.decode([i], skip_special_tokens=False)
            part = "\ufffd" in text or re.fullmatch("<0x[0-9A-F]{2}>", name)
            return (BYTE, name) if part else (TEXT, text)

        return [piece(i) for i in range(self.vocab_size)]

    def _special(self, entry: str | dict | None) -> int | None:
        piece = entry.get("content") if isinstance(entry, dict) else entry
        return None if piece is None else self._model.token_to_id(piece)


def load_tokenizer(location: str | os.PathLike) -> Tokenizer:
    """Loads a `.model` or `tokenizer.json` file, or the one in a folder.

    Where a folder has both, tokenizer.json counts: the folder is Hugging Face's, whose users get that one, with pieces
    that were added to the model's and that the chat template may need. Folders of ours have one of the two.

    Raises:
      UserError: there is none, or it is broken.
    """
    path = pathlib.Path(location)
    if path.is_dir():
        candidates = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).exists()]
        if not candidates:
            raise UserError(f"{path}: holds neither tokenizer.model nor tokenizer.json")
        path = candidates[0]
    if not path.exists():
        raise UserError(f"{path}: no such tokenizer file")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _digest(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def lone_surrogate(text: str) -> str | None:
    """Where a text has half of a surrogate pair, which UTF-8 cannot hold and no tokenizer takes; None if nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X})"
        return f"{place}, which UTF-8 does not have; repair the text or leave it out"
    return None


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for number, text in enumerate(texts):
        if problem := lone_surrogate(text):
            raise UserError(f"text {number} cannot be encoded: {problem}")
