"""`ctllm VERB --config=FILE.py[:arg] --config.key=value --workdir=DIR`: one console script for every stage.

A verb is a module with a config dataclass and `run(config, workdir)`. It is imported when called, so that an
accelerator host never needs the corpus side's libraries.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import select
import sys
from collections.abc import Mapping

from absl import flags
from ml_collections import config_flags

from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import ROOT, here_or_shipped
from ctllm_jax.common.quiet import quiet_libraries
from ctllm_jax.common.status import EXIT_MISTAKE

EXIT_CLOSED_PIPE = 141  # as a shell reports a program that SIGPIPE ended


@dataclasses.dataclass(frozen=True)
class Short:
    """A key of a verb's config that is a flag as well: `--step=5` is `--config.step=5`."""

    form: str  # as the help writes it: "--step=N"
    help: str
    bare: str | None = None  # the value that the flag alone stands for; None: it needs one


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag of a verb that is no key of its config file."""

    form: str  # as the help writes it
    help: str
    default: str | float | int | bool


@dataclasses.dataclass(frozen=True)
class Verb:
    """Where a verb lives, its config dataclass and default config file, and what it turns into what."""

    module: str
    config: str
    default: str | None
    help: str
    workdir: str | None = "folder to write; a second run resumes or says why not"  # None: it reads none and writes none
    short: Mapping[str, Short] = dataclasses.field(default_factory=dict)
    about: str | None = None  # the key of the config dataclass that the config file fills; the options fill the others
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    writes: bool = True  # whether --workdir is needed
    extra: str = "data"  # what to install where a library is missing
    bare: tuple[str, str] | None = None  # arguments without a flag: the key that lists them, how the help has them


VERBS = {
    "corpus": Verb(
        "data_pipeline.corpus",
        "CorpusConfig",
        "configs/corpus.py",
        "raw documents -> MAP-CC, rejects with every reason, report",
    ),
    "explain": Verb(
        "data_pipeline.explain",
        "ExplainConfig",
        "configs/explain.py",
        "corpus + document ids -> where each came from, every rule, duplicates, what became of it",
        workdir="folder of `ctllm corpus` to look into; nothing is written",
        short={
            "text_chars": Short("--text_chars=N", "characters of text to show"),
            "json": Short("--json", "a JSON object a line instead of text", bare="True"),
        },
        bare=("documents", "ID [ID ...]"),
    ),
    "sweep": Verb(
        "data_pipeline.sweep",
        "SweepConfig",
        "configs/sweep.py",
        "corpus -> which share of it other thresholds would keep, from stored signals",
        workdir="folder of `ctllm corpus` to look into; nothing is written",
        short={"json": Short("--json", "a JSON object a line instead of a table", bare="True")},
    ),
    "contamination": Verb(
        "data_pipeline.contamination.run",
        "ContaminationConfig",
        "configs/contamination.py",
        "documents, conversations or token store + benchmarks -> which items they hold, and where",
    ),
    "tokenizer": Verb(
        "data_pipeline.tokenizer",
        "TokenizerConfig",
        "configs/tokenizer.py",
        "MAP-CC -> SentencePiece model (or one that is given), fertility report",
    ),
    "tokenize": Verb(
        "data_pipeline.token_store",
        "TokenizeConfig",
        "configs/tokenize.py",
        "documents or conversations + tokenizer -> token store",
    ),
    "plan": Verb(
        "ctllm_jax.plan.run",
        "PlanConfig",
        None,
        "training config + slice -> memory, FLOPs, traffic, time, cost; nothing is trained",
        workdir="folder for plan.json, if it is wanted",
        about="train",
        options={
            "slice": Option("--slice=NAME[,NAME]", "v5e:16x16, v5p-128 (64 chips), 2*v5e:16x16, h200x8, ...", ""),
            "tokens": Option("--tokens=N", "billions of tokens to train on; without it the config's own steps", 0.0),
            "search": Option("--search", "rank meshes, remat policies and microbatches", False),
            "compile": Option("--nocompile", "leave it at arithmetic, in a second instead of a minute", True),
            "json": Option("--json", "a JSON object a line instead of text", False),
        },
        writes=False,
    ),
    "train": Verb(
        "ctllm_jax.train",
        "TrainConfig",
        None,  # a run is always named: configs/pretrain.py, configs/sft.py, configs/dpo.py
        "token store -> checkpoints: pretraining, SFT, DPO",
    ),
    "eval": Verb(
        "ctllm_jax.evaluate.run",
        "EvalConfig",
        "configs/eval.py",
        "checkpoint or Hugging Face folder + tasks -> scores",
    ),
    "compare": Verb(
        "ctllm_jax.evaluate.compare",
        "CompareConfig",
        "configs/compare.py",
        "two folders of `ctllm eval` -> by how much they differ, item by item, and whether that is chance",
        workdir="folder for comparison.json, if it is wanted",
        writes=False,
        bare=("evaluations", "A B"),
    ),
    "answer": Verb(
        "ctllm_jax.evaluate.judged.answers",
        "AnswerConfig",
        "configs/answer.py",
        "checkpoint or Hugging Face folder + open questions -> answers",
    ),
    "judge": Verb(
        "ctllm_jax.evaluate.judged.run",
        "JudgingConfig",
        "configs/judge.py",
        "answers of one model -> marks by other models; of two -> which is better",
    ),
    "select": Verb(
        "ctllm_jax.selection",
        "SelectConfig",
        "configs/select.py",
        "conversations + a model -> those whose answers it finds neither too surprising nor too plain",
    ),
    "pairs": Verb(
        "ctllm_jax.pairs",
        "PairsConfig",
        "configs/pairs.py",
        "prompts -> a model's own answers, ranked by judges or a function -> preference pairs",
    ),
    "generate": Verb("ctllm_jax.samples", "GenerateConfig", "configs/generate.py", "checkpoint + prompts -> text"),
    "chat": Verb(
        "ctllm_jax.chat",
        "ChatConfig",
        "configs/chat.py",
        "a conversation with a checkpoint, in a terminal",
        workdir=None,
        writes=False,
    ),
    "serve": Verb(
        "ctllm_jax.serve.run",
        "ServeConfig",
        "configs/serve.py",
        "a checkpoint as an HTTP server that OpenAI's clients can talk to",
        workdir=None,
        writes=False,
        extra="serve",
    ),
    "convert": Verb(
        "ctllm_jax.convert", "ConvertConfig", "configs/convert.py", "run directory <-> Hugging Face folder"
    ),
    "trace": Verb(
        "ctllm_jax.trace",
        "TraceConfig",
        "configs/trace.py",
        "training run -> the documents that a step saw, the steps that saw a document",
        workdir="run directory to look into; nothing is written",
        short={
            "step": Short("--step=N", "what step N saw (steps count from 1, as in metrics.jsonl)"),
            "spike": Short("--spike[=K]", "what the K steps with the largest jumps of the loss saw (5)", bare="5"),
            "document": Short("--document=ID", "which steps saw a document"),
            "store": Short("--store=DIR", "the run's token store, where it has moved"),
            "corpus": Short("--corpus=DIR", "folder of `ctllm corpus`, for the URLs, where it has moved"),
            "text_chars": Short("--text_chars=N", "characters of text to show"),
            "json": Short("--json", "a JSON object a line instead of a table", bare="True"),
        },
    ),
    "report": Verb(
        "ctllm_jax.metrics.report",
        "ReportConfig",
        "configs/report.py",
        "training runs, finished or not -> one page with their curves and where they differ",
        workdir="folder for report.html; without it the first run's",
        short={"smooth": Short("--smooth=SHARE", "of a training curve, for the mean around each of its points (0.02)")},
        writes=False,
        bare=("runs", "RUN [RUN ...]"),
    ),
    "quickstart": Verb(
        "ctllm_jax.quickstart", "QuickstartConfig", "configs/quickstart.py", "every stage, small, to a report page"
    ),
}


LAUNCH = "any of these as a job of one or several processes: ctllm launch TARGET -- VERB ..."


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `ctllm` script.

    Exit status: 0 done, 1 an error of ours, 2 the user's to mend, 69 another process of the job is gone (134 where JAX
    noticed first), 75 stopped and saved, 130 interrupted, 141 nobody read the output on.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        _dispatch(argv)
        sys.stdout.flush()  # here, where a closed pipe can still be dealt with
    except UserError as error:
        print(f"ctllm: error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        print("ctllm: interrupted; run the same command to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes as it ends
        sys.exit(EXIT_CLOSED_PIPE)


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as in `ctllm VERB | head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if argv[0] == "launch":
        importlib.import_module("launch.run").main(argv[1:])
        return
    if argv[0] not in VERBS:
        raise UserError(f"unknown verb {argv[0]!r}; there are: {', '.join(VERBS)}, launch")
    verb = VERBS[argv[0]]
    values = parse(argv[0], verb, argv[1:])
    if values is None:
        return
    data_side = verb.module.startswith("data_pipeline")
    with quiet_libraries() if data_side else contextlib.nullcontext():
        _execute(argv[0], verb, *values)


def _execute(name: str, verb: Verb, values: dict, workdir: str | None, show: bool) -> None:
    try:
        module = importlib.import_module(verb.module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("ctllm_jax", "data_pipeline", "configs"):
            raise
        raise UserError(f"{name} needs {error.name}: pip install 'ctllm-jax[{verb.extra}]'") from None
    config = build(getattr(module, verb.config), values)
    if show:
        print(json.dumps(dataclasses.asdict(config), ensure_ascii=False, indent=1))
        return
    if not workdir and verb.writes:
        raise UserError(f"{name}: give --workdir=DIR ({verb.workdir})")
    module.run(config, workdir)


def define(options: Mapping[str, Option], values: flags.FlagValues) -> None:
    """Adds options to the flags that `values` parses."""
    makers = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for key, option in options.items():
        makers[type(option.default)](key, option.default, "", flag_values=values)


def parse(name: str, verb: Verb, arguments: list[str]) -> tuple[dict, str | None, bool] | None:
    """(config, workdir, print only?) from the command line, or None after --help.

    Raises:
      UserError: an unknown flag or key, a value of the wrong kind, a config file that cannot be loaded.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt()  # bare arguments may stand before flags
    default = str(ROOT / verb.default) if verb.default else None
    if any(argument in ("-h", "--help") for argument in arguments):
        print(_help(name, verb))
        return None
    arguments = [_from_repository(argument) for argument in _spell_out(name, verb, arguments)]
    try:
        sys.argv = [name, *arguments]  # ml_collections reads the overrides of the default config from there
        config_flags.DEFINE_config_file("config", default, "", flag_values=values)
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        flags.DEFINE_bool("print_config", False, "", flag_values=values)
        define(verb.options, values)
        rest = values([name, *arguments])[1:]
        config = values.config
        if config is not None:
            config.to_dict()  # a file that could not be loaded raises here
    except OSError as error:
        raise UserError(f"{name}: cannot load the config file: {_last_line(error)}") from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}: {_plain(error)}") from None
    if rest and not verb.bare:
        raise UserError(f"{name}: unexpected argument {rest[0]!r} (flags are written --name=value)")
    if config is None:
        raise UserError(f"{name}: give --config=FILE.py, one of configs/")
    settings = config.to_dict()
    if rest:
        settings[verb.bare[0]] = tuple(rest)
    if verb.about:
        settings = {verb.about: settings, **{key: values[key].value for key in verb.options}}
    return settings, values.workdir, values.print_config


