"""The verbs for notebooks and programs: the same functions, configs and folders as on the command line.

    config = pretrain.get_config("tiny")
    config.data.store = "runs/store"
    run("train", config, "runs/small")                    # here, in this process; or as a job:
    launch("local", command("train", "configs/pretrain.py:tiny", config, "runs/small"), processes=2)

(`launch` is in launch/run.py.) A verb says here what it says in a terminal, and its result is returned as well.
"""

import contextlib
import importlib
import io
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from ctllm_jax import cli
from ctllm_jax.common import html
from ctllm_jax.common.errors import UserError
from ctllm_jax.verbs import VERBS, Verb


def run(
    verb: str,
    config: ConfigDict | None = None,
    workdir: str | os.PathLike | None = None,
    say: bool = True,
    **values: Any,
) -> dict:
    """Runs a verb in this process; returns its result.

    A folder that is finished is read and not made again, one that was cut short is taken up. Paths are relative to this
    process's folder. A run of `train` that is interrupted saves, and raises SystemExit.

    Args:
      verb: one of `ctllm_jax.verbs.VERBS`.
      config: as its config file gives it; None takes the verb's default one.
      workdir: the verb's folder.
      say: whether what it prints is to be seen.
      values: keys of the config, or options of the verb: `run("trace", workdir=RUN, spike=1)`.

    Raises:
      UserError: no such verb or key, or what the verb itself raises.
    """
    about = _verb(verb)
    settings = _default(verb, about) if config is None else config.to_dict()
    if about.about:
        settings = {about.about: settings, **{name: option.default for name, option in about.options.items()}}
    with contextlib.nullcontext() if say else contextlib.redirect_stdout(io.StringIO()):
        return cli.execute(verb, about, settings | values, None if workdir is None else os.fspath(workdir))


def command(verb: str, base: str, config: ConfigDict, workdir: str | os.PathLike | None = None) -> list[str]:
    """The command line, from the verb on, that does what `run(verb, config, workdir)` does.

    It names a config file and each value that differs from it, so it says what is particular about a run, and it can be
    launched where only committed files are.

    Args:
      verb: one of `ctllm_jax.verbs.VERBS`.
      base: a config file, `configs/pretrain.py:tiny`.
      config: a changed one of its kind.
      workdir: the verb's folder.

    Raises:
      UserError: a value cannot be said by a flag (a key that the file does not have, or None for a value that it has).
    """
    about, wanted, start = _verb(verb), config.to_dict(), f"--config={base}"
    changed = _changed(_parsed(verb, about, start), wanted)
    flags = [start, *(f"--config.{path}={cli.flag_value(value)}" for path, value in changed)]
    if left := list(_changed(_parsed(verb, about, *flags), wanted)):
        raise UserError(
            f"{verb}: config.{left[0][0]} = {left[0][1]!r} cannot be set by a flag on top of {base}; write a config "
            "file of your own that has it"
        )
    return [verb, *flags, *([] if workdir is None else [f"--workdir={os.fspath(workdir)}"])]


def show(*parts: str) -> "Shown":
    """What a notebook draws for HTML of the project's reports: of `ctllm_jax.common.html`, or a report's `sections`."""
    return Shown("".join(parts))


class Shown:
    """HTML that a notebook draws where it is the last value of a cell, or is given to `display`."""

    def __init__(self, content: str):
        self._content = content

    def _repr_html_(self) -> str:
        return html.inside(self._content)


def _verb(name: str) -> Verb:
    if name not in VERBS:
        raise UserError(f"unknown verb {name!r}; there are: {', '.join(VERBS)}")
    return VERBS[name]


def _default(name: str, verb: Verb) -> dict[str, Any]:
    if verb.default is None:
        raise UserError(f"{name}: give a config, from one of configs/")
    return importlib.import_module(verb.default.removesuffix(".py").replace("/", ".")).get_config().to_dict()


def _parsed(name: str, verb: Verb, *flags: str) -> dict[str, Any]:
    values = cli.parse(name, verb, list(flags)).values
    return values[verb.about] if verb.about else values


def _changed(base: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, wanted value) of what differs."""
    for key in dict.fromkeys([*base, *wanted]):
        where, old, new = f"{path}{key}", base.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changed(old, new, f"{where}.")
        elif old != new or (key in base) != (key in wanted):
            yield where, new
