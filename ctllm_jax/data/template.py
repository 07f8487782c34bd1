"""Jinja chat templates of Hugging Face tokenizers, rendered as `transformers.apply_chat_template` renders them.

The whole text is tokenised at once, special tokens parsed, so ids are those that the model was trained on. The price:
text that spells a special token would become one. Conversations with such text are refused.
"""

import bisect
import json
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json
from ctllm_jax.data.chat import ChatTemplate, Messages, broken_text
from ctllm_jax.data.tokenizer import HuggingFaceTokenizer, Tokenizer

# Templates that models are widely trained with, for tokenizers that came without one.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% set system = '' %}{% set turns = messages %}"
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA_2}

Span = tuple[int, int]  # characters of a rendered text, from inclusive, to exclusive

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`: notes where the text of an answer stands in what has been rendered so far."""

    tags = {"generation"}

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.blocks: list[str] = []  # rendered so far
        self.spans: list[Span] = []

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        text, start = caller(), sum(map(len, self.blocks))
        self.spans.append((start, start + len(text)))
        return text


class JinjaTemplate(ChatTemplate):
    """A Jinja chat template with the tokenizer that it came with.

    Answers are what stands in `{% generation %}`; without that tag, what a conversation with the answer has more than
    the conversation before it with the prompt for an answer.
    """

    def __init__(self, jinja: str, tokenizer: HuggingFaceTokenizer, where: object):
        """`where` names the template in errors.

        Raises:
          UserError: the template is broken, or cannot render a question and its answer.
        """
        self.jinja, self.tokenizer = jinja, tokenizer
        self._lock = threading.Lock()  # the tag notes one rendering at a time; Beam's workers are threads
        # An encoder of its own: `Tokenizer.encode` never parses special tokens.
        self._encoder = tokenizers.Tokenizer.from_file(str(tokenizer.file))
        self._encoder.no_padding()
        self._encoder.no_truncation()
        added = self._encoder.get_added_tokens_decoder()
        self._special = {number: token.content for number, token in added.items() if token.special}
        self._names = _special_names(tokenizer)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        # Without transformers' strftime_now: templates fall back to a fixed date, and ids do not change by the day.
        environment.globals["raise_exception"] = _raise
        self._tag = environment.extensions[GenerationTag.identifier]
        try:
            self._template = environment.from_string(jinja)
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: not a chat template ({error})") from None
        probe = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        try:
            learned = [i for i, flag in zip(*self.render(probe), strict=True) if flag]
        except UserError as error:
            raise UserError(f"{where}: cannot be used ({error})") from None
        self.end_ids = tuple(sorted({i for i in learned if i in self._special}))

    def render(self, messages: Messages, learn: str = "assistant") -> tuple[list[int], list[int]]:
        if problem := self._problem(messages):
            raise UserError(problem)
        text, spans = self._spans(messages, learn)
        encoding = self._encoder.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets  # (from, to) of each token in the text, both never decrease
        starts, stops = [start for start, _ in offsets], [stop for _, stop in offsets]
        mask = [0] * len(ids)
        for begin, end in spans:  # a token counts where any part of it lies in a span; white space may have no width
            first = min(bisect.bisect_right(stops, begin), bisect.bisect_left(starts, begin))
            last = max(first, bisect.bisect_left(starts, end))
            mask[first:last] = [1] * (last - first)
        if learn == "assistant":
            self._learn_ends(ids, mask)
        return ids, mask

    def render_prompt(self, messages: Messages) -> list[int]:
        if problem := self._problem(messages):
            raise UserError(problem)
        return self._encoder.encode(self._render(messages, True)[0], add_special_tokens=False).ids

    def refusal(self, messages: Messages, learn: str = "assistant") -> str | None:
        if problem := self._problem(messages):
            return problem
        try:
            self._spans(messages, learn)
        except UserError as error:
            return str(error)
        return None

    def _problem(self, messages: Messages) -> str | None:
        if problem := broken_text(messages):
            return problem
        for piece in self._special.values():
            if any(piece in message["content"] for message in messages):
                return f"the text holds the special token {piece}"
        return None

    def _learn_ends(self, ids: list[int], mask: list[int]) -> None:
        """Some templates close their generation tag before the end of turn: a model that never learned it would not
        stop. The special token that follows an answer without any belongs to it."""
        ended = True  # whether the answer at hand holds a special token
        for place, token in enumerate(ids):
            if mask[place]:
                ended = (ended if place and mask[place - 1] else False) or token in self._special
            elif not ended and token in self._special and mask[place - 1]:
                mask[place], ended = 1, True

    def _render(self, messages: Messages, prompt: bool = False) -> tuple[str, list[Span]]:
        """(text, spans of the generation tags); with `prompt`, up to where the assistant speaks."""
        values = {"messages": [dict(message) for message in messages], "add_generation_prompt": prompt}
        with self._lock:
            self._tag.blocks, self._tag.spans = blocks, spans = [], []
            try:
                for block in self._template.generate(tools=None, documents=None, **self._names, **values):
                    blocks.append(block)
            except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
                raise UserError(f"the chat template refuses the conversation ({error})") from None
        return "".join(blocks), spans

    def _spans(self, messages: Messages, learn: str) -> tuple[str, list[Span]]:
        """(text, spans that are learned)."""
        text, spans = self._render(messages)
        if learn == "all":
            return text, [(0, len(text))]
        if learn == "last":
            return text, [self._answer(text, messages, len(messages) - 1)]
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not spans:
            return text, [self._answer(text, messages, place) for place in answers]
        contents = [messages[place]["content"].strip() for place in answers]
        if len(spans) != len(answers) or any(
            content not in text[start:stop] for content, (start, stop) in zip(contents, spans, strict=True)
        ):
            raise UserError("the generation tags of the chat template do not hold one answer each")
        return text, spans

    def _answer(self, text: str, messages: Messages, place: int) -> Span:
        """Where the answer at a place stands, by what is rendered without it and up to it."""
        opening = self._render(messages[:place], prompt=True)[0]
        closing = text if place == len(messages) - 1 else self._render(messages[: place + 1])[0]
        if not (text.startswith(closing) and closing.startswith(opening)):
            raise UserError("the chat template does not render a prompt as the beginning of its answer")
        return len(opening), len(closing)


def load_jinja(name: str, tokenizer: Tokenizer) -> JinjaTemplate:
    """The Jinja template in a file; by the name "tokenizer", the one that came with the tokenizer; or one of TEMPLATES.

    Raises:
      UserError: there is none, it is broken, the vocabulary lacks its marks, or the tokenizer is no tokenizer.json.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise UserError(f"{tokenizer.file}: template {name!r} needs a Hugging Face tokenizer.json; ours is 'ctllm'")
    path = pathlib.Path(name)
    if name in TEMPLATES:
        template = JinjaTemplate(TEMPLATES[name], tokenizer, f"template {name!r}")
        if not template.end_ids:
            raise UserError(
                f"{tokenizer.file}: no special token ends a turn of template {name!r}; take another template"
            )
        return template
    if name == "tokenizer":
        jinja, path = _jinja_of(tokenizer), tokenizer.file
        if jinja is None:
            raise UserError(f"{path}: no chat template beside it; give config.template the path of a Jinja file")
    elif not path.is_file():
        raise UserError(f"template {name!r}: no such file, and none of ctllm, tokenizer, {', '.join(TEMPLATES)}")
    else:
        jinja = path.read_text(encoding="utf-8")
    return JinjaTemplate(jinja, tokenizer, path)


def has_jinja(tokenizer: Tokenizer) -> bool:
    """Whether a chat template came with the tokenizer."""
    return isinstance(tokenizer, HuggingFaceTokenizer) and _jinja_of(tokenizer) is not None


def _jinja_of(tokenizer: Tokenizer) -> str | None:
    """The text of chat_template.jinja, or of the default template in tokenizer_config.json."""
    file = tokenizer.file.with_name("chat_template.jinja")
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = _settings(tokenizer).get("chat_template")
    if isinstance(found, list):  # several, named
        found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
    return found


def _settings(tokenizer: Tokenizer) -> dict:
    file = tokenizer.file.with_name("tokenizer_config.json")
    return read_json(file) if file.exists() else {}


def _special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """What templates may use by name: bos_token and the like."""
    found = {name: value for name, value in _settings(tokenizer).items() if name in _NAMED and value is not None}
    return {name: value["content"] if isinstance(value, dict) else value for name, value in found.items()}


def _to_json(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
