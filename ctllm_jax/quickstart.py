"""`ctllm quickstart`: every stage of the project, small, each by the command that a user would type.

Stages run as processes of their own and hand files to one another, so a killed quickstart is taken up by running it
again: finished stages say so, the one that was cut short goes on. At the end the numbers that the stages left behind
become summary.json and report.html.
"""

import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys

from ctllm_jax import __version__
from ctllm_jax.cli import flag_value
from ctllm_jax.common.children import die_with_parent
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import ROOT, expand, file_digest, identity, place, read_json, write_atomic, write_json
from ctllm_jax.common.manifest import fingerprint, read_result
from ctllm_jax.quickstart_report import collect, page, table


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """What differs from the stages' own configs. Paths are relative to the working folder, else to the repository."""

    input: tuple[str, ...]  # documents: globs of what `ctllm corpus` reads, .txt files and JSON lines among it
    chats: tuple[str, ...]  # conversations for SFT
    preferences: tuple[str, ...]  # preference pairs for DPO
    tasks: tuple[str, ...]  # declared tasks
    vocab_size: int  # [pieces] of the tokenizer
    character_coverage: float  # [share] of characters that get a piece
    sample_bytes: int  # [bytes] of text that the tokenizer is trained on
    sequence_length: int  # [tokens] of a row
    validation_share: float  # [share] of documents held out
    alignment_validation_share: float  # [share] of conversations and pairs held out
    pretrain_steps: int  # [steps] of pretraining
    sft_steps: int  # [steps] of fine-tuning
    dpo_steps: int  # [steps] of preference optimisation
    evaluation_rows: int  # [rows] most held-out rows of a source that each evaluation reads
    prompts: tuple[str, ...]  # continued by the base model
    questions: tuple[str, ...]  # asked before and after alignment, in the chat template
    max_tokens: int  # [tokens] most of a sample
    last: str | None  # stage to stop after, as "store/pretrain"; None: all of them, then the report


def commands(config: QuickstartConfig, out: str) -> dict[str, list[str]]:
    """The stages in order: {folder below `out`: `ctllm` arguments without --workdir}."""
    return _data_stages(config, out) | _training_stages(config, out) | _evaluation_stages(config, out)


def _data_stages(config: QuickstartConfig, out: str) -> dict[str, list[str]]:
    """Documents to token stores."""

    def tokenize(kind: str, share: float) -> list[str]:
        return [
            "tokenize",
            f"--config=configs/tokenize.py:{kind}",
            f"--config.tokenizer={out}/tokenizer",
            f"--config.sequence_length={config.sequence_length}",
            f"--config.validation_share={share}",
        ]

    share = config.alignment_validation_share
    return {
        "corpus": ["corpus", _flag("input", _absolute(config.input))],
        "tokenizer": [
            "tokenizer",
            f"--config.corpus={out}/corpus",
            f"--config.vocab_size={config.vocab_size}",
            f"--config.character_coverage={config.character_coverage}",
            f"--config.sample_bytes={config.sample_bytes}",
        ],
        "store/pretrain": [*tokenize("pretrain", config.validation_share), f"--config.corpus={out}/corpus"],
        "store/sft": [*tokenize("chat", share), _flag("input", _absolute(config.chats))],
        "store/preference": [*tokenize("preference", share), _flag("input", _absolute(config.preferences))],
    }


def _training_stages(config: QuickstartConfig, out: str) -> dict[str, list[str]]:
    """Token stores to models, each from the one before it."""

    def train(name: str, store: str, steps: int, origin: str | None) -> list[str]:
        return [
            "train",
            f"--config=configs/{name}.py:tiny",
            f"--config.data.store={out}/store/{store}",
            f"--config.duration={steps} steps",
            *([f"--config.init_from={out}/train/{origin}"] if origin else []),
        ]

    model_size = [f"--config.model.{name}vocab_size={config.vocab_size}" for name in ("", "padded_")]
    model_size.append(f"--config.model.max_length={config.sequence_length}")
    return {
        "train/pretrain": [*train("pretrain", "pretrain", config.pretrain_steps, None), *model_size],
        "train/sft": train("sft", "sft", config.sft_steps, "pretrain"),
        "train/dpo": train("dpo", "preference", config.dpo_steps, "sft"),
    }


