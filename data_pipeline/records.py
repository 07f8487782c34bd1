"""Instruction and preference records: reading them, and what is wrong with those that cannot be used."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence

from ctllm_jax.common.files import as_path
from ctllm_jax.data.chat import check_messages

_LANGUAGE = re.compile(r"[\w-]+")  # it becomes part of task and file names


@dataclasses.dataclass(frozen=True)
class Records:
    """Instruction or preference records of some files: the usable ones, and why the others are not."""

    kept: list[dict]
    rejected: list[dict]  # {file, line, reason}


def read_records(files: Sequence[str], check: Callable[[dict], str | None]) -> Records:
    """Reads jsonl files line by line; what cannot be used is listed with its reason."""
    kept, rejected, seen = [], [], set()
    for file in files:
        for number, line in enumerate(as_path(file).read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
                reason = check(record) if isinstance(record, dict) else "not a JSON object"
            except UnicodeDecodeError:
                reason = "not UTF-8"
            except ValueError:
                reason = "not valid JSON"
            if reason is None:
                reason = _identify(record, f"{as_path(file).stem}:{number}", seen)
            if reason is None:
                seen.add(record["id"])
                kept.append(record)
            else:
                rejected.append({"file": str(file), "line": number, "reason": reason})
    return Records(kept, rejected)


def _identify(record: dict, default_id: str, seen: set[str]) -> str | None:
    """Makes the id a text and drops an empty language; what is wrong with them, or None."""
    if record.get("id") in (None, ""):
        record["id"] = default_id
    if not isinstance(record["id"], (str, int)) or isinstance(record["id"], bool):
        return "the id is neither text nor number"
    record["id"] = str(record["id"])
    if record.get("language") in (None, ""):
        record.pop("language", None)
    elif not isinstance(record["language"], str) or not _LANGUAGE.fullmatch(record["language"]):
        return "the language is not a word"
    return "the id was seen before" if record["id"] in seen else None


def check_chat(record: dict) -> str | None:
    """What is wrong with an instruction record {messages}, or None."""
    reason = check_messages(record.get("messages"))
    if reason is None and record["messages"][-1]["role"] != "assistant":
        reason = "the last message is not the assistant's"
    return reason


def check_preference(record: dict) -> str | None:
    """What is wrong with a preference record {prompt (messages), chosen, rejected}, or None."""
    reason = check_messages(record.get("prompt"))
    if reason:
        return f"prompt: {reason}"
    if record["prompt"][-1]["role"] != "user":
        return "the prompt does not end with the user's message"
    answers = record.get("chosen"), record.get("rejected")
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        return "chosen or rejected is missing or empty"
    return "chosen and rejected are the same" if answers[0] == answers[1] else None
