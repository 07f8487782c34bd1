"""The code that a job runs: the tree of a commit, with the changed files that the user names, and its environment.

A tree's name is the hash of its content, so a host has each only once and nothing that runs is ever changed. The
environment is named after the two files that decide it and is made from the lock; it has the libraries alone, no code.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import ROOT, shown
from ctllm_jax.verbs import Option
from launch import hide
from launch.target import Payload

OPTIONS = {
    "uncommitted": Option("--uncommitted=FILE[,FILE]", "changed or new files to ship as they are, else refused", ""),
    "home": Option("--home=DIR", "folder for code and environments there; relative to the home folder", ".ctllm"),
    "folder": Option("--folder=DIR", "where the verb runs there: relative paths of it begin here (~)", ""),
    "python": Option("--python=PYTHON", "Python 3.11 to 3.13 there, to make the environment with", "python3"),
    "prepare": Option("--prepare=COMMAND", "a line of shell to run there before the environment is made", ""),
    "extra": Option("--extra=NAME", "what the environment has besides the base: tpu, cuda, data, ...", ""),
    "environment": Option("--environment=DIR", "a virtual environment that is there already; none is made", ""),
    "forward": Option("--forward=NAME[,NAME]", "variables of ours that the verb gets; values are never shown", ""),
    "variables": Option("--variables='NAME=VALUE ...'", "what else the verb has in its environment; no secrets", ""),
}


@dataclasses.dataclass(frozen=True)
class Code:
    """What is shipped.

    Attributes:
      root: the checkout that it comes from.
      revision: the commit, and the changed files that go along.
      tree: git's name of the content.
    """

    root: pathlib.Path
    revision: str
    tree: str

    def archive(self) -> bytes:
        """The code as a .tar.gz."""
        return _git(self.root, "archive", "--format=tar.gz", self.tree)

    def read(self, name: str) -> bytes:
        """The content of a shipped file."""
        return _git(self.root, "cat-file", "blob", f"{self.tree}:{name}")

    def has(self, name: str) -> bool:
        """Whether a file or folder is shipped."""
        found = subprocess.run(
            ["git", "-C", self.root, "cat-file", "-e", f"{self.tree}:{name}"], capture_output=True, check=False
        )
        return found.returncode == 0


def checkout() -> pathlib.Path:
    """The checkout that is shipped: the one that this launcher runs from."""
    return ROOT


def code(uncommitted: str, root: pathlib.Path) -> Code:
    """The code of the checkout as it is committed, with the changed files that are named.

    Raises:
      UserError: a file is changed and not named, or named and not changed; there is no checkout.
    """
    try:
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
    except (FileNotFoundError, UserError):
        raise UserError(f"launch ships the code of a git checkout, and {root} is none: clone the repository") from None
    changed = set(changed_files(root))
    named = {name for name in uncommitted.split(",") if name}
    if unknown := sorted(named - changed):
        raise UserError(f"launch: --uncommitted={unknown[0]}: no such changed file (paths are relative to {root})")
    if left := [shown(name) for name in sorted(changed - named)]:
        first = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        raise UserError(
            f"launch ships what is committed, and these files in {root} are not: {first}; commit them, or ship them as "
            f"they are with --uncommitted={','.join(map(shown, sorted(changed)))}"
        )
    if not named:
        return Code(root, commit, _git(root, "rev-parse", "HEAD^{tree}").decode().strip())
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": f"{folder}/index"}  # the user's own stays as it is
        _git(root, "read-tree", "HEAD", environment=index)
        _git(root, "add", "--all", "--", *sorted(named), environment=index)
        tree = _git(root, "write-tree", environment=index).decode().strip()
    return Code(root, f"{commit} with uncommitted {', '.join(map(shown, sorted(named)))}", tree)


def changed_files(root: pathlib.Path | None = None) -> list[str]:
    """Files of a checkout (this one) that differ from what is committed, or are new: what --uncommitted may name."""
    root = root or checkout()
    status = os.fsdecode(_git(root, "status", "--porcelain=v1", "-z", "--no-renames", "--untracked-files=all"))
    return sorted(entry[3:] for entry in status.split("\0") if entry)


def _git(root: pathlib.Path, *arguments: str, environment: Mapping[str, str] | None = None) -> bytes:
    ended = subprocess.run(
        ["git", "-C", root, *arguments], capture_output=True, env={**os.environ, **(environment or {})}, check=False
    )
    if ended.returncode:
        raise UserError(f"git {arguments[0]}: {ended.stderr.decode(errors='replace').strip()}")
    return ended.stdout


@dataclasses.dataclass(frozen=True)
class Place:
    """Where code and environment lie on a host, and the shell's commands that put them there.

    Paths are relative to the home folder there, or absolute where the user gave such.
    """

    home: str
    code: Code
    python: str
    prepare: str
    extra: str
    environment: str

    @property
    def source(self) -> str:
        """The folder of the code."""
        return f"{self.home}/code/{self.code.tree}"

    @property
    def venv(self) -> str:
        """The virtual environment, named after all that decides what is in it."""
        if self.environment:
            return self.environment
        digest = hashlib.sha256("\0".join((self.python, self.extra)).encode())
        for name in ("setup.py", "requirements.lock"):
            digest.update(self.code.read(name))
        return f"{self.home}/env/{digest.hexdigest()[:16]}"

    @property
    def interpreter(self) -> str:
        """Its Python."""
        return f"{self.venv}/bin/python"

    def keep(self) -> str:
        """Starts a keeper (`launch.keeper`) there."""
        source, python = shlex.quote(self.source), shlex.quote(self.interpreter)
        return f'cd && python=$(realpath -s {python}) && cd {source} && exec "$python" -m launch.keeper'

    def probe(self) -> str:
        """Says in a word each what is there: code, environment."""
        whole = self.interpreter if self.environment else f"{self.venv}/whole"
        marks = {"code": self.source, "environment": whole}
        looks = (f"if test -e {shlex.quote(path)}; then echo {word}; fi" for word, path in marks.items())
        return f"cd && {'; '.join(looks)}"

    def unpack(self) -> str:
        """Puts the archive on standard input in its place; of two that come at once one wins."""
        target, new = shlex.quote(self.source), shlex.quote(f"{self.source}.new")
        return (
            f"cd && mkdir -p {new}.$$ && tar -xzf - -C {new}.$$ && "
            f"{{ mv -T {new}.$$ {target} 2>/dev/null || {{ rm -rf {new}.$$ && test -d {target}; }}; }}"
        )

    def install(self) -> str:
        """Makes the environment from the lock; who comes second waits."""
        venv, python, source = (shlex.quote(path) for path in (self.venv, self.interpreter, self.source))
        extras = f"[{self.extra}]" if self.extra else ""
        unfit = shlex.quote(
            f"{self.python} is no Python 3.11 to 3.13 here; name one with --python, or install one with --prepare"
        )
        lines = [
            f"test ! -e {venv}/whole || exit 0",
            *([f"sh -c {shlex.quote(self.prepare)}"] if self.prepare else []),  # `set -e` forgives `a && b` where it is
            f"{shlex.quote(self.python)} -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' "
            f"|| {{ echo {unfit} >&2; exit 1; }}",
            f"rm -rf {venv}",
            f"{shlex.quote(self.python)} -m venv {venv}",
            f"cp -r {source} {venv}/source",  # pip builds in the folder that it installs from
            f"{python} -m pip install --quiet --constraint {source}/requirements.lock {venv}/source{extras}",
            f"{python} -m pip uninstall --quiet --yes ctllm-jax",  # it runs from the shipped code
            f"rm -rf {venv}/source",
            f"touch {venv}/whole",
        ]
        body = shlex.quote("; ".join(["set -e", *lines]))
        return f"cd && mkdir -p {shlex.quote(f'{self.home}/env')} && flock {venv}.lock sh -c {body}"


def place(options: Mapping[str, str]) -> Place:
    """From the options of a target.

    Raises:
      UserError: as `code`; or --prepare has nothing to prepare.
    """
    if options["prepare"] and options["environment"]:
        raise UserError(
            "launch: --prepare is for an environment that is made, and --environment names one that is there"
        )
    return Place(
        options["home"].rstrip("/"),
        code(options["uncommitted"], checkout()),
        options["python"],
        options["prepare"],
        options["extra"],
        options["environment"].rstrip("/"),
    )


def split_config(payload: Payload, shipped: Code) -> tuple[str | None, tuple[str, ...]]:
    """(the config file's path in the code, with what follows its colon; the payload's other arguments).

    Raises:
      UserError: the config file is not part of the code that is shipped.
    """
    config, others, waiting = None, [], iter(payload.arguments)
    for argument in waiting:
        flag, given, value = argument.partition("=")
        if flag == "--config":
            path, colon, name = (value if given else next(waiting)).partition(":")
            config = f"{_shipped_path(path, shipped)}{colon}{name}"
        else:
            others.append(argument)
    return config, tuple(others)


def _shipped_path(path: str, shipped: Code) -> str:
    here = pathlib.Path(path).absolute() if pathlib.Path(path).exists() else shipped.root / path
    name = os.path.relpath(here.resolve(), shipped.root.resolve())
    if name.startswith("..") or not shipped.has(name):
        raise UserError(f"--config={path}: not part of the code that is shipped; put it into {shipped.root}, committed")
    return name


def variables(text: str) -> dict[str, str]:
    """What --variables sets, written as in front of a command in a shell.

    Raises:
      UserError: it is written otherwise.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"launch: --variables={text}: {error}") from None
    if wrong := [word for word in words if not re.match(r"[A-Za-z_]\w*=", word, re.ASCII)]:
        raise UserError(f"launch: --variables: {wrong[0]!r} is not NAME=VALUE; several stand with blanks between them")
    return dict(word.split("=", 1) for word in words)


def forwarded(names: str) -> dict[str, str]:
    """The variables of ours that the user wants there.

    Raises:
      UserError: one is not set, or too short to be hidden.
    """
    wanted = [name for name in names.split(",") if name]
    if missing := [name for name in wanted if name not in os.environ]:
        raise UserError(f"launch: --forward={missing[0]}: no such environment variable here")
    if short := [name for name in wanted if not hide.pieces(os.environ[name])]:
        raise UserError(
            f"launch: --forward={short[0]}: its value is too short to be hidden in what is printed (6 characters at "
            "least, in one line); one that is not secret goes into --variables"
        )
    return {name: os.environ[name] for name in wanted}
