"""Instruction and preference records: reading them, and what is wrong with those that cannot be used.

Files are .jsonl or .json (a record per line, or one array), each also gzipped. Every record tells its format by its
keys, see `formats.FORMATS`, and comes out as {id, language?, source?, messages} or {id, ..., prompt, chosen, rejected}.
"""

import dataclasses
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import orjson

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, shown
from ctllm_jax.data.chat import ChatTemplate, check_messages
from data_pipeline.damage import Damaged, refuse_bomb
from data_pipeline.formats import Unusable, normalise
from data_pipeline.naming import file_names

MAX_LINE = 50_000_000  # bytes of a record; longer ones are skipped piece by piece, never held whole
MAX_ARRAY = 256 * 2**20  # bytes of a .json array, unpacked: it is parsed whole
_SKIP = 1 << 20  # bytes read at a time while skipping
_WORD, _LONGEST_WORD = re.compile(r"[\w-]+"), 128  # bytes; it becomes part of task and file names


@dataclasses.dataclass(frozen=True)
class Records:
    """Instruction or preference records of some files: the usable ones, and why the others are not."""

    kept: list[dict]
    rejected: list[dict]  # {file, line (in an array: the entry), reason}; both count from 1


def read_records(files: Sequence[str], check: Callable[[dict], str | None]) -> Records:
    """Reads the files in order; what cannot be used is listed with its reason.

    A record without id is named by its file and line. An id that another file used before gets the file's name in
    front: data sets number their records alike. An id that comes again nevertheless is a rejection.

    Args:
      files: paths; gzip is told by content.
      check: what is wrong with a record in its normal form, or None.

    Raises:
      UserError: an array is broken, or larger than MAX_ARRAY.
    """
    kept, rejected = [], []
    seen: set[str] = set()  # in the files before
    for file, name in zip(files, _names(files), strict=True):
        own: set[str] = set()
        for number, entry in entries(file):
            try:
                for record in _records(entry, f"{name}:{number}", check):
                    unique = f"{name}/{record['id']}" if record["id"] in seen else record["id"]
                    if unique in own or unique in seen:
                        raise Unusable("the id was seen before")
                    own.add(unique)
                    kept.append({**record, "id": unique})
            except Unusable as problem:
                rejected.append({"file": shown(file), "line": number, "reason": str(problem)})
        seen |= own
    return Records(kept, rejected)


def _records(entry: Any, default_id: str, check: Callable[[dict], str | None]) -> list[dict]:
    """The records in normal form that an entry gives, all sound; Unusable otherwise."""
    if isinstance(entry, Unusable):
        raise entry
    if not isinstance(entry, dict):
        raise Unusable("not a JSON object")
    bodies = normalise(entry)
    if problem := next(filter(None, map(check, bodies)), None):
        raise Unusable(problem)
    labels = {key: _word(entry, key) for key in ("language", "source") if entry.get(key) not in (None, "")}
    identity = entry["id"] if entry.get("id") not in (None, "") else default_id
    if not isinstance(identity, (str, int)) or isinstance(identity, bool):
        raise Unusable("the id is neither text nor number")
    ids = [str(identity)] if len(bodies) == 1 else [f"{identity}:{i}" for i in range(len(bodies))]
    return [{"id": name, **labels, **body} for name, body in zip(ids, bodies, strict=True)]


def _word(entry: dict, key: str) -> str:
    word = entry[key]
    if not isinstance(word, str) or not _WORD.fullmatch(word) or len(word.encode()) > _LONGEST_WORD:
        raise Unusable(f"the {key} is not a word of at most {_LONGEST_WORD} bytes")
    return word


def _names(files: Sequence[str]) -> list[str]:
    """What starts the ids of each file's nameless records: its stem, or as much of its path as sets it apart."""
    bare = [re.sub(r"\.jsonl?(\.gz)?$", "", str(file)) for file in files]
    unique = len(set(bare)) == len(bare)
    return file_names(bare if unique else [str(file) for file in files])


