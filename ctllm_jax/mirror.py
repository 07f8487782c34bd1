"""Run directories on a bucket: `ctllm train --workdir=gs://BUCKET/RUN`, and how the other verbs read one.

Orbax writes checkpoints to the bucket by itself, and reads them there. Everything else in a run directory is small and
written as ever, into a folder of this machine: the mirror, whose `.ctllm-mirror` says what it is a mirror of. A thread
copies what has changed to the bucket, every minute and when it is told to, and manifest.json only after all else; a
checkpoint is committed after the metrics before it have arrived. The bucket is what counts: a run begins with what
is there, so it goes on from any machine. Every process has a mirror of its own; the first one's is the run, of the
others stacks and profiles are copied.
"""

import atexit
import contextlib
import functools
import hashlib
import importlib
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

from ctllm_jax import processes
from ctllm_jax.bucket import BucketFolder, Claim, Unreachable
from ctllm_jax.common.errors import Unanswered, UserError
from ctllm_jax.common.files import cache_folder, is_remote, write_atomic
from ctllm_jax.common.status import EXIT_RESUME

# With TensorFlow at hand Orbax's paths would take its client, which an accelerator host does not have. Read once.
os.environ.setdefault("EPATH_USE_TF", "false")

POINTER = ".ctllm-mirror"
_FILES = ("stage.json", "run.json", "manifest.json", "metrics.jsonl", "samples.jsonl")  # what a run goes on with,
_FOLDERS = ("", "tokenizer/", "reference/", "base/", "base/tokenizer/")  # and where
_OWN = ("stacks", "profile")  # what a process that is not the first has to tell
_NOT_COPIED = ("checkpoints", "wandb")  # these go where they belong by themselves
SMALL = 4 << 20  # bytes; a larger file that grows is not copied each time, as it would be copied as a whole
_PAUSES = (1.0, 5.0, 10.0, 20.0, 30.0)  # seconds between attempts; the last one for ever
_PATIENCE = 300.0  # seconds that a checkpoint, or the end of a run, waits for its metrics to arrive
_PARTING = 15.0  # seconds, where the run fails anyhow
_START = 600.0  # seconds that the start of a run waits for a storage that does not answer

T = TypeVar("T")


class RunFolder:
    """A run's directory as the trainer sees it. This one is where it belongs.

    Attributes:
      path: the folder of this machine that all is written to but checkpoints.
      before_commit: what a checkpoint waits for before it is committed, if anything.
    """

    before_commit: Callable[[], None] | None = None

    def __init__(self, path: pathlib.Path):
        self.path = path

    def publish(self) -> None:
        """Lets others see before long what is in the folder now; returns at once."""


@contextlib.contextmanager
def run_folder(workdir: str) -> Iterator[RunFolder]:
    """The folder to write a run into, inside the block; after it all is where it belongs. All processes call it.

    Raises:
      UserError: another job is writing the run; the bucket refuses, or has not answered for ten minutes.
      SystemExit: with EXIT_RESUME, the run is finished but for files that could not be copied.
    """
    if not is_remote(workdir):
        yield RunFolder(pathlib.Path(workdir))
        return
    index = jax.process_index()
    with contextlib.ExitStack() as held:
        with processes.first_process_first():
            make = functools.partial(Mirror, workdir, "train", index)
            mirror = held.enter_context(mirrored(make, workdir, "train", claims=index == 0))
        yield mirror


