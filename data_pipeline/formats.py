"""The formats of published instruction and preference data, told by their keys, and the way to our own."""

import dataclasses
import itertools
import os.path
import re
from collections.abc import Callable, Sequence
from typing import Any

_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}
_HEADING = re.compile(r"\n\n(Human|Assistant):")  # of hh_rlhf's transcripts
_LAST_HEADING = "\n\nAssistant:"


class Unusable(Exception):
    """A record that cannot be used; the text is the reason that is reported."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A record that has all `keys` is in this format; `read` gives its bodies: {messages} or {prompt, chosen,
    rejected}, `prompt` as messages. What is odd in them is left for the check that follows."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[dict], list[dict]]


def normalise(record: dict) -> list[dict]:
    """Bodies in our own form; several where a record holds several examples.

    Raises:
      Unusable: the record is in none of the formats, or not as its format says.
    """
    for form in FORMATS:
        if all(key in record for key in form.keys):
            return form.read(record)
    raise Unusable(UNKNOWN_FORMAT)


# ---- Parts


def _message(value: Any) -> dict:
    """{role, content} of {role or from, content or value}; content of several text parts is joined."""
    if not isinstance(value, dict):
        raise Unusable("a message is not an object")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


def _messages(value: Any, role: str) -> Any:
    """Messages of a text (said by `role`), a message or a list of them; an empty system message is none."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        return [_message(value)]
    if not isinstance(value, list):
        return value
    found = [_message(entry) for entry in value]
    return [entry for entry in found if entry["role"] != "system" or entry["content"] not in (None, "")]


def _system(record: dict) -> list[dict]:
    return [] if record.get("system") in (None, "") else [{"role": "system", "content": record["system"]}]


def _exchange(user: Any, assistant: Any) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _instruction(record: dict, given: Any) -> str:
    """Instruction and input as one message, a line each."""
    parts = [record["instruction"], *([] if given in (None, "") else [given])]
    if not all(isinstance(part, str) for part in parts):
        raise Unusable("instruction or input is no text")
    return "\n".join(parts)


def _earlier(record: dict) -> list[dict]:
    """System message and history ([[question, answer], ...]) of an alpaca record."""
    turns = record.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise Unusable("history is not a list of [question, answer]")
    return _system(record) + [message for turn in turns for message in _exchange(*turn)]


# ---- Instructions


def _chat(record: dict) -> list[dict]:
    if record.get("label") is False:  # KTO: single answers, labelled
        raise Unusable("an answer that is labelled as bad")
    return [{"messages": _opened(record, "messages")}]


def _sharegpt(record: dict) -> list[dict]:
    return [{"messages": _opened(record, "conversations")}]


def _opened(record: dict, key: str) -> Any:
    """Messages after the system message that stands beside them, unless they begin with it themselves."""
    found, system = _messages(record[key], "user"), _system(record)
    return system + found if isinstance(found, list) and found[:1] != system else found


def _seed_task(record: dict) -> list[dict]:
    instances = record["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(one, dict) for one in instances):
        raise Unusable("instances is not a list of objects, or empty")
    return [{"messages": _exchange(_instruction(record, one.get("input")), one.get("output"))} for one in instances]


def _alpaca(record: dict) -> list[dict]:
    question = _instruction(record, record.get("input"))
    return [{"messages": _earlier(record) + _exchange(question, record["output"])}]


def _completion(question: str, answer: str) -> Callable[[dict], list[dict]]:
    def read(record: dict) -> list[dict]:
        prompt, completion = _messages(record[question], "user"), _messages(record[answer], "assistant")
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise Unusable(f"{question} or {answer} is neither text nor messages")
        return [{"messages": _system(record) + prompt + completion}]

    return read


# ---- Preferences


def _answer(value: Any, prompt: Sequence[dict]) -> Any:
    """The text of an answer: given as text, as a message, or as messages that begin with the prompt."""
    found = _messages(value, "assistant")
    for beginning in (prompt, [message for message in prompt if message["role"] != "system"]):
        if isinstance(found, list) and found[: len(beginning)] == beginning:
            found = found[len(beginning) :]
            break
    if not found:
        return None
    if not isinstance(found, list) or len(found) != 1 or found[0]["role"] != "assistant":
        raise Unusable("chosen or rejected is not one answer to the prompt")
    return found[0]["content"]


def _pair(record: dict, prompt: Any) -> list[dict]:
    own = prompt if isinstance(prompt, list) else []
    return [{"prompt": prompt, **{side: _answer(record[side], own) for side in ("chosen", "rejected")}}]


def _prompt_pair(record: dict) -> list[dict]:
    return _pair(record, _opened(record, "prompt"))


def _sharegpt_pair(record: dict) -> list[dict]:
    return _pair(record, _opened(record, "conversations"))


def _alpaca_pair(record: dict) -> list[dict]:
    question = {"role": "user", "content": _instruction(record, record.get("input"))}
    return _pair(record, [*_earlier(record), question])


def _bare_pair(record: dict) -> list[dict]:
    """Two whole conversations, as messages or as transcripts; what they share at their beginning is the prompt."""
    sides = record["chosen"], record["rejected"]
    if all(isinstance(side, list) for side in sides):
        chosen, rejected = (_messages(side, "assistant")[:-1] for side in sides)
        shared = itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        return _pair(record, [message for message, _ in shared])
    if not all(isinstance(side, str) for side in sides):
        raise Unusable("chosen and rejected are neither transcripts nor messages")
    shared = os.path.commonprefix(sides)
    end = shared.rfind(_LAST_HEADING)
    if not shared.startswith("\n\nHuman:") or end < 0:
        raise Unusable("the transcripts share no beginning from '\\n\\nHuman:' to '\\n\\nAssistant:'")
    answers = [side[end + len(_LAST_HEADING) :].strip() for side in sides]
    if any(_HEADING.search(answer) for answer in answers):
        raise Unusable("chosen or rejected is not one answer to the prompt")
    _, *parts = _HEADING.split(shared[:end])
    prompt = [
        {"role": _ROLES[speaker.lower()], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    return [{"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}]


# The first that fits counts: formats with more keys stand before those that they contain.
FORMATS = (
    Format("preference", ("prompt", "chosen", "rejected"), _prompt_pair),
    Format("sharegpt preference", ("conversations", "chosen", "rejected"), _sharegpt_pair),
    Format("alpaca preference", ("instruction", "chosen", "rejected"), _alpaca_pair),
    Format("hh_rlhf", ("chosen", "rejected"), _bare_pair),
    Format("messages", ("messages",), _chat),
    Format("sharegpt", ("conversations",), _sharegpt),
    Format("seed task", ("instruction", "instances"), _seed_task),
    Format("alpaca", ("instruction", "output"), _alpaca),
    Format("question and answer", ("question", "answer"), _completion("question", "answer")),
    Format("completion", ("prompt", "completion"), _completion("prompt", "completion")),
    Format("response", ("prompt", "response"), _completion("prompt", "response")),
)
UNKNOWN_FORMAT = "in none of the known formats: " + "; ".join(f"{f.name} ({', '.join(f.keys)})" for f in FORMATS)
