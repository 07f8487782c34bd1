"""`ctllm tokenizer`: a SentencePiece BPE trained on a sample of MAP-CC, or one that is given; measured on the corpus.

Properties as of the tokenizer that CT-LLM used (Baichuan2's): identity normalisation, no dummy prefix, every digit its
own piece, pieces of whitespace, byte fallback, coverage 0.9999, pieces of at most 32 characters. Ours keeps every
special token inside the vocabulary and reserves the chat markers.

Documents are sampled through MAP-CC's index of ids, so only the chosen ones are read. SentencePiece holds the sample
and an index of its pairs in memory: MEMORY_FACTOR bytes per byte of Chinese text.
"""

import collections
import dataclasses
import io
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import file_digest, place, read_json, write_atomic, write_json
from ctllm_jax.common.manifest import Stage, open_stage, read_result
from ctllm_jax.common.progress import Progress
from ctllm_jax.data.order import keyed, mix
from ctllm_jax.data.tokenizer import BOS, CHAT_PIECES, EOS, PAD, UNK, Tokenizer, load_tokenizer
from data_pipeline import map_cc, tokenizer_report

VERSION = 2
# Peak resident memory of training per byte of sample: an estimate, from trials on up to 160 MB of Chinese text.
MEMORY_FACTOR = 25
# SentencePiece aborts on a word of 65,536 characters, and Chinese has no spaces; it drops lines that are too long.
LINE = 16_384  # characters
# Lines with U+2585 are dropped, U+2581 is read as a space: neither is shown to it.
_BREAKS = re.compile("[\n\u2581\u2585]")
_TRAINING = ("vocab_size", "sample_bytes", "character_coverage", "weights", "seed", "threads")
_INDEX_BLOCK = 1 << 20  # entries of the index looked at together


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer to train (all but `model`), or one to take as it is (`model`, and nothing about training)."""

    corpus: str  # folder of `ctllm corpus`
    model: str | None  # a SentencePiece .model, a tokenizer.json, or the folder of one
    report_bytes: int  # [bytes] of each subset, as UTF-8, that are measured, about
    vocab_size: int | None  # [pieces] of the model
    sample_bytes: int | None  # [bytes] of text, as UTF-8, to train on, over all subsets
    character_coverage: float | None  # [share] of all characters that get a piece; the others are spelt in bytes
    weights: dict[str, float] | None  # [share] of each subset in the sample (any scale); empty: by size
    seed: int | None  # [1] of the sample
    threads: int | None  # [threads] SentencePiece's; the result does not depend on it

    def __post_init__(self):
        given = [name for name in _TRAINING if getattr(self, name) is not None]
        if self.model is not None and given:
            raise ValueError(
                f"model is given, so nothing is trained and {given[0]} has no meaning; "
                "start from --config=configs/tokenizer.py:given"
            )
        if self.model is None and given != list(_TRAINING):
            missing = next(name for name in _TRAINING if name not in given)
            raise ValueError(f"{missing} is needed to train a tokenizer; to take one as it is, give model")
        if self.report_bytes < 1 or (self.sample_bytes is not None and self.sample_bytes < 1):
            raise ValueError("report_bytes and sample_bytes must be at least 1")
        if self.character_coverage is not None and not 0.98 <= self.character_coverage <= 1:  # SentencePiece's bounds
            raise ValueError(f"character_coverage {self.character_coverage} must lie in 0.98..1")
        if self.vocab_size is not None and not 1 <= self.vocab_size < 2**31:
            raise ValueError(f"vocab_size {self.vocab_size} must be at least 1, and less than 2^31")
        if self.threads is not None and not 1 <= self.threads <= 1024:  # SentencePiece's
            raise ValueError(f"threads {self.threads} must lie in 1..1024")
        if self.weights and (min(self.weights.values()) < 0 or not sum(self.weights.values())):
            raise ValueError(f"weights {self.weights} must not be negative, nor all 0")


def run(config: TokenizerConfig, workdir: str) -> dict:
    """Writes the tokenizer, report.json and report.html; returns the report: {origin, vocab_size, notes, sample} and
    what `tokenizer_report.measure` gives.

    Raises:
      UserError: no such corpus or model, a sample beyond the machine's memory, or what SentencePiece refuses.
    """
    made_from, corpus = read_result(config.corpus, "corpus")
    folders = map_cc.subset_folders(config.corpus)
    sizes = {name: corpus["subsets"][name]["bytes"] for name in sorted(folders)}
    inputs: dict = {"corpus": made_from}
    if config.model is not None:
        given = load_tokenizer(config.model)
        inputs["model"] = [file_digest(file) for file in given.files]
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("corpus", "model", "threads")}
    stage = open_stage("tokenizer", VERSION, workdir, settings, inputs)
    if stage.done:
        return stage.result
    if config.model is not None:
        given.copy_to(stage.folder)
        origin, sample = given.file.name, None
    else:
        origin, sample = "SentencePiece BPE", _trained(config, stage, folders, sizes)

    tokenizer = load_tokenizer(stage.folder)
    notes = special_notes(tokenizer)
    for note in notes:
        print(f"tokenizer: {note}", file=sys.stderr)
    with Progress("tokenizer: measuring", None, "documents") as progress:
        key = keyed("tokenizer report")  # not the seed: tokenizers are compared on the same documents
        texts = {
            name: _counted(documents(folders[name], min(1.0, config.report_bytes / sizes[name]), key), progress)
            for name in sizes
        }
        measured = tokenizer_report.measure(tokenizer, texts)
    report = {"origin": origin, "vocab_size": tokenizer.vocab_size, "notes": notes, "sample": sample, **measured}
    write_json(stage.folder / "report.json", report)
    write_atomic(stage.folder / "report.html", tokenizer_report.page(report))
    _print_summary(measured["subsets"], place(os.path.join(workdir, "report.html")))
    return stage.finish(report)


def _print_summary(subsets: Mapping[str, dict], page: str) -> None:
    """Says on standard error how well it fits."""
    for name, found in subsets.items():
        if not found["tokens"]:
            continue
        han = f", {found['han_coverage']:.1%} of Chinese characters have a piece" if found["han_characters"] else ""
        print(f"tokenizer: {name}: {found['characters_per_token']:.2f} characters a token{han}", file=sys.stderr)
    print(f"tokenizer: report: {page}", file=sys.stderr)


# ---- Sampling


def documents(folder: str, share: float, key: int) -> Iterator[tuple[str, str]]:
    """(id, text) of a share of a subset's documents: in or out by the hash of the id under `key`, whatever the order.

    Reads the index of ids and the chosen records only.
    """
    index = np.load(pathlib.Path(folder, map_cc.INDEX), mmap_mode="r")
    blocks = (index[start : start + _INDEX_BLOCK] for start in range(0, len(index), _INDEX_BLOCK))
    chosen = np.concatenate([index[:0], *(block[_draw(block["hash"], key) < share] for block in blocks)])
    chosen.sort(order=["shard", "offset"])
    files = map_cc.shard_files(pathlib.Path(folder))
    for shard in np.unique(chosen["shard"]):
        with open(files[shard], "rb") as file:
            for offset in chosen["offset"][chosen["shard"] == shard].tolist():
                file.seek(offset)
                feature = map_cc.read_record(file)
                yield tuple(feature[name].bytes_list.value[0].decode() for name in ("id", "text"))


def _draw(hashes: np.ndarray, key: int) -> np.ndarray:
    """Numbers in [0, 1), of 53 bits, that hashes have under a key."""
    return (mix(hashes ^ np.uint64(key)) >> np.uint64(11)) * 2.0**-53


def plan(config: TokenizerConfig, sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """{subset: {available_bytes, wanted_bytes}} of the sample. A subset that has less than its weight asks for gives
    all it has; the others do not make up for it.

    Raises:
      UserError: a weight for a subset that the corpus lacks, or a sample that training cannot hold in memory.
    """
    unknown = sorted(set(config.weights) - set(sizes))
    if unknown:
        raise UserError(f"tokenizer: weight given for {unknown[0]!r}, the corpus has {', '.join(sizes)}")
    weights = config.weights or sizes
    scale = config.sample_bytes / sum(weights.values())
    wanted = {
        name: {"available_bytes": sizes[name], "wanted_bytes": min(sizes[name], round(weight * scale))}
        for name, weight in sorted(weights.items())
    }
    total, memory = sum(entry["wanted_bytes"] for entry in wanted.values()), memory_bytes()
    if total * MEMORY_FACTOR > memory:
        raise UserError(
            f"tokenizer: SentencePiece would need about {total * MEMORY_FACTOR / 1e9:.1f} GB of memory for a sample of "
            f"{total / 1e9:.3f} GB, and {memory / 1e9:.1f} GB are there; lower sample_bytes to at most "
            f"{memory // MEMORY_FACTOR:,}"
        )
    return wanted


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or less where its control group has a limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(name) and (text := pathlib.Path(name).read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def training_lines(texts: Iterable[str], counts: collections.Counter) -> Iterator[str]:
    """Lines as SentencePiece takes them without dropping any; counts `cut_lines` and `reserved` characters."""
    for text in texts:
        counts["reserved"] += text.count("\u2581") + text.count("\u2585")
        for line in _BREAKS.split(text):
            counts["cut_lines"] += len(line) > LINE
            for start in range(0, len(line), LINE):
                yield line[start : start + LINE]


def _counted(found: Iterable[tuple[str, str]], progress: Progress) -> Iterator[tuple[str, str]]:
    for document in found:
        progress.add()
        yield document


# ---- Training


def _trained(config: TokenizerConfig, stage: Stage, folders: Mapping[str, str], sizes: Mapping[str, int]) -> dict:
    """Trains tokenizer.model, unless an earlier run of this stage got that far; returns what it was trained on."""
    model, notes = stage.folder / "tokenizer.model", stage.folder / "sample.json"
    if not model.exists():
        wanted = plan(config, sizes)
        counts = collections.Counter(cut_lines=0, reserved=0)
        for entry in wanted.values():
            entry.update(documents=0, bytes=0)

        def texts() -> Iterator[str]:
            for name, entry in wanted.items():
                share = entry["wanted_bytes"] / sizes[name]
                for _, text in _counted(documents(folders[name], share, keyed(config.seed)), progress):
                    entry["documents"] += 1
                    entry["bytes"] += len(text.encode())
                    yield text

        with Progress("tokenizer: sampling, then training", None, "documents") as progress:
            trained = train(config, training_lines(texts(), counts))
        write_json(notes, {"subsets": wanted, **counts})
        write_atomic(model, trained)  # last: where it is, the notes are
    return read_json(notes)


def train(config: TokenizerConfig, lines: Iterator[str]) -> bytes:
    """The trained model file; UserError with SentencePiece's reason where it cannot train."""
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
            max_sentence_length=4 * LINE,  # bytes
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
    return model.SerializeToString(deterministic=True)


def special_notes(tokenizer: Tokenizer) -> list[str]:
    """What a vocabulary lacks for documents and conversations, and which of its markers a text can forge."""
    notes = []
    if tokenizer.bos_id is None:
        notes.append("the vocabulary has no begin-of-document piece: documents begin without a marker")
    missing = [piece for piece in CHAT_PIECES if tokenizer.piece_id(piece) is None]
    if missing:
        notes.append(f"the vocabulary lacks {' '.join(missing)}: it cannot make chat or preference stores")
    forged = [
        piece
        for piece in (BOS, EOS, *CHAT_PIECES)
        if (marker := tokenizer.piece_id(piece)) is not None and marker in tokenizer.encode(piece)
    ]
    if forged:
        notes.append(f"texts that spell {' '.join(forged)} are given the marker's id: documents can forge it")
    return notes
