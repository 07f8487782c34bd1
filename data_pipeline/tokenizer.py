"""`ctllm tokenizer`: trains a SentencePiece BPE on a sample of MAP-CC and reports how well it covers the corpus.

Properties as of the tokenizer that CT-LLM used (Baichuan2's): identity normalisation, no dummy prefix, every digit its
own piece, pieces of whitespace, byte fallback, coverage 0.9999, pieces of at most 32 characters. Ours keeps every
special token inside the vocabulary and reserves the chat markers.
"""

import collections
import dataclasses
import io
import pathlib
import unicodedata
from collections.abc import Iterator

import sentencepiece
import tensorflow_datasets as tfds
from sentencepiece import sentencepiece_model_pb2

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import atomic_file, write_json
from ctllm_jax.common.manifest import open_stage, stage_fingerprint
from ctllm_jax.common.progress import Progress
from ctllm_jax.data.order import keyed
from ctllm_jax.data.tokenizer import BOS, CHAT_PIECES, EOS, PAD, UNK, Tokenizer, load_tokenizer
from data_pipeline import map_cc


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """What the tokenizer is trained on."""

    corpus: str  # folder of `ctllm corpus`
    vocab_size: int
    sample_bytes: int  # UTF-8 bytes of text to train on, over all subsets
    character_coverage: float  # share of all characters that get a piece; the others are spelt in bytes
    weights: dict[str, float]  # share of each subset in the sample (any scale); empty: by size
    seed: int
    threads: int  # SentencePiece's; the result does not depend on it


def run(config: TokenizerConfig, workdir: str) -> dict:
    """Writes tokenizer.model and report.json; returns the report."""
    made_from = stage_fingerprint(config.corpus, "corpus")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("corpus", "threads")}
    stage = open_stage("tokenizer", 1, workdir, settings, {"corpus": made_from})
    if stage.done:
        return stage.result
    folders = map_cc.subset_folders(config.corpus)
    chosen = _choose(config, folders)
    with Progress("tokenizer: sampling", None, "documents") as progress:
        with atomic_file(stage.folder / "tokenizer.model") as temporary:
            _train(config, _lines(config, folders, chosen, progress), str(temporary))
    result = {"vocab_size": config.vocab_size, "subsets": _report(load_tokenizer(workdir), folders)}
    write_json(stage.folder / "report.json", result)
    return stage.finish(result)


def _documents(folder: str) -> Iterator[tuple[str, str]]:
    """(id, text) of a MAP-CC subset in file order."""
    dataset = tfds.builder_from_directory(folder).as_dataset(split="train", shuffle_files=False)
    for example in dataset.as_numpy_iterator():
        yield example["id"].decode(), example["text"].decode()


def _choose(config: TokenizerConfig, folders: dict[str, str]) -> dict[str, float]:
    """Share of each subset's documents to take, from the byte budget and the weights."""
    sizes = {
        name: sum(len(text.encode()) for _, text in _documents(folder)) for name, folder in sorted(folders.items())
    }
    unknown = sorted(set(config.weights) - set(sizes))
    if unknown:
        raise UserError(f"tokenizer: weight given for {unknown[0]!r}, the corpus has {', '.join(sizes)}")
    weights = config.weights or {name: float(size) for name, size in sizes.items()}
    total = sum(weights.values())
    return {
        name: min(1.0, config.sample_bytes * weight / total / sizes[name]) for name, weight in sorted(weights.items())
    }


def _lines(config: TokenizerConfig, folders: dict, shares: dict[str, float], progress: Progress) -> Iterator[str]:
    """Lines of the sampled documents; a document is in or out by the hash of its id."""
    for name, share in shares.items():
        for document_id, text in _documents(folders[name]):
            if keyed(config.seed, document_id) < share * 2**64:
                progress.add()
                yield from (line for line in text.split("\n") if line)


def _train(config: TokenizerConfig, lines: Iterator[str], path: str) -> None:
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=written,
            model_type="bpe",
            vocab_size=config.vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            character_coverage=config.character_coverage,
            max_sentencepiece_length=32,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            pad_piece=PAD,
            control_symbols=list(CHAT_PIECES),
            user_defined_symbols=["\n"],  # lines are fed one by one, so BPE never sees it
            num_threads=config.threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"tokenizer: SentencePiece could not train: {error}") from None
    model = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    model.trainer_spec.ClearField("num_threads")  # the one byte that would depend on the machine
    pathlib.Path(path).write_bytes(model.SerializeToString(deterministic=True))


def _report(tokenizer: Tokenizer, folders: dict[str, str]) -> dict[str, dict]:
    """Per subset: fertility, coverage of Han characters by pieces of their own, texts that do not survive."""
    report = {}
    for name, folder in sorted(folders.items()):
        counts = collections.Counter()
        with Progress(f"tokenizer: measuring {name}", None, "documents") as progress:
            for _, text in _documents(folder):
                ids = tokenizer.encode(text)
                counts["documents"] += 1
                counts["characters"] += len(text)
                counts["bytes"] += len(text.encode())
                counts["tokens"] += len(ids)
                counts["round_trip_failures"] += tokenizer.decode(ids) != text
                han = [c for c in text if unicodedata.name(c, "").startswith("CJK UNIFIED")]
                counts["han_characters"] += len(han)
                counts["han_covered"] += sum(tokenizer.piece_id(c) is not None for c in han)
                progress.add()
        report[name] = {
            **counts,
            "characters_per_token": round(counts["characters"] / counts["tokens"], 4),
            "bytes_per_token": round(counts["bytes"] / counts["tokens"], 4),
        }
    return report
