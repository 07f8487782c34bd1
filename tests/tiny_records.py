"""Instruction and preference records, good and bad, and what is found of them in a token store."""

import json
import pathlib

import numpy as np

from ctllm_jax.data.record import Row
from data_pipeline.formats import UNKNOWN_FORMAT


def say(*texts: str) -> list[dict]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def chats() -> list[dict]:
    """Conversations: good ones, one too long, one whose answer begins beyond the row, and bad ones."""
    good = [
        {"id": f"c{i}", "language": "zh" if i % 3 else "en", "messages": say(f"问题{i}", f"回答{i}", "多谢", "不用")}
        for i in range(30)
    ]
    system = {"id": "system", "language": "zh", "messages": [{"role": "system", "content": "好"}, *say("问", "答")]}
    return [
        *good,
        system,
        {"id": "long", "language": "en", "messages": say("short", "long answer " * 60)},
        {"id": "late", "language": "en", "messages": say("long question " * 60, "answer")},
        {"language": "en", "messages": say("no id", "yes")},
        {"id": "c3", "language": "zh", "messages": say("again", "same id")},
        {"id": "turn", "messages": say("one", "two", "three")},
        {"id": "role", "messages": [{"role": "tool", "content": "x"}]},
        {"id": "empty", "messages": say("one", " ")},
        {"id": "none"},
        {"id": 7, "language": "", "messages": say("a number as id", "x")},
        {"id": [7], "messages": say("a list as id", "x")},
        {"id": "tongue", "language": 3, "messages": say("a number as language", "x")},
        {"id": "path", "language": "../zh", "messages": say("a path as language", "x")},
        {"id": "nothing", "messages": []},
        {"id": "origin", "source": "http://x", "messages": say("an address as source", "x")},
    ]


CHAT_REASONS = {
    "the id was seen before": 1,
    "the last message is not the assistant's": 1,
    "a message has no known role (system, user, assistant)": 1,
    "a message has no text": 1,
    "messages is not a list, or empty": 1,
    "the id is neither text nor number": 1,
    "the language is not a word of at most 128 bytes": 2,
    "the source is not a word of at most 128 bytes": 1,
    UNKNOWN_FORMAT: 1,
}


def pairs() -> list[dict]:
    """Preference pairs, among them one of several turns, one with a long prompt, and bad ones."""
    good = [
        {
            "id": f"p{i}",
            "language": "zh-CN" if i % 2 else "en",
            "prompt": say(f"问题{i}"),
            "chosen": f"好的回答{i}",
            "rejected": "不知道",
        }
        for i in range(20)
    ]
    base = {"language": "en", "prompt": say("why?"), "chosen": "because", "rejected": "no"}
    return [
        *good,
        {**base, "id": "turns", "prompt": say("one", "two", "three"), "chosen": "four", "rejected": "five"},
        {**base, "id": "cut", "chosen": "a long answer " * 60},
        {**base, "id": "late", "prompt": say("a long question " * 60)},
        {**base, "id": "same", "rejected": "because"},
        {**base, "id": "blank", "chosen": ""},
        {**base, "id": "ends", "prompt": say("one", "two")},
        {**base, "id": "void", "prompt": []},
    ]


PAIR_REASONS = {
    "chosen and rejected are the same": 1,
    "chosen or rejected is missing or empty": 1,
    "the prompt does not end with the user's message": 1,
    "prompt: messages is not a list, or empty": 1,
}


def segments(row: Row) -> list[tuple[str, np.ndarray, np.ndarray | None]]:
    """(id, tokens, mask) of each segment of a row."""
    ends = np.cumsum(row.lengths)
    spans = [slice(end - size, end) for size, end in zip(row.lengths, ends, strict=True)]
    masks = [None if row.mask is None else row.mask[span] for span in spans]
    return [(name, row.tokens[span], mask) for name, span, mask in zip(row.ids, spans, masks, strict=True)]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file of a finished stage; the manifest without its timing."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    manifest = json.loads(found["manifest.json"])
    manifest.pop("seconds")
    return {**found, "manifest.json": json.dumps(manifest).encode()}