# ---- Files


def entries(file: str) -> Iterator[tuple[int, Any]]:
    """(number from 1, parsed entry, or Unusable with the reason) of a file's records, as they are written.

    Raises:
      UserError: an array is broken, or larger than MAX_ARRAY.
    """
    with as_path(file).open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if packed else io.BufferedReader(raw)  # gcsfs's knows no readline(SIZE)
        if re.search(r"\.json(\.gz)?$", str(file)):
            try:
                if _start(stream) == b"[":
                    yield from enumerate(_array(stream, file), 1)
                    return
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{file}: damaged gzip ({error}); fetch the file again") from None
        yield from _lines(stream, raw)


def _start(stream: BinaryIO) -> bytes:
    """The first byte that is no white space; the stream is set back."""
    first = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    stream.seek(0)
    return first


def _array(stream: BinaryIO, file: str) -> list:
    content = stream.read(MAX_ARRAY + 1).removeprefix(b"\xef\xbb\xbf")
    advice = "write a record per line (.jsonl)"
    if len(content) > MAX_ARRAY:
        raise UserError(f"{file}: an array of more than {MAX_ARRAY:,} bytes is not read whole; {advice}")
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{file}: the array is not valid JSON ({error}); mend it, or {advice}") from None


def _lines(stream: BinaryIO, packed: BinaryIO) -> Iterator[tuple[int, Any]]:
    """packed: the file that the stream is unpacked from; one that gives too much for its size is left."""
    given = 0
    for number in itertools.count(1):
        try:
            raw = stream.readline(MAX_LINE + 1)
            given += len(raw)
            too_long, piece = len(raw) > MAX_LINE and not raw.endswith(b"\n"), raw
            while too_long and piece and not piece.endswith(b"\n"):
                refuse_bomb(given, packed.tell())
                piece = stream.readline(_SKIP)
                given += len(piece)
            refuse_bomb(given, packed.tell())
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield number, Unusable(f"damaged gzip, nothing more can be read ({type(error).__name__})")
            return
        except Damaged as damage:
            yield number, Unusable(f"{damage}, nothing more can be read")
            return
        if not raw:
            return
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            yield number, Unusable(f"longer than {MAX_LINE:,} bytes") if too_long else _parse(raw)


def _parse(raw: bytes) -> Any:
    try:
        raw.decode("utf-8")
        return orjson.loads(raw)
    except UnicodeDecodeError:
        return Unusable("not UTF-8")
    except orjson.JSONDecodeError:
        return Unusable("not valid JSON")


# ---- Checks


def check_chat(record: dict, template: ChatTemplate | None = None, learn: str = "assistant") -> str | None:
    """What is wrong with an instruction record {messages}, or None; also for a template, if one is given."""
    if "messages" not in record:
        return "a preference record, where instructions are read"
    reason = check_messages(record["messages"])
    if reason is None and record["messages"][-1]["role"] != "assistant":
        reason = "the last message is not the assistant's"
    if reason is None and template is not None:
        reason = template.refusal(record["messages"], learn)
    return reason


def check_preference(record: dict, template: ChatTemplate | None = None) -> str | None:
    """What is wrong with a preference record {prompt (messages), chosen, rejected (texts)}, or None."""
    if "prompt" not in record:
        return "an instruction record, where preferences are read"
    if reason := check_messages(record["prompt"]):
        return f"prompt: {reason}"
    if record["prompt"][-1]["role"] != "user":
        return "the prompt does not end with the user's message"
    answers = record["chosen"], record["rejected"]
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        return "chosen or rejected is missing or empty"
    if answers[0] == answers[1]:
        return "chosen and rejected are the same"
    if template is None:
        return None
    turns = ([*record["prompt"], {"role": "assistant", "content": answer}] for answer in answers)
    return next(filter(None, (template.refusal(messages, "last") for messages in turns)), None)
