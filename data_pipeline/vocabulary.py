"""Our tokenizers as SeqIO vocabularies."""

from collections.abc import Iterable

import numpy as np
import seqio
import tensorflow as tf

from ctllm_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer


def vocabulary(tokenizer: Tokenizer) -> seqio.Vocabulary:
    """The SeqIO vocabulary of a tokenizer: SeqIO's own for a SentencePiece model, `TokenizerVocabulary` otherwise."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return seqio.SentencePieceVocabulary(str(tokenizer.file))
    return TokenizerVocabulary(tokenizer)


class TokenizerVocabulary(seqio.Vocabulary):
    """Any of our tokenizers as a SeqIO vocabulary; its TensorFlow side calls back into Python.

    SeqIO takes every id 0 for padding. Where 0 is a piece of the vocabulary, converters that pack cut as many tokens
    off a text's end as there are zeros in it, and the others give that piece no loss weight.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    @property
    def bos_id(self) -> int | None:
        return self._tokenizer.bos_id

    @property
    def eos_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def unk_id(self) -> None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self._tokenizer.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        """int32 [tokens] of a scalar text."""

        def encode(text: np.ndarray | bytes) -> np.ndarray:
            return self._tokenizer.encode_arrays([np.asarray(text).item().decode()])[0]

        return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32, stateful=False), [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Text [...] of ids [..., tokens], each up to its first end of document."""

        def decode(rows: np.ndarray) -> np.ndarray:
            leading = rows.shape[:-1]
            flat = rows.reshape(int(np.prod(leading)), rows.shape[-1])
            return np.array([self.decode(row.tolist()).encode() for row in flat], object).reshape(leading)

        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string, stateful=False), ids.shape[:-1])

    def decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """As SeqIO's, which would show the ids behind the end as piece 0."""
        return self._decode_tf(ids)

    def __eq__(self, other: object) -> bool:  # tasks of a mixture must have equal vocabularies
        return isinstance(other, TokenizerVocabulary) and self._tokenizer.digest == other._tokenizer.digest

    def __hash__(self) -> int:
        return hash(self._tokenizer.digest)

    def __str__(self) -> str:
        return f"TokenizerVocabulary(file={self._tokenizer.file}, digest={self._tokenizer.digest})"
