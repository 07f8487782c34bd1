"""Instruction and preference records for verbs of the model side.

The corpus side's reader knows the formats that such records come in. It is loaded by name when it is called, and needs
no library but orjson.
"""

import functools
import importlib
from collections.abc import Callable, Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import expand
from ctllm_jax.data.chat import ChatTemplate, check_messages

RECORDS = "data_pipeline.records"


def read_conversations(patterns: Sequence[str], template: ChatTemplate) -> tuple[list[dict], list[dict]]:
    """(conversations {id, language?, source?, messages}, {file, line, reason} of each record that is none).

    Args:
      patterns: paths or globs of files as `ctllm tokenize` reads them.
      template: what it refuses is no conversation.

    Raises:
      UserError: a pattern names no file, a file is damaged, or the reader's library is not installed.
    """
    return _read(patterns, functools.partial(_reader().check_chat, template=template))


def read_prompts(patterns: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """(prompts {id, language?, source?, prompt: messages, reference}, {file, line, reason} of each that is none).

    Of a preference record the prompt is the `prompt`, of a conversation all before its last answer, which then is the
    `reference`, else None. Arguments and errors as for `read_conversations`.
    """
    kept, rejected = _read(patterns, _check_prompt)
    return [_prompt(record) for record in kept], rejected


def _check_prompt(record: dict) -> str | None:
    if problem := check_messages(record["prompt"] if "prompt" in record else record["messages"]):
        return problem
    return (
        None if _prompt(record)["prompt"][-1]["role"] == "user" else "the prompt does not end with the user's message"
    )


def _prompt(record: dict) -> dict:
    labels = {key: record[key] for key in ("id", "language", "source") if key in record}
    if "prompt" in record:
        return {**labels, "prompt": record["prompt"], "reference": None}
    *before, last = record["messages"]
    if last["role"] == "assistant":
        return {**labels, "prompt": before, "reference": last["content"]}
    return {**labels, "prompt": record["messages"], "reference": None}


def _reader():
    try:
        return importlib.import_module(RECORDS)
    except ModuleNotFoundError as error:
        raise UserError(f"records are read with {error.name}: pip install 'ctllm-jax[data]'") from None


def _read(patterns: Sequence[str], check: Callable[[dict], str | None]) -> tuple[list[dict], list[dict]]:
    found = _reader().read_records(expand(patterns), check)
    return found.kept, found.rejected