@contextlib.contextmanager
def mirrored(make: Callable[[], "Mirror"], workdir: str, verb: str, claims: bool = True) -> Iterator["Mirror"]:
    """The mirror that `make` makes, inside the block; after it all is on the bucket. Errors as of `run_folder`.

    Args:
      make: makes it; called again while the storage does not answer.
      workdir: what it is a mirror of.
      verb: who writes there, as messages have it.
      claims: whether it is this process that keeps other jobs out.
    """
    claim = _retry_while_unreachable(functools.partial(Claim, workdir, verb), verb) if claims else None
    try:
        mirror = _retry_while_unreachable(make, verb)
    except BaseException:
        if claim:
            claim.release()
        raise
    patience = _PARTING
    try:
        yield mirror
        patience = _PATIENCE
    except SystemExit:  # it was asked to stop, and has saved
        patience = _PATIENCE
        raise
    except UserError as error:
        error.args = (str(error).replace(str(mirror.path), workdir),)
        raise
    finally:
        whole = mirror.close(patience)
        if claim:
            claim.release()
    if not whole:
        print(f"{verb}: {workdir} lacks files of {mirror.path}; the same command copies them", file=sys.stderr)
        sys.exit(EXIT_RESUME)


def _retry_while_unreachable(action: Callable[[], T], verb: str) -> T:
    """Does something, again and again while the storage does not answer."""
    until, reported = time.monotonic() + _START, False
    while True:
        try:
            return action()
        except Unreachable as error:
            if time.monotonic() > until:
                raise Unanswered(f"{error}; nothing was changed; the same command goes on once it does") from error
            if not reported:
                print(f"{verb}: {error}; trying again", file=sys.stderr)
            reported = True
            time.sleep(_PAUSES[2])


