"""`--workdir=gs://BUCKET/FOLDER` for every verb but `train`, and folders of a bucket that a verb reads.

A verb writes into a folder of this machine, as ever: a mirror, of which a thread copies to the bucket what has changed,
every twenty seconds and in the end. A verb that goes on where it was cut short trusts what it finds: a file that is
there is whole, and so is all that was written before it. Hence mirror.json, beside the files on the bucket: the names
of those that were in the folder at one moment and have all arrived ("files"). A run begins with them and with no
others, on whatever machine, so a copy that was cut short is as if it had not begun. It also names others that may be
there ("begun"): on their way, or to be deleted. What the verb has not written is never touched.
"""

import atexit
import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ctllm_jax.bucket import CLAIM, BucketFolder, Object, Unreachable
from ctllm_jax.common.errors import Unanswered, UserError
from ctllm_jax.common.files import COPY_OF, is_remote, write_atomic
from ctllm_jax.common.manifest import LOCK
from ctllm_jax.common.status import EXIT_RESUME
from ctllm_jax.mirror import SMALL, Mirror, mirrored, version
from ctllm_jax.verbs import Verb

LISTING = "mirror.json"
_TOGETHER = 8  # files on their way at once
_GROWN = 1.25  # by how much a large file has grown before it is copied once more
_TOLD = 10.0  # seconds that the end may take before it is said what is waited for


@contextlib.contextmanager
def at_hand(name: str, verb: Verb, config: Any, workdir: str | None) -> Iterator[tuple[Any, str | None]]:
    """(config, workdir) as the verb can use them: folders of a bucket that it cannot are folders of this machine.

    Raises:
      UserError: a folder cannot be reached, another job writes it, or Beam's workers would not see it.
      SystemExit: with EXIT_RESUME, the process was asked to end, or files could not be copied.
    """
    copies: dict[str, str] = {}  # {folder of this machine: of the bucket}

    def copy(value: str | Sequence[str] | None) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(map(copy, value))
        if not value or not is_remote(value):
            return value
        folder = copied(value)
        copies[folder] = value
        return folder

    far = bool(workdir) and is_remote(workdir) and verb.mirrored
    if far and not verb.reads:
        _check_workers(name, config, workdir)
    for key in verb.folders:
        config = _replaced(config, key.split("."), copy)
    try:
        if not far:
            yield config, workdir
        elif verb.reads:
            yield config, copy(workdir)
        else:
            with mirrored(functools.partial(StageMirror, workdir, name), workdir, name) as mirror, _leaving_on_signal():
                yield config, str(mirror.path)
            shutil.rmtree(mirror.path.parent, ignore_errors=True)  # it may be large, and all of it has arrived
    except UserError as error:
        error.args = (functools.reduce(lambda text, pair: text.replace(*pair), copies.items(), str(error)),)
        raise


