"""Tokenizers: a SentencePiece model (ours, or Baichuan2's as CT-LLM used) or a Hugging Face tokenizer.json."""

import hashlib
import importlib
import json
import os
import pathlib
from collections.abc import Sequence

from ctllm_jax.common.errors import UserError

# Special pieces inside the vocabulary. Control pieces: text that merely looks like one is never parsed as one.
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_PIECES = (SYSTEM, USER, ASSISTANT, END)


class Tokenizer:
    """Text to ids and back. Special ids are never produced from text and vanish in decoding.

    Attributes:
      file: the model file it was read from.
      vocab_size: number of ids.
      bos_id, eos_id: ids that open and close a document; bos_id is None where the vocabulary has none.
      digest: SHA-256 (16 hex digits) of the model file.
    """

    file: pathlib.Path
    vocab_size: int
    bos_id: int | None
    eos_id: int
    digest: str

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special ids."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ids give nothing, broken UTF-8 gives U+FFFD."""
        raise NotImplementedError

    def piece_id(self, piece: str) -> int | None:
        """Id of a special piece such as `<|user|>`, or None where the vocabulary lacks it."""
        raise NotImplementedError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file."""

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
        if self.eos_id < 0:
            raise UserError(f"{file}: the vocabulary has no end-of-document piece")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def piece_id(self, piece: str) -> int | None:
        found = self._model.piece_to_id(piece)
        return None if found == self._model.unk_id() else found


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`; the special ids come from `tokenizer_config.json` beside it."""

    def __init__(self, file: pathlib.Path):
        tokenizers = importlib.import_module("tokenizers")
        try:
            self._model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise UserError(f"{file}: not a tokenizer.json ({error})") from None
        self.file = file
        self.digest = _digest(file)
        self.vocab_size = self._model.get_vocab_size(with_added_tokens=True)
        settings_file = file.with_name("tokenizer_config.json")
        settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.exists() else {}
        self.bos_id = self._special(settings.get("bos_token"))
        eos_id = self._special(settings.get("eos_token"))
        if eos_id is None:
            raise UserError(f"{settings_file}: eos_token is missing or not in the vocabulary")
        self.eos_id = eos_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._model.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece_id(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def _special(self, entry: str | dict | None) -> int | None:
        piece = entry.get("content") if isinstance(entry, dict) else entry
        return None if piece is None else self._model.token_to_id(piece)


def load_tokenizer(location: str | os.PathLike) -> Tokenizer:
    """Loads a `.model` or `tokenizer.json` file, or the one in a folder (`tokenizer.model` is preferred).

    Raises:
      UserError: there is none, or it is broken.
    """
    path = pathlib.Path(location)
    if path.is_dir():
        candidates = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).exists()]
        if not candidates:
            raise UserError(f"{path}: holds neither tokenizer.model nor tokenizer.json")
        path = candidates[0]
    if not path.exists():
        raise UserError(f"{path}: no such tokenizer file")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _digest(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
