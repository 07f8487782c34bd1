"""`ctllm chat`: a conversation with a model, in a terminal or through a pipe.

A line is a message. Ctrl-C ends an answer; between answers, or a second time, it ends the program, as Ctrl-D does.
"""

import contextlib
import dataclasses
import importlib
import signal
import sys
from collections.abc import Iterator

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.chat import ChatTemplate, own_template
from ctllm_jax.loading import load_model
from ctllm_jax.sampling import SamplingConfig
from ctllm_jax.slots import Decoder, Request

PROMPT = "> "  # before the user's line, in a terminal


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """What `ctllm chat` reads."""

    model: str  # run directory or Hugging Face folder
    step: int | None  # [steps] checkpoint of a run; None is the newest
    dtype: str | None  # compute dtype; None is the model's own
    tensor: int  # [devices] over which heads and widths of a copy of the model are split
    context: int | None  # [tokens] most tokens of a conversation; None is the model's
    system: str | None  # the message that opens the conversation
    sampling: SamplingConfig  # how answers are drawn


class Conversation:
    """Messages so far, and the model that answers them."""

    def __init__(self, decoder: Decoder, template: ChatTemplate, config: ChatConfig):
        self._decoder, self._template, self._sampling = decoder, template, config.sampling
        self._stop_ids = frozenset([decoder.model.tokenizer.eos_id, *template.end_ids])
        self._system = [{"role": "system", "content": config.system}] if config.system else []
        self._turns: list[dict] = []
        self._asked = 0

    def ask(self, text: str) -> Iterator[str]:
        """The answer to a message, bit by bit. Where the conversation has become too long, its oldest turns go, and a
        line on standard error says so; an answer without text is forgotten with its question.

        Raises:
          UserError: the message cannot be encoded, or is too long by itself; the conversation stays as it was.
        """
        question = {"role": "user", "content": text}
        prompt, dropped = self._fit(question)
        parts: list[str] = []
        request = Request(prompt, self._sampling, self._stop_ids, lambda new, reason: parts.append(new), self._asked)
        self._decoder.submit(request)
        with _interruptible(request):
            shown = 0
            while not self._decoder.idle:
                self._decoder.advance()
                yield from parts[shown:]
                shown = len(parts)
        self._asked += 1
        self._turns = self._turns[dropped:]
        answer = "".join(parts)
        if answer.strip():
            self._turns += [question, {"role": "assistant", "content": answer}]
        else:
            print("(no answer)", file=sys.stderr)

    def _fit(self, question: dict) -> tuple[list[int], int]:
        """(ids of the conversation with a question, messages dropped from its beginning), with room for an answer."""
        room = min(self._sampling.max_tokens, self._decoder.context // 2)
        for dropped in range(0, len(self._turns) + 1, 2):
            prompt = self._template.render_prompt([*self._system, *self._turns[dropped:], question])
            if len(prompt) <= self._decoder.context - room:
                if dropped:
                    print(f"(the oldest {dropped} messages no longer fit into the context)", file=sys.stderr)
                return prompt, dropped
        raise UserError(f"the message has {len(prompt)} tokens; there is room for {self._decoder.context - room}")


@contextlib.contextmanager
def _interruptible(request: Request) -> Iterator[None]:
    """Ctrl-C cancels the request, when the step at hand is done; again, and it is a KeyboardInterrupt."""

    def stop(*_) -> None:
        if request.cancelled:
            raise KeyboardInterrupt
        request.cancelled = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(config: ChatConfig, workdir: str | None) -> dict:
    """Talks until the input ends; how many answers there were. `workdir` is not used."""
    if not config.model:
        raise UserError("chat: give --config.model=RUN (a run directory or a Hugging Face folder)")
    model = load_model(config.model, config.step, config.dtype, config.tensor)
    conversation = Conversation(Decoder(model, 1, config.context), own_template(model.tokenizer), config)
    answers = 0
    with contextlib.suppress(KeyboardInterrupt):
        for line in _lines():
            try:
                for part in conversation.ask(line):
                    sys.stdout.write(part)
                    sys.stdout.flush()
                print()
                answers += 1
            except UserError as error:
                print(f"({error})", file=sys.stderr)
    return {"model": model.name, "answers": answers}


def _lines() -> Iterator[str]:
    """Messages: lines of the terminal or the pipe that are not blank."""
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            if text := line.decode("utf-8", "replace").strip():
                yield text
        return
    importlib.import_module("readline")  # gives `input` line editing and a history
    with contextlib.suppress(EOFError):
        while True:
            if text := input(PROMPT).strip():
                yield text
