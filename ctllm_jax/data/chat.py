"""The chat template: `<s>`, then each message as `<|role|>content<|end|>`, all markers single ids of the vocabulary.

CT-LLM released none, so every user had to guess; ours travels with the tokenizer and the exported model.
"""

from collections.abc import Mapping, Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.tokenizer import ASSISTANT, END, SYSTEM, USER, Tokenizer

ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
JINJA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def marker(tokenizer: Tokenizer, piece: str) -> int:
    """Id of a chat marker; UserError if the tokenizer has none."""
    found = tokenizer.piece_id(piece)
    if found is None:
        raise UserError(f"{tokenizer.file}: the vocabulary has no {piece}; the chat template needs it")
    return found


def check_messages(messages: object) -> str | None:
    """What is wrong with a conversation, or None: roles known, texts non-empty, user and assistant in turn."""
    if not isinstance(messages, list) or not messages:
        return "messages is not a list, or empty"
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            return f"a message has no known role ({', '.join(ROLES)})"
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            return "a message has no text"
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2) or not turns:
        return "the messages are not user and assistant in turn"
    return None


def render(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(ids, loss mask) of a conversation. The mask is 1 on assistant content and the end of its turn.

    Raises:
      UserError: the tokenizer lacks the markers.
    """
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    mask = [0] * len(ids)
    end = marker(tokenizer, END)
    for message in messages:
        content = tokenizer.encode(message["content"])
        learned = int(message["role"] == "assistant")
        ids += [marker(tokenizer, ROLES[message["role"]]), *content, end]
        mask += [0, *[learned] * len(content), learned]
    return ids, mask


def render_prompt(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation up to and including the marker after which the assistant speaks."""
    return render(messages, tokenizer)[0] + [marker(tokenizer, ASSISTANT)]
