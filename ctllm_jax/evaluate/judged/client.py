"""One request to an OpenAI-compatible endpoint (`POST {url}/chat/completions`), with the standard library.

Whatever comes back is either a reply, or one of three errors that say what a caller may do: ask again (`Again`), leave
this request (`Refused`), or stop (`UserError`). The key is read from the environment, goes to the configured address
alone (redirects are not followed), and is blotted out of all that comes back.
"""

import dataclasses
import datetime
import email.utils
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request

from ctllm_jax.common.errors import UserError

LARGEST = 4 << 20  # bytes of a reply; a longer one is garbage
STOP = (401, 402, 403, 404)  # key, account, address or model is wrong: the next request would fail too
REFUSED = (400, 413, 422)  # this request: too long, filtered, a field that the endpoint does not know


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """A judge: a model at an endpoint."""

    url: str  # up to and without /chat/completions
    model: str  # its name at the endpoint
    key: str  # environment variable that holds the key; empty where none is needed
    temperature: float | None  # [1] None is the endpoint's own
    max_tokens: int  # [tokens] of a judgement
    limit_name: str  # what the endpoint calls that: max_tokens, or max_completion_tokens

    def __post_init__(self):
        if self.limit_name not in ("max_tokens", "max_completion_tokens"):
            raise ValueError(f"limit_name is max_tokens or max_completion_tokens, not {self.limit_name!r}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens} is below 1")


class Again(Exception):
    """The endpoint is slow, busy, down, or says nothing that makes sense.

    Attributes:
      wait: seconds that it asks for, or None.
    """

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class Refused(Exception):
    """The endpoint does not answer this request."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None  # it becomes an HTTPError


_OPENER = urllib.request.build_opener(_NoRedirects)


class Endpoint:
    """Where a judge is asked. Threads may share it."""

    def __init__(self, judge: JudgeConfig):
        """Raises UserError: no model, no address, or the key's variable is not set."""
        address = urllib.parse.urlsplit(judge.url)
        if not judge.model or address.scheme not in ("http", "https") or not address.hostname:
            raise UserError(
                f"a judge needs a model and a url such as https://HOST/v1, not {judge.model!r}, {judge.url!r}"
            )
        self._key = os.environ.get(judge.key, "").strip() if judge.key else ""
        if judge.key and not self._key:
            raise UserError(f"judge {judge.model}: the environment variable {judge.key} is not set; it holds the key")
        if not self._key.isascii() or not self._key.isprintable():
            raise UserError(f"judge {judge.model}: what {judge.key} holds is not a key")
        self.judge = judge

    def ask(self, messages: list[dict], timeout: float) -> dict:
        """The reply to a conversation.

        Args:
          messages: role and content each.
          timeout: seconds, for the connection, for any silence, and for the whole body.

        Returns:
          {text, finish: the endpoint's reason to end, model: as it names itself, prompt_tokens, completion_tokens:
          as it counts them, or None}

        Raises:
          Again, Refused, UserError: see above.
        """
        judge = self.judge
        body = {"model": judge.model, "messages": messages, judge.limit_name: judge.max_tokens}
        if judge.temperature is not None:
            body["temperature"] = judge.temperature
        headers = {"Content-Type": "application/json", "User-Agent": "ctllm"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = judge.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + timeout
        try:
            with _OPENER.open(request, timeout=timeout) as response:
                raw = self._body(response, deadline)
        except urllib.error.HTTPError as error:
            raise self._status(error, deadline) from None
        except (OSError, http.client.HTTPException) as error:  # URLError, resets, timeouts, broken headers
            raise Again(self._clean(f"{type(error).__name__}: {error}")) from None
        return _reply(self._clean(raw.decode("utf-8", "replace")))

    def _body(self, response, deadline: float) -> bytes:
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > LARGEST:
                raise Again(f"a reply of more than {LARGEST >> 20} MiB")
            if time.monotonic() > deadline:
                raise Again("the reply took too long")
        return b"".join(parts)

    def _status(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        """The exception for an HTTP status that is no success."""
        with error:
            try:
                detail = self._clean(self._body(error, deadline).decode("utf-8", "replace"))
            except (Again, OSError, http.client.HTTPException):
                detail = ""
        message = f"status {error.code} {' '.join(detail.split())[:300]}"
        if error.code in STOP or error.code in (301, 302, 303, 307, 308):
            hint = "look at its url, its model and its key"
            return UserError(f"judge {self.judge.model} at {self.judge.url}: {message}; {hint}")
        return Refused(message) if error.code in REFUSED else Again(message, _retry_after(error.headers))

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _retry_after(headers) -> float | None:
    """Seconds of a Retry-After header, a number or a date; None where it is neither."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError, OverflowError):
        return None
    until = until if until.tzinfo else until.replace(tzinfo=datetime.UTC)
    return max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds())


def _reply(raw: str) -> dict:
    try:
        value = json.loads(raw)
        choice = value["choices"][0]
        text, finish = choice["message"].get("content"), choice.get("finish_reason")
        model, usage = value.get("model"), value.get("usage")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise Again(f"not the reply of a chat endpoint: {' '.join(raw.split())[:200]!r}") from None
    if finish == "content_filter":
        raise Refused("filtered by the endpoint")
    if not isinstance(text, str) or not text.strip():
        if finish != "length":  # all its tokens went into thinking: asked again, it would do the same
            raise Again("a reply without text")
        text = ""
    counts = usage if isinstance(usage, dict) else {}
    return {
        "text": _writable(text),
        "finish": _writable(finish) if isinstance(finish, str) else None,
        "model": _writable(model) if isinstance(model, str) else None,
        "prompt_tokens": _count(counts.get("prompt_tokens")),
        "completion_tokens": _count(counts.get("completion_tokens")),
    }


def _writable(text: str) -> str:
    """A text that UTF-8 can hold: half a surrogate pair, as JSON can escape it, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