def _evaluation_stages(config: QuickstartConfig, out: str) -> dict[str, list[str]]:
    """Models to scores and samples, of the last one also by way of its Hugging Face folder."""

    def evaluate(model: str, prompts: tuple[str, ...], chat: bool) -> list[str]:
        return [
            "eval",
            f"--config.model={out}/{model}",
            f"--config.perplexity.store={out}/store/pretrain",
            f"--config.perplexity.rows={config.evaluation_rows}",
            _flag("benchmarks", _found(config.tasks)),
            _flag("prompts", prompts),
            f"--config.chat={chat}",
            f"--config.sampling.max_tokens={config.max_tokens}",
        ]

    return {
        "eval/pretrain": evaluate("train/pretrain", config.prompts, False),
        "eval/pretrain-chat": [
            "generate",
            f"--config.model={out}/train/pretrain",
            _flag("prompts", config.questions),
            "--config.chat=True",
            "--config.sampling.temperature=0.0",
            f"--config.sampling.max_tokens={config.max_tokens}",
        ],
        "eval/sft": evaluate("train/sft", config.questions, True),
        "eval/dpo": evaluate("train/dpo", config.questions, True),
        "huggingface": ["convert", f"--config.source={out}/train/dpo", "--config.dtype=float32"],
        "eval/huggingface": evaluate("huggingface/model", config.questions, True),
    }


def _flag(key: str, values: tuple[str, ...]) -> str:
    return f"--config.{key}={flag_value(tuple(values))}"


def run(config: QuickstartConfig, workdir: str) -> dict:
    """Runs what is not finished yet, then writes summary.json and report.html; returns the summary.

    Where it stops after a stage it writes neither, and returns the results of the stages up to there by their names.

    Raises:
      UserError: an input is missing, a stage failed (its own message stands above), or `last` is none.
    """
    out = os.path.abspath(workdir)
    stages = commands(config, out)
    if config.last is not None:
        if config.last not in stages:
            raise UserError(f"last: {config.last!r} is not a stage; there are: {', '.join(stages)}")
        names = list(stages)
        stages = {name: stages[name] for name in names[: names.index(config.last) + 1]}
    record = pathlib.Path(out) / "quickstart.json"  # {stage: what it was run with}, written when it has finished
    finished = read_json(record) if record.exists() else {}
    inputs = [identity(file) for file in _found(config.input)]
    inputs += [file_digest(file) for file in _found((*config.chats, *config.preferences, *config.tasks))]
    for number, (folder, arguments) in enumerate(stages.items(), 1):
        shown = ["ctllm", *arguments, f"--workdir={out}/{folder}"]
        print(f"\n[{number}/{len(stages)}] {shlex.join(shown)}", file=sys.stderr, flush=True)
        key = fingerprint([__version__, arguments, inputs])
        if finished.get(folder) == key and (pathlib.Path(out) / folder / "manifest.json").exists():
            print(f"already finished in {place(out)}/{folder}", file=sys.stderr)
            continue
        process = subprocess.run(
            [sys.executable, "-m", "ctllm_jax.cli", *shown[1:]], preexec_fn=die_with_parent(), check=False
        )
        if process.returncode:
            raise UserError(
                f"stage {folder!r} ended with status {process.returncode}; "
                f"what is finished in {workdir} is kept, and the same command goes on from there"
            )
        finished[folder] = key
        write_json(record, finished)
    if config.last is not None:
        return {name: read_result(f"{out}/{name}")[1] for name in stages}
    summary = collect(out, list(stages))
    write_json(pathlib.Path(out) / "summary.json", summary)
    write_atomic(pathlib.Path(out) / "report.html", page(summary))
    print(table(summary))
    print(f"\nreport: {place(out)}/report.html\nnumbers: {place(out)}/summary.json")
    return summary


def _absolute(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The patterns as the stages can use them in any folder, looked for here, then in the repository.

    They stay patterns: a command line has no room for the names of some thousand texts.
    """
    absolute = []
    for pattern in patterns:
        here = pathlib.Path(os.path.abspath(os.path.expanduser(pattern)))
        shipped = not os.path.isabs(os.path.expanduser(pattern)) and any(ROOT.glob(pattern))
        absolute.append(str(ROOT / pattern if shipped and not any(pathlib.Path().glob(pattern)) else here))
    return tuple(absolute)


def _found(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Absolute paths of the files that the patterns name; UserError where one names none."""
    return tuple(expand(_absolute(patterns)))
