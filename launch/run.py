"""The command line of `ctllm launch`: finds the target, checks what it is to run, hands over."""

import importlib
import subprocess
import sys
from collections.abc import Sequence

from absl import flags

from ctllm_jax import cli
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import is_remote
from ctllm_jax.verbs import VERBS, Option
from launch import view
from launch.target import Payload, Target

TARGETS = {  # {name: the module whose TARGET it is}
    "local": "launch.local",
    "ssh": "launch.ssh",
    "slurm": "launch.slurm",
    "tpu": "launch.tpu",
    "gke": "launch.gke",
}
USAGE = "ctllm launch TARGET [--flag=value ...] -- VERB --config=FILE.py[:arg] ... --workdir=DIR"
COMMON = {"dry_run": Option("--dry_run", "print every command and file exactly, start nothing", False)}


def main(arguments: list[str]) -> None:
    """Runs `ctllm launch` with the given arguments; exits with the job's status.

    Raises:
      UserError: no such target, verb or flag; the verb's command line is wrong; it cannot run as asked.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    name, *rest = arguments
    if name in view.FORMS:
        sys.exit(view.run(name, rest, TARGETS))
    if name not in TARGETS:
        raise UserError(f"launch: unknown target {name!r}; there are: {', '.join(TARGETS)}")
    target = _target(name)
    own, command = (rest[: rest.index("--")], rest[rest.index("--") + 1 :]) if "--" in rest else (rest, None)
    if "-h" in own or "--help" in own:
        print(_help(name, target))
        return
    options = _options(name, target, own)
    if not command:
        raise UserError(f"launch {name}: give the verb to run after `--`: {USAGE}")
    payload = _payload(name, command)
    if payload is not None:
        status = target.run(payload, options, options.pop("dry_run"))
        sys.stdout.flush()
        sys.exit(status)


def launch(target: str, command: Sequence[str], **options: str | float | bool) -> int:
    """`ctllm launch` from a program or a notebook; returns the job's exit status.

    The launcher is a process of its own, for signals and the ends of children are a process's; what it says appears on
    standard output line by line. Interrupting a notebook's cell is Ctrl-C for it: the job saves and ends. It does the
    same when this process is gone, with its next line.

    Args:
      target: one of TARGETS.
      command: a verb and its flags, as `ctllm_jax.notebook.command` writes them.
      options: the target's flags by name: `processes=2`, `dry_run=True`.
    """
    flags_given = [f"--{name}={value}" for name, value in options.items()]
    words = [sys.executable, "-m", "ctllm_jax.cli", "launch", target, *flags_given, "--", *command]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        while True:
            try:
                for line in process.stdout:
                    print(line, end="")
                return process.wait()
            except KeyboardInterrupt:  # it has heard it as well
                continue


def _target(name: str) -> Target:
    return importlib.import_module(TARGETS[name]).TARGET


def _options(name: str, target: Target, arguments: list[str]) -> dict:
    values = flags.FlagValues()
    options = {**target.options, **COMMON}
    cli.define(options, values)
    try:
        rest = values([name, *arguments])[1:]
    except flags.Error as error:
        raise UserError(f"launch {name}: {error}") from None
    if rest:
        raise UserError(f"launch {name}: unexpected argument {rest[0]!r} (the verb comes after `--`)")
    return {key: values[key].value for key in options}


def _payload(name: str, command: list[str]) -> Payload | None:
    """The verb and its arguments; None where they only ask for help, which is then given."""
    verb, *arguments = command
    if verb not in VERBS:
        raise UserError(f"launch {name}: unknown verb {verb!r}; there are: {', '.join(VERBS)}")
    parsed = cli.parse(verb, VERBS[verb], arguments)
    if parsed is None:
        return None
    workdir = parsed.workdir
    writes_to = None if VERBS[verb].reads or not workdir or is_remote(workdir) else workdir
    return Payload(verb, tuple(arguments), "distributed" in parsed.values, writes_to)


def _help(name: str, target: Target) -> str:
    lines = [f"  {option.form:<25} {option.help}" for option in (*target.options.values(), *COMMON.values())]
    return "\n".join([f"ctllm launch {name}: {target.help}", "", USAGE.replace("TARGET", name), "", *lines])


def _overview() -> str:
    lines = [f"  {name:<11} {_target(name).help}" for name in TARGETS]
    views = [f"  {name:<11} {form}" for name, form in view.FORMS.items()]
    hint = "ctllm launch TARGET --help lists a target's flags."
    return "\n".join([USAGE, "", *lines, "", hint, "", "Of jobs that were launched:", "", *views])