def fetched(location: str) -> pathlib.Path:
    """A folder of this machine with the small files of a run: its own, or a copy of what is on a bucket by now.

    Checkpoints are found from there (`checkpoint.checkpoints_folder`). The copy is deleted when the program ends.

    Raises:
      UserError: it cannot be reached.
    """
    if not is_remote(location):
        return pathlib.Path(location)
    try:
        remote = BucketFolder(location)
        temporary = tempfile.mkdtemp(prefix="ctllm-run-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        folder = pathlib.Path(temporary, remote.url.rpartition("/")[2])
        _fetch(remote, folder)
    except Unreachable as error:
        raise Unanswered(f"{error}; start again once it does") from error
    return folder


def is_there(folder: str, name: str) -> bool:
    """Whether a folder of a bucket holds a file; UserError where it cannot be reached."""
    try:
        return name in BucketFolder(folder).names()
    except Unreachable as error:
        raise Unanswered(f"{error}; start again once it does") from error


def remote_of(path: str | os.PathLike) -> str | None:
    """What a folder mirrors; None where it is no mirror, or part of one."""
    path = pathlib.Path(path).absolute()
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            inside = path.relative_to(folder).as_posix()
            url = (folder / POINTER).read_text().strip()
            return url if inside == "." else f"{url}/{inside}"
    return None


def prepare_paths() -> None:
    """To be called before Orbax goes to a bucket: it must not take its memory of a listing for what is there."""
    importlib.import_module("fsspec.config").conf.setdefault("gs", {})["use_listings_cache"] = False


class Mirror(RunFolder):
    """A folder of this machine whose files are copied to a bucket by a thread, as they change."""

    every = 60.0  # seconds after which changes are copied unasked

    def __init__(self, url: str, verb: str, index: int = 0):
        """Begins with what is on the bucket; `index` is the process's in its job.

        Raises:
          UserError: it refuses, or is not on Google Cloud Storage.
          Unreachable: it does not answer.
        """
        remote = BucketFolder(url)
        mark = hashlib.sha256(remote.url.encode()).hexdigest()[:16] + (f"-process-{index}" if index else "")
        super().__init__(cache_folder("runs") / mark / remote.url.rpartition("/")[2])
        self._verb, self._only = verb, _OWN if index else ()
        self._sent: dict[str, tuple[int, ...]] = {}  # {name: `version` of what has arrived}
        self._ticket = self._arrived = 0  # wishes, and those that are fulfilled
        self._changed, self._leaving = threading.Condition(), False
        self.before_commit = self._settle
        self._failing_since: float | None = None  # of the clock that only grows
        self._remote = remote  # after the beginning the thread's alone
        self._begin()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def _begin(self) -> None:
        """Makes the folder what it is on the bucket."""
        _fetch(self._remote, self.path)
        for name, path in self._files():
            if _is_of_run(name):
                self._sent[name] = version(path)

    def publish(self) -> None:
        """Has changes copied; returns at once."""
        self._request_copy()

    def close(self, patience: float) -> bool:
        """Copies what is left, for at most so many seconds; whether all has arrived."""
        ticket, until = self._request_copy(), time.monotonic() + patience
        with self._changed:
            self._changed.wait_for(lambda: self._arrived >= ticket, until - time.monotonic())
            self._leaving = True
            self._changed.notify_all()
            return self._arrived >= ticket

    def _settle(self) -> None:
        """Returns when all that is in the folder now has arrived.

        Raises:
          OSError: it has not, for five minutes.
        """
        ticket = self._request_copy()
        with self._changed:
            if not self._changed.wait_for(lambda: self._arrived >= ticket, _PATIENCE):
                raise OSError(f"{self._remote.url} has not taken the metrics before it for {_PATIENCE:.0f} s")

    def _request_copy(self) -> int:
        with self._changed:
            self._ticket += 1
            self._changed.notify_all()
            return self._ticket

    # ---- The thread

    def _run(self) -> None:
        failures = 0
        while True:
            with self._changed:
                if failures:
                    self._changed.wait_for(lambda: self._leaving, _PAUSES[min(failures, len(_PAUSES)) - 1])
                else:
                    self._changed.wait_for(lambda: self._leaving or self._ticket > self._arrived, self.every)
                if self._leaving:
                    return
                ticket = self._ticket
            try:
                self._copy(asked=ticket > self._arrived)
            except (OSError, UserError) as error:  # Unreachable, or the disk
                failures += 1
                if failures == 1:
                    self._failing_since = time.monotonic()
                    said = f"{self._verb}: {error}; the run goes on, what it writes is copied later"
                    print(said, file=sys.stderr, flush=True)
                continue
            if failures:
                said = f"{self._verb}: {self._remote.url} has what the run has written again"
                print(said, file=sys.stderr, flush=True)
            failures, self._failing_since = 0, None
            with self._changed:
                self._arrived = ticket
                self._changed.notify_all()

    def _copy(self, asked: bool) -> None:
        """Copies what has changed, large files when asked to; the manifest, which says that a run is whole, last."""
        for name, path in sorted(self._files(), key=lambda found: (found[0] == "manifest.json", found[0])):
            with contextlib.suppress(FileNotFoundError):
                now = version(path)
                if self._sent.get(name) != now and (asked or now[0] <= SMALL):
                    self._remote.write(name, path.read_bytes())
                    self._sent[name] = now  # what was added since is another version

    def _files(self) -> list[tuple[str, pathlib.Path]]:
        found = [(path.relative_to(self.path), path) for path in self.path.rglob("*") if path.is_file()]
        return [
            (name.as_posix(), path)
            for name, path in found
            if not any(part.startswith(".") or part in _NOT_COPIED for part in name.parts)
            and name.suffix != ".tmp"
            and (not self._only or name.parts[0] in self._only)
        ]


def _fetch(remote: BucketFolder, folder: pathlib.Path) -> None:
    """Makes a folder hold what a run goes on with, as it is on the bucket."""
    write_atomic(folder / POINTER, remote.url)
    names = [name for under in _FOLDERS for name in remote.names(under) if _is_of_run(name)]
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        name = path.relative_to(folder).as_posix()
        if _is_of_run(name) and name not in names:
            path.unlink()
    for name in names:
        content = remote.read(name)
        if content is not None:
            write_atomic(folder / name, content)


def _is_of_run(name: str) -> bool:
    """Whether a run goes on with this file, or is read by it."""
    parent, _, last = name.rpartition("/")
    known = last in _FILES if parent in ("", "base") else f"{parent}/" in _FOLDERS
    return known and not last.startswith(".")


def version(path: pathlib.Path) -> tuple[int, int, int]:
    """(bytes, time, inode): another one after every change, with the same inode where the file was added to."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ino
