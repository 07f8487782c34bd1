"""Chat templates: how a conversation becomes ids, and which of them are learned.

Ours is `<s>`, then each message as `<|role|>content<|end|>`, all markers single ids of the vocabulary. CT-LLM released
none, so every user had to guess; ours travels with the tokenizer and the exported model. A Hugging Face tokenizer may
bring another one, see `ctllm_jax.data.template`.
"""

import importlib
from collections.abc import Mapping, Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.tokenizer import ASSISTANT, CHAT_PIECES, END, SYSTEM, USER, Tokenizer, lone_surrogate

ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
JINJA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LEARN = ("assistant", "last", "all")  # every answer; the final answer, given all before it; everything

Messages = Sequence[Mapping[str, str]]


class ChatTemplate:
    """Conversations to ids.

    Attributes:
      tokenizer: whose ids they are.
      jinja: the template's text for other tools, as Hugging Face tokenizers carry it.
      end_ids: ids that end the assistant's turn; generation stops at them.
    """

    tokenizer: Tokenizer
    jinja: str
    end_ids: tuple[int, ...]

    def render(self, messages: Messages, learn: str = "assistant") -> tuple[list[int], list[int]]:
        """(ids, loss mask) of a conversation. An answer's end of turn is learned with it.

        Args:
          messages: as `check_messages` wants them, the last one the assistant's unless `learn` is "all".
          learn: one of LEARN.

        Raises:
          UserError: the template refuses the conversation.
        """
        raise NotImplementedError

    def render_prompt(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to where the assistant speaks."""
        raise NotImplementedError

    def refusal(self, messages: Messages, learn: str = "assistant") -> str | None:
        """Why `render` would refuse a conversation, or None."""
        raise NotImplementedError


class CtllmTemplate(ChatTemplate):
    """Our template. Ids are put together piece by piece, so no text can become a marker."""

    jinja = JINJA

    def __init__(self, tokenizer: Tokenizer):
        """Raises UserError if the vocabulary lacks the markers."""
        self.tokenizer = tokenizer
        self._markers = {piece: marker(tokenizer, piece) for piece in CHAT_PIECES}
        self.end_ids = (self._markers[END],)

    def render(self, messages: Messages, learn: str = "assistant") -> tuple[list[int], list[int]]:
        ids = list(self.tokenizer.start_ids)
        mask = [int(learn == "all")] * len(ids)
        contents = self.tokenizer.encode_batch([message["content"] for message in messages])
        for number, (message, content) in enumerate(zip(messages, contents, strict=True), 1):
            answer = message["role"] == "assistant" and (learn != "last" or number == len(messages))
            ids += [self._markers[ROLES[message["role"]]], *content, self._markers[END]]
            mask += [int(learn == "all"), *[int(answer or learn == "all")] * (len(content) + 1)]
        return ids, mask

    def render_prompt(self, messages: Messages) -> list[int]:
        return self.render(messages)[0] + [self._markers[ASSISTANT]]

    def refusal(self, messages: Messages, learn: str = "assistant") -> str | None:
        return broken_text(messages)


def load_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a name.

    Args:
      name: "ctllm" (ours), "tokenizer" (the one that came with a Hugging Face tokenizer), "chatml", "llama2", or the
        path of a Jinja file.
      tokenizer: for all but ours, one of a tokenizer.json.

    Raises:
      UserError: there is no such template, it is broken, or it does not go with the tokenizer.
    """
    if name == "ctllm":
        return CtllmTemplate(tokenizer)
    return importlib.import_module("ctllm_jax.data.template").load_jinja(name, tokenizer)


def own_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The template that a model's tokenizer was trained with: its Jinja template where it has one, or ours.

    Raises:
      UserError: the tokenizer has neither.
    """
    template = importlib.import_module("ctllm_jax.data.template")
    return template.load_jinja("tokenizer", tokenizer) if template.has_jinja(tokenizer) else CtllmTemplate(tokenizer)


def marker(tokenizer: Tokenizer, piece: str) -> int:
    """Id of a chat marker; UserError if the tokenizer has none."""
    found = tokenizer.piece_id(piece)
    if found is None:
        raise UserError(f"{tokenizer.file}: the vocabulary has no {piece}; the chat template needs it")
    return found


def broken_text(messages: Messages) -> str | None:
    """Why no tokenizer takes the text of a message, or None."""
    problem = next(filter(None, (lone_surrogate(message["content"]) for message in messages)), None)
    return problem and f"a message cannot be encoded: {problem}"


def check_messages(messages: object) -> str | None:
    """What is wrong with a conversation, or None: roles known, texts non-empty, user and assistant in turn."""
    if not isinstance(messages, list) or not messages:
        return "messages is not a list, or empty"
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or message["role"] not in ROLES:
            return f"a message has no known role ({', '.join(ROLES)})"
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            return "a message has no text"
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2) or not turns:
        return "the messages are not user and assistant in turn"
    return None
