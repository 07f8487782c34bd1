"""`ctllm generate`: texts for prompts, a JSON line in, a JSON line out."""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, file_digest, read_jsonl, write_atomic, write_jsonl
from ctllm_jax.common.manifest import Stage, open_stage
from ctllm_jax.common.progress import Progress
from ctllm_jax.data.chat import ChatTemplate, check_messages, own_template
from ctllm_jax.generate import bucket, encode_prompt
from ctllm_jax.loading import LoadedModel, check_ids, load_model
from ctllm_jax.sampling import SamplingConfig
from ctllm_jax.slots import Decoder, Request

SLOTS = 16  # where nobody says how many

Prompt = str | list[dict]  # text to go on from, or a conversation


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What `ctllm generate` reads."""

    model: str  # run directory or Hugging Face folder
    step: int | None  # [steps] checkpoint of a run; None is the newest
    dtype: str | None  # compute dtype; None is the model's own
    tensor: int  # [devices] over which heads and widths of a copy of the model are split
    prompts: tuple[str, ...]  # texts that are continued
    input: str | None  # JSON lines with "prompt" (text) or "messages" (a conversation), after `prompts`
    chat: bool  # wrap plain prompts as a user's message in the chat template
    slots: int  # [prompts] decoded together; speed and memory only
    sampling: SamplingConfig  # how texts are continued

    def __post_init__(self):
        if self.slots < 1:
            raise ValueError(f"slots {self.slots} is below 1")


def sample(model: LoadedModel, prompts: Sequence[Prompt], chat: bool, config: SamplingConfig) -> list[dict]:
    """Samples for prompts: {"prompt", "text", "tokens", "finished": whether it stopped by itself} each.

    Raises:
      UserError: a prompt cannot be encoded, is empty, fills the context, or holds ids that the model does not know.
    """
    encoder = Encoder(model, chat)
    encoded = {row: encoder.encode(prompt) for row, prompt in enumerate(prompts)}
    found = dict(sample_each(model, encoded, encoder.stop_ids, config, SLOTS))
    return [{"prompt": prompt, **found[row]} for row, prompt in enumerate(prompts)]


class Encoder:
    """Prompts to ids, with the model's chat template for what is a conversation.

    Attributes:
      stop_ids: ids that end an answer, and a text.
    """

    def __init__(self, model: LoadedModel, chat: bool):
        """`chat`: whether plain text is a user's message."""
        self._model, self._chat = model, chat
        self._template: ChatTemplate | None = None
        self.stop_ids = frozenset([model.tokenizer.eos_id])

    def encode(self, prompt: Prompt) -> list[int]:
        """Raises UserError for what cannot be continued."""
        is_chat = self._chat or isinstance(prompt, list)
        if is_chat and not self._template:
            self._template = own_template(self._model.tokenizer)
            self.stop_ids |= {*self._template.end_ids}
        ids = encode_prompt(self._model.tokenizer, prompt, self._template if is_chat else None)
        limit = self._model.config.max_length
        if len(ids) >= limit:
            raise UserError(f"the prompt has {len(ids)} tokens; there must be 1 to {limit - 1} ({self._model.name})")
        check_ids(self._model, [ids])
        return ids


def sample_each(
    model: LoadedModel,
    prompts: Mapping[int, list[int]],
    stop_ids: frozenset[int],
    config: SamplingConfig,
    slots: int,
) -> Iterator[tuple[int, dict]]:
    """(row, {"text", "tokens", "finished"}) of each prompt, as they come to their end; a row's number goes into its
    random numbers."""
    if not prompts:
        return
    limit = model.config.max_length
    needed = min(limit, max(map(len, prompts.values())) + config.max_tokens)
    decoder = Decoder(model, min(slots, len(prompts)), bucket(needed, limit))
    ended: list[tuple[int, dict]] = []
    left = iter(prompts.items())
    while True:
        for row, ids in itertools.islice(left, max(0, slots - decoder.waiting)):
            decoder.submit(_collecting(ids, config, stop_ids, row, ended))
        if decoder.idle:
            return
        decoder.advance()
        yield from ended
        ended.clear()


def _collecting(
    ids: list[int], config: SamplingConfig, stop_ids: frozenset[int], row: int, ended: list[tuple[int, dict]]
) -> Request:
    """A request that puts its entry into `ended` when it has come to its end."""
    parts: list[str] = []

    def deliver(text: str, reason: str | None) -> None:
        parts.append(text)
        if reason:
            ended.append((row, {"text": "".join(parts), "tokens": request.tokens, "finished": reason == "stop"}))

    request = Request(ids, config, stop_ids, deliver, row)
    return request


