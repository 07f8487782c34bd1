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
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import ROOT, here_or_shipped
from ctllm_jax.common.quiet import quiet_libraries
from ctllm_jax.common.status import status_of
from ctllm_jax.common.stderr import lossy_stderr
from ctllm_jax.verbs import VERBS, Option, Verb

EXIT_CLOSED_PIPE = 141  # as a shell reports a program that SIGPIPE ended
LAUNCH = "any of these as a job of one or several processes: ctllm launch TARGET -- VERB ..."


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `ctllm` script.

    Exit status: 0 done, 1 an error of ours, 2 the user's to mend, 69 another process of the job is gone (134 where JAX
    noticed first) or a storage does not answer, 75 stopped and saved, 130 interrupted, 141 nobody read the output on.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        _dispatch(argv)
        sys.stdout.flush()  # here, where a closed pipe can still be dealt with
    except UserError as error:
        print(f"ctllm: error: {error}", file=sys.stderr)
        sys.exit(status_of(error))
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
    parsed = parse(argv[0], verb, argv[1:])
    if parsed is None:
        return
    if not parsed.print_config:
        execute(argv[0], verb, parsed.values, parsed.workdir)
        return
    with _quiet(verb):
        _, config = _configured(argv[0], verb, parsed.values)
    print(json.dumps(dataclasses.asdict(config), ensure_ascii=False, indent=1))


def execute(name: str, verb: Verb, values: Mapping[str, Any], workdir: str | None) -> dict:
    """Runs a verb with the values of its config; returns what its `run` returns.

    Raises:
      UserError: a library is missing, a value or the folder, or what the verb itself raises.
    """
    with _quiet(verb), lossy_stderr():
        module, config = _configured(name, verb, values)
        if not workdir and verb.writes:
            raise UserError(f"{name}: give --workdir=DIR ({verb.workdir})")
        if "://" not in f"{workdir} {values}":  # nothing on a bucket: no library for one is needed
            return module.run(config, workdir)
        with importlib.import_module("ctllm_jax.stage_mirror").at_hand(name, verb, config, workdir) as (config, folder):
            return module.run(config, folder)


def _quiet(verb: Verb) -> contextlib.AbstractContextManager:
    return quiet_libraries() if verb.module.startswith("data_pipeline") else contextlib.nullcontext()


def _configured(name: str, verb: Verb, values: Mapping[str, Any]) -> tuple[types.ModuleType, Any]:
    """The verb's module and its config."""
    try:
        module = importlib.import_module(verb.module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("ctllm_jax", "data_pipeline", "configs"):
            raise
        raise UserError(f"{name} needs {error.name}: pip install 'ctllm-jax[{verb.extra}]'") from None
    return module, build(getattr(module, verb.config), values)


def define(options: Mapping[str, Option], values: flags.FlagValues) -> None:
    """Adds options to the flags that `values` parses."""
    makers = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for key, option in options.items():
        makers[type(option.default)](key, option.default, "", flag_values=values)


class Parsed(NamedTuple):
    """A verb's command line: the values of its config, --workdir, and whether the config is only to be printed."""

    values: dict
    workdir: str | None
    print_config: bool


def parse(name: str, verb: Verb, arguments: list[str]) -> Parsed | None:
    """Reads a verb's command line; None after --help.

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
    ours = sys.argv
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
    finally:
        sys.argv = ours
    if rest and not verb.bare:
        raise UserError(f"{name}: unexpected argument {rest[0]!r} (flags are written --name=value)")
    if config is None:
        raise UserError(f"{name}: give --config=FILE.py, one of configs/")
    settings = config.to_dict()
    if rest:
        settings[verb.bare[0]] = tuple(rest)
    if verb.about:
        settings = {verb.about: settings, **{key: values[key].value for key in verb.options}}
    return Parsed(settings, values.workdir, values.print_config)


def flag_value(value: Any) -> str:
    """A config's value as a flag says it; texts in a tuple get double quotes, which stay as they are in single ones."""
    if value and isinstance(value, tuple) and all(isinstance(item, str) for item in value):
        return "(" + "".join(f"{json.dumps(item, ensure_ascii=False)}," for item in value) + ")"
    return value if isinstance(value, str) else repr(value)


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
    lines = [f"  {name:<13} {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "ctllm VERB --config=FILE.py[:arg] [--config.key=value ...] --workdir=DIR [--print_config]",
            "",
            *lines,
            f"  {'launch':<13} {LAUNCH}",
            "",
            "ctllm VERB --help lists a verb's flags; configs/ holds the configs.",
        ]
    )


if __name__ == "__main__":
    main()
