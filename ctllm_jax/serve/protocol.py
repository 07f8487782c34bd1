"""What OpenAI's API says: requests read strictly, answers and refusals put into its words.

An option that is not supported is refused by name, unless its value asks for nothing (`"n": 1`, null). Beyond OpenAI's
options there are `top_k`, `min_p` and `repetition_penalty`, named as vLLM names them.
"""

import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from ctllm_jax.data.chat import check_messages
from ctllm_jax.sampling import SamplingConfig

MOST_STOPS, LONGEST_STOP = 16, 256  # strings, characters


class Refusal(Exception):
    """An answer that is an error: status, and the object that OpenAI's clients read."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, wait: int = 0):
        """`wait`: seconds after which the client may try again, if there is sense in it."""
        super().__init__(message)
        self.status, self.wait = status, wait
        kinds = {404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclasses.dataclass(frozen=True)
class ParsedRequest:
    """A request for text: messages of a conversation, or a prompt (text or ids) to go on from."""

    messages: list[dict] | None
    prompt: str | list[int] | None
    sampling: SamplingConfig
    seeded: bool  # whether it named a seed
    stream: bool
    usage: bool  # whether a stream ends with the counts of tokens


# ---- Requests


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("must be a number")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number")
    if not -(2**31) <= value < 2**31:
        raise ValueError("must be between -2147483648 and 2147483647")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("must be a non-empty string, or a list of them")
    if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
        raise ValueError(f"may hold at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters")
    return tuple(stops)


def _stream_options(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) - {"include_usage"}:
        raise ValueError('may only hold "include_usage"')
    return _flag(value.get("include_usage", False))


def _messages(value: Any) -> list[dict]:
    if isinstance(value, list):
        value = [_plain(message) for message in value]
    if problem := check_messages(value):
        raise ValueError(f"cannot be read: {problem}")
    if value[-1]["role"] != "user":
        raise ValueError("must end with a message of the user")
    return value


def _plain(message: Any) -> Any:
    """A message with its parts of text put together; others are not there for this model."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [part if isinstance(part, dict) else {} for part in message["content"]]
    if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
        raise ValueError("may only hold parts of type text")
    return {**message, "content": "".join(part["text"] for part in parts)}


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, list) and value and all(type(entry) is int and 0 <= entry < 2**31 for entry in value):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("must be one text or one list of ids, and not empty")
    return value


Reader = Callable[[Any], Any]
SAMPLING: dict[str, tuple[str, Reader]] = {  # name: key of SamplingConfig, how it is read
    "temperature": ("temperature", _number),
    "top_p": ("top_p", _number),
    "top_k": ("top_k", _whole),
    "min_p": ("min_p", _number),
    "repetition_penalty": ("repetition_penalty", _number),
    "seed": ("seed", _whole),
    "stop": ("stop", _stops),
    "max_tokens": ("max_tokens", _whole),
}
CHAT_SAMPLING = {**SAMPLING, "max_completion_tokens": ("max_tokens", _whole)}
# Options whose other values are not supported.
NEUTRAL: dict[str, tuple] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
CHAT_NEUTRAL = {
    **NEUTRAL,
    "logprobs": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
TEXT_NEUTRAL = {**NEUTRAL, "echo": (False,), "best_of": (1,), "suffix": ("",)}
WITHOUT_EFFECT = {"user", "metadata", "safety_identifier"}  # who asks


def parse_request(body: bytes, chat: bool, model: str, defaults: SamplingConfig) -> ParsedRequest:
    """A request's body.

    Args:
      body: as it came.
      chat: whether it is for /v1/chat/completions, or for /v1/completions.
      model: the name that it has to ask for.
      defaults: the sampling options that it does not name.

    Raises:
      Refusal: it is malformed, asks for another model, or for what is not supported.
    """
    values = {key: value for key, value in _read_object(body).items() if value is not None}
    if values.get("model") != model:
        named = json.dumps(values.get("model"), ensure_ascii=False)[:100]
        raise Refusal(404, f"there is no model {named}; there is: {model}", param="model", code="model_not_found")
    subject, read_subject = ("messages", _messages) if chat else ("prompt", _prompt)
    options, neutral = (CHAT_SAMPLING, CHAT_NEUTRAL) if chat else (SAMPLING, TEXT_NEUTRAL)
    for key, value in values.items():
        if key in neutral and not any(value == own and type(value) is type(own) for own in _alike(neutral[key])):
            shown = json.dumps(value, ensure_ascii=False)[:100]
            raise Refusal(400, f"{key}: {shown} is not supported", param=key, code="unsupported_value")
        if key not in {"model", subject, "stream", "stream_options", *options, *neutral, *WITHOUT_EFFECT}:
            key = key[:100]
            raise Refusal(400, f"{key}: this option is not supported", param=key, code="unsupported_parameter")
    found = {name: _read(values, key, read) for key, (name, read) in options.items() if key in values}
    if subject not in values:
        raise Refusal(400, f"{subject}: is missing", param=subject, code="missing_required_parameter")
    asked = _read(values, subject, read_subject)
    try:
        sampling = dataclasses.replace(defaults, **found)
    except ValueError as error:
        raise Refusal(400, str(error), code="invalid_value") from None
    stream = _read(values, "stream", _flag) if "stream" in values else False
    usage = _read(values, "stream_options", _stream_options) if "stream_options" in values else False
    return ParsedRequest(asked if chat else None, None if chat else asked, sampling, "seed" in found, stream, usage)


def _alike(values: tuple) -> tuple:
    """With 1 also 1.0, as JSON writers have it."""
    return (*values, *(float(value) for value in values if type(value) is int))


def _read_object(body: bytes) -> dict:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        values = json.loads(body.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not valid JSON ({error})"[:300]) from None
    if not isinstance(values, dict):
        raise Refusal(400, "the body must be a JSON object")
    return values


def _read(values: Mapping[str, Any], key: str, read: Reader) -> Any:
    try:
        return read(values[key])
    except (ValueError, OverflowError) as error:
        raise Refusal(400, f"{key}: {error}", param=key, code="invalid_value") from None


# ---- Answers


class Answer:
    """The objects that answer one request; all of them carry its id."""

    def __init__(self, chat: bool, model: str, prompt_tokens: int):
        self._chat, self._prompt_tokens = chat, prompt_tokens
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._chunk_head = {**self._head, "object": "chat.completion.chunk" if chat else "text_completion"}

    def whole(self, text: str, reason: str, tokens: int) -> dict:
        """The answer to a request without `stream`."""
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return {**self._head, "choices": [choice], "usage": self._usage(tokens)}

    def opening(self) -> list[dict]:
        """What a stream begins with."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None)] if self._chat else []

    def part(self, text: str, reason: str | None) -> list[dict]:
        """A bit of a stream, the last one with the reason why it ends."""
        if not self._chat:
            return [self._chunk({"text": text}, reason)]
        parts = [self._chunk({"delta": {"content": text}}, None)] if text else []
        return parts + ([self._chunk({"delta": {}}, reason)] if reason else [])

    def closing(self, tokens: int) -> dict:
        """The counts of tokens, after the last bit of a stream that asked for them."""
        return {**self._chunk_head, "choices": [], "usage": self._usage(tokens)}

    def _chunk(self, content: dict, reason: str | None) -> dict:
        return {**self._chunk_head, "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": reason}]}

    def _usage(self, tokens: int) -> dict:
        total = self._prompt_tokens + tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": tokens, "total_tokens": total}