# ---- The verb


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of the input, or one of the given prompts (line None)."""

    line: int | None
    prompt: Prompt


def run(config: GenerateConfig, workdir: str) -> dict:
    """Writes {workdir}/samples.jsonl, in the order of the prompts, and prints the samples.

    A run that was cut short goes on with the prompts whose samples are missing. Lines that are no prompts are counted
    and written to rejected.jsonl, with file, line and reason.
    """
    if not (config.prompts or config.input):
        raise UserError("generate: give config.prompts or config.input")
    lines, rejected = _read_input(config.input) if config.input else ([], [])
    lines = [*(_Line(None, prompt) for prompt in config.prompts), *lines]
    model = load_model(config.model, config.step, config.dtype, config.tensor)
    settings = {**dataclasses.asdict(config), "model": None, "step": None, "input": None, "slots": None}
    inputs = {"model": model.digest, "input": file_digest(config.input) if config.input else None}
    stage = open_stage("generate", 2, workdir, settings, inputs)
    if not stage.done:
        entries = _work(stage, model, config, lines, rejected)
        write_jsonl(stage.folder / "samples.jsonl", entries)
        (stage.folder / "partial.jsonl").unlink(missing_ok=True)
        counts = {"samples": len(entries), "rejected": len(rejected), "tokens": sum(e["tokens"] for e in entries)}
        stage.finish({"model": model.name, **counts})
    for entry in read_jsonl(stage.folder / "samples.jsonl"):
        prompt = entry["prompt"] if isinstance(entry["prompt"], str) else entry["prompt"][-1]["content"]
        print(f"--- {prompt}\n{entry['text']}")
    return stage.result


def _read_input(file: str) -> tuple[list[_Line], list[dict]]:
    """(prompts, rejected lines: {"file", "line", "reason"}) of a JSON-lines file."""
    lines, rejected = [], []
    try:
        content = as_path(file).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(content, 1):
        if not line.strip():
            continue
        prompt, problem = _prompt(line)
        if problem:
            rejected.append({"file": file, "line": number, "reason": problem})
        else:
            lines.append(_Line(number, prompt))
    return lines, rejected


def _prompt(line: bytes) -> tuple[Prompt | None, str | None]:
    """(prompt, None), or (None, why the line is none)."""
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # malformed UTF-8 too
        return None, f"not valid JSON ({error})"
    if not isinstance(entry, dict):
        return None, f"expected a JSON object, found {type(entry).__name__}"
    if isinstance(entry.get("prompt"), str):
        return entry["prompt"], None
    problem = check_messages(entry.get("messages"))
    return (None, f'no "prompt" text, and {problem}') if problem else (entry["messages"], None)


def _work(stage: Stage, model: LoadedModel, config: GenerateConfig, lines: list[_Line], rejected: list[dict]):
    """The samples, in order; adds what cannot be encoded to `rejected`, and writes rejected.jsonl."""
    encoder, encoded = Encoder(model, config.chat), {}
    for row, line in enumerate(lines):
        try:
            encoded[row] = encoder.encode(line.prompt)
        except UserError as error:
            if line.line is None:
                raise UserError(f"prompt {row}: {error}") from None
            rejected.append({"file": config.input, "line": line.line, "reason": str(error)})
    rejected.sort(key=lambda entry: entry["line"])
    if rejected:
        write_jsonl(stage.folder / "rejected.jsonl", rejected)
        first = rejected[0]
        print(
            f"generate: {len(rejected)} lines are not prompts, the first: {first['file']}:{first['line']}: "
            f"{first['reason']} (all of them: {stage.folder / 'rejected.jsonl'})",
            file=sys.stderr,
        )
    if not encoded:
        raise UserError(f"{config.input}: no line is a prompt")
    done = sample_kept(stage.folder / "partial.jsonl", model, encoded, encoder.stop_ids, config.sampling, config.slots)
    place = {row: {} if lines[row].line is None else {"line": lines[row].line} for row in encoded}
    return [{**place[row], "prompt": lines[row].prompt, **done[row]} for row in encoded]


def sample_kept(
    path: pathlib.Path,
    model: LoadedModel,
    prompts: Mapping[int, list[int]],
    stop_ids: frozenset[int],
    config: SamplingConfig,
    slots: int,
) -> dict[int, dict]:
    """{row: its entry as `sample_each` gives it}; each is kept in a file as it comes, and what is there is not done
    again."""
    done = _read_partial(path)
    with path.open("a", encoding="utf-8") as file, Progress("generate", len(prompts), "prompts") as progress:
        progress.at(len(done))
        missing = {row: ids for row, ids in prompts.items() if row not in done}
        for row, entry in sample_each(model, missing, stop_ids, config, slots):
            done[row] = entry
            file.write(json.dumps({"row": row, **entry}, ensure_ascii=False) + "\n")
            file.flush()
            progress.at(len(done))
    return done


def _read_partial(path: pathlib.Path) -> dict[int, dict]:
    """Finished samples by row. A last line that a kill cut short is taken out of the file."""
    if not path.exists():
        return {}
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    write_atomic(path, whole + b"\n" if whole else b"")
    return {entry.pop("row"): entry for entry in read_jsonl(path)}
