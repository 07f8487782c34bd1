"""A SentencePiece BPE model as a `tokenizer.json`, so that peers that read only those work with the same vocabulary.

For models with the properties of `ctllm tokenizer`: identity normalisation, no dummy prefix, byte fallback.
"""

import json
import pathlib

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, models, normalizers

_NORMAL, _USER_DEFINED = 1, 4  # SentencePiece's types of pieces


def write_tokenizer_json(model_file: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Writes tokenizer.json and the tokenizer_config.json that names its special tokens; returns the former's path."""
    model = sentencepiece_model_pb2.ModelProto.FromString(model_file.read_bytes())
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    spec = model.trainer_spec
    tokenizer = Tokenizer(
        models.BPE(vocabulary, _merges(model, vocabulary), unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Control pieces stay plain entries of the vocabulary that no merge makes: text that looks like one is text.
    pieces = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": spec.bos_piece, "eos_token": spec.eos_piece}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json"


def _merges(model: sentencepiece_model_pb2.ModelProto, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, those that SentencePiece would join first in front."""
    ranked = []
    for piece in model.pieces:
        if piece.type == _NORMAL:
            parts = [(piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece))]
            ranked += [(-piece.score, *part) for part in parts if part[0] in vocabulary and part[1] in vocabulary]
    ranked.sort(key=lambda entry: (entry[0], vocabulary[entry[1]], vocabulary[entry[2]]))
    return [(left, right) for _, left, right in ranked]