def _spell_out(name: str, verb: Verb, arguments: list[str]) -> list[str]:
    """Short flags as the config keys that they stand for: `--step=5`, `--step 5` as `--config.step=5`."""
    spelled, waiting = [], iter(arguments)
    for argument in waiting:
        flag, given, value = argument.partition("=")
        key = flag.removeprefix("--")
        if flag == key or key not in verb.short:
            spelled.append(argument)
            continue
        short = verb.short[key]
        if not given:
            value = next(waiting, "--") if short.bare is None else short.bare
            if value.startswith("--"):
                raise UserError(f"{name}: {flag} needs a value: {short.form}")
        spelled.append(f"--config.{key}={value}")
    return spelled


def _from_repository(argument: str) -> str:
    """Lets `--config=configs/NAME.py` work from any folder."""
    flag, _, value = argument.partition("=")
    path, colon, name = value.partition(":")
    return f"{flag}={here_or_shipped(path)}{colon}{name}" if flag == "--config" else argument


def _plain(error: Exception) -> str:
    """The message of a key error without the quotes and escapes that Python wraps it in."""
    text = str(error.args[0] if error.args else error)
    while len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if text.isidentifier():  # all that ml_collections says of a key in an empty group
        return f"the config has no key {text!r} there"
    if "Traceback" in text:  # ml_collections hands on the whole of it
        return text.strip().splitlines()[-1]
    return text.replace("\\n", " ").replace("\n", " ").replace("\\'", "'")


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _help(name: str, verb: Verb) -> str:
    rows = [
        *([(verb.bare[1], f"the same as --config.{verb.bare[0]}")] if verb.bare else ()),
        *((flag.form, flag.help) for flag in (*verb.short.values(), *verb.options.values())),
        ("--config=FILE.py[:ARG]", "config file; relative paths are looked for here, then in the repository"),
        ("--config.KEY=VALUE", "sets one value of it"),
        *([("--workdir=DIR", verb.workdir)] if verb.workdir else ()),
        ("--print_config", "print the effective config and stop"),
    ]
    lines = [f"  {flag:<23} {text}" for flag, text in rows]
    default = f"Default config: {verb.default or 'none, --config is required'}."
    return "\n".join([f"ctllm {name}: {verb.help}", "", *lines, "", default])


def _overview() -> str:
    lines = [f"  {name:<11} {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "ctllm VERB --config=FILE.py[:arg] [--config.key=value ...] --workdir=DIR [--print_config]",
            "",
            *lines,
            f"  {'launch':<11} {LAUNCH}",
            "",
            "ctllm VERB --help lists a verb's flags; configs/ holds the configs.",
        ]
    )


if __name__ == "__main__":
    main()