@contextlib.contextmanager
def _leaving_on_signal() -> Iterator[None]:
    """SIGTERM, as of a machine that is taken away, ends the block as an exit does: what is there is copied first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_RESUME))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_workers(name: str, config: Any, workdir: str) -> None:
    beam = getattr(config, "beam", None)
    if beam and beam.runner != "local":
        raise UserError(
            f"{name}: --workdir={workdir}: the workers of {beam.runner} would write into a folder that is only on this "
            "machine; take --config.beam.runner=local, or a --workdir that all machines see (docs/beam.md)"
        )


def _replaced(config: Any, key: Sequence[str], change: Callable[[Any], Any]) -> Any:
    """A dataclass with one of its values, or of those in it, changed."""
    first, *rest = key
    value = getattr(config, first)
    return dataclasses.replace(config, **{first: _replaced(value, rest, change) if rest else change(value)})


def copied(url: str) -> str:
    """A folder of this machine that holds what a folder of a bucket holds; deleted when the program ends.

    It lies below TMPDIR.

    Raises:
      UserError: it cannot be reached, is empty, or has no room here.
    """
    try:
        remote = BucketFolder(url)
        names = {name: about for name, about in remote.contents().items() if name not in (CLAIM, LISTING)}
        if not names:
            raise UserError(f"{remote.url}: no such folder, or an empty one")
        temporary = tempfile.mkdtemp(prefix="ctllm-copy-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        folder = pathlib.Path(temporary, remote.url.rpartition("/")[2])
        write_atomic(folder / COPY_OF, remote.url)
        _Together(remote.url).each(lambda own, name: own.download(name, folder / name), names)
    except Unreachable as error:
        raise Unanswered(f"{error}; start again once it does") from error
    return str(folder)


class StageMirror(Mirror):
    """A folder of this machine, all of whose files are copied to a bucket as they come and deleted as they go."""

    every = 20.0

    def _begin(self) -> None:
        names, begun, contents = _listed(self._remote, self._verb)
        self._listed, self._begun = {*names}, begun  # as mirror.json has them
        self._together = _Together(self._remote.url)
        write_atomic(self.path / COPY_OF, self._remote.url)
        for path in sorted(self.path.rglob("*"), reverse=True):  # what is in a folder before the folder
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # it is not empty
                    path.rmdir()
            elif (name := path.relative_to(self.path).as_posix()) not in names and name != COPY_OF:
                path.unlink()
        missing = [name for name in names if not _is_same(self.path / name, contents[name])]
        self._together.each(lambda own, name: own.download(name, self.path / name), missing)
        self._sent = {name: version(self.path / name) for name in names}

    def close(self, patience: float) -> bool:
        """As of a Mirror; while the storage takes what is left, `patience` does not run out."""
        ticket, told = self._request_copy(), time.monotonic() + _TOLD
        with self._changed:
            while self._arrived < ticket and self._thread.is_alive() and not self._has_given_up(patience):
                self._changed.wait(0.5)
                if time.monotonic() > told:
                    print(f"{self._verb}: copying what is left to {self._remote.url}", file=sys.stderr, flush=True)
                    told = float("inf")
            self._leaving = True
            self._changed.notify_all()
            return self._arrived >= ticket

    def _has_given_up(self, patience: float) -> bool:
        return self._failing_since is not None and time.monotonic() - self._failing_since > patience

    # ---- The thread

    def _copy(self, asked: bool) -> None:
        while not self._copy_moment(asked):
            pass

    def _copy_moment(self, asked: bool) -> bool:
        """Copies what was in the folder at one moment; whether all of it was still there to be copied."""
        files = self._still()
        try:
            now = {name: version(path) for name, path in files.items()}
            changed = {name for name in now if now[name] != self._sent.get(name) and (asked or self._is_due(name, now))}
            self._list(self._listed, self._begun | changed - self._listed)
            manifests = {name for name in changed if pathlib.PurePath(name).name == "manifest.json"}
            for names in (changed - manifests, manifests):  # a folder that says it is whole is whole
                self._together.each(lambda own, name: own.upload(name, files[name]), sorted(names))
        except FileNotFoundError:
            return False
        self._sent |= {name: now[name] for name in changed}  # what was added since is another version
        gone = (self._listed | self._begun) - files.keys()
        self._list({*files}, gone)
        self._together.each(lambda own, name: own.delete(name), gone)
        self._list({*files}, set())
        self._sent = {name: self._sent[name] for name in files}
        return True

    def _list(self, names: set[str], begun: set[str]) -> None:
        """Writes mirror.json where it says something else."""
        if (names, begun) != (self._listed, self._begun):
            self._remote.write(LISTING, json.dumps({"files": sorted(names), "begun": sorted(begun)}).encode())
            self._listed, self._begun = names, begun

    def _is_due(self, name: str, now: Mapping[str, tuple[int, int, int]]) -> bool:
        """A large file that grows would be copied as a whole each time."""
        (size, _, inode), (last_size, _, last_inode) = now[name], self._sent.get(name, (0, 0, 0))
        return size <= SMALL or inode != last_inode or not last_size <= size < _GROWN * last_size

    def _still(self) -> dict[str, pathlib.Path]:
        """The files as they all are at one moment: those that two looks in a row have found."""
        found = before = None
        while found is None or found != before:
            before, found = found, dict(self._files())
        return found

    def _files(self) -> list[tuple[str, pathlib.Path]]:
        found = []
        for folder, inside, files in os.walk(self.path):
            inside[:] = [name for name in inside if _is_finished(name)]
            paths = [pathlib.Path(folder, name) for name in files if _is_finished(name)]
            found += [(path.relative_to(self.path).as_posix(), path) for path in paths]
        return found


def _is_finished(name: str) -> bool:
    """Whether a file or folder is of the result and has the name that it is to keep; others have ours, TFDS's or
    Orbax's."""
    passing = name.startswith("incomplete.") or name.endswith(".tmp") or ".orbax-checkpoint-tmp" in name
    return not passing and name not in (LOCK, COPY_OF)


def _listed(remote: BucketFolder, verb: str) -> tuple[list[str], set[str], dict[str, Object]]:
    """(names of the files that a run of the verb begins with, of others that are there of its making, all there is)."""
    contents = remote.contents()
    stage, listing = _object(remote, "stage.json"), _object(remote, LISTING)
    if stage.get("stage", verb) != verb:  # of another verb, which this one is going to refuse
        return ["stage.json"], set(), contents
    files = contents.keys() - {CLAIM, LISTING}
    if LISTING in contents:
        listed, begun = listing.get("files"), listing.get("begun")
        if not (isinstance(listed, list) and isinstance(begun, list)):
            raise UserError(f"{remote.url}/{LISTING} is damaged; delete the folder to start over")
        return sorted(files & {*map(str, listed)}), files & {*map(str, begun)}, contents
    if "manifest.json" in contents:  # put there by hand
        return sorted(files), set(), contents
    return sorted(files & {"stage.json"}), set(), contents


def _object(remote: BucketFolder, name: str) -> dict:
    try:
        value = json.loads(remote.read(name) or b"{}")
    except ValueError:
        value = {}
    return value if isinstance(value, dict) else {}


def _is_same(path: pathlib.Path, about: Object) -> bool:
    """Whether a file holds what an object holds."""
    if not path.is_file() or path.stat().st_size != about.size:
        return False
    checksum = importlib.import_module("google_crc32c").Checksum()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            checksum.update(piece)
    return base64.b64encode(checksum.digest()).decode() == about.crc32c


class _Together:
    """Several requests at a time, each thread with a client of its own."""

    def __init__(self, url: str):
        self._url, self._own = url, threading.local()
        self._pool = concurrent.futures.ThreadPoolExecutor(_TOGETHER)

    def each(self, action: Callable[[BucketFolder, str], None], names: Iterable[str]) -> None:
        """Does it for each name; raises the first error when all have ended."""
        begun = [self._pool.submit(self._do, action, name) for name in names]
        concurrent.futures.wait(begun)
        for one in begun:
            one.result()

    def _do(self, action: Callable[[BucketFolder, str], None], name: str) -> None:
        if not hasattr(self._own, "folder"):
            self._own.folder = BucketFolder(self._url)
        action(self._own.folder, name)
