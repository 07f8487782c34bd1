"""A folder of a Google Cloud Storage bucket, and the right to write it.

Names within it are as on a disk, `tokenizer/tokenizer.model`. The client is Google's own, which knows the storage's
preconditions: a write may ask that the object is still the one (the generation) that was seen before.
"""

import contextlib
import errno
import importlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from ctllm_jax import processes
from ctllm_jax.common.errors import UserError, first_line
from ctllm_jax.common.files import atomic_file

CLAIM = "claim.json"
_BEAT = 10.0  # seconds between two signs of life of a claim's holder
_SILENCE = 45.0  # seconds without one after which the claim is free
_ANSWER = 20.0  # seconds that an answer may take, attempts included
_PIECE = 8 << 20  # bytes that are sent at once


class Unreachable(OSError):
    """The storage did not answer, or said that it cannot now."""


class Changed(Exception):
    """The object is not the one that was expected."""


class Object(NamedTuple):
    """What a listing says of an object: bytes, and their CRC32C in base64."""

    size: int
    crc32c: str


class BucketFolder:
    """A folder of a bucket; for one thread, as the client's connections are.

    Its methods raise Unreachable when the storage does not answer, UserError when it refuses.
    """

    def __init__(self, url: str):
        """`url`: gs://BUCKET/FOLDER.

        Raises:
          UserError: it is not of this form, or what is needed for it is not there: library, credentials.
        """
        bucket, _, path = url.removeprefix("gs://").strip("/").partition("/")
        if not url.startswith("gs://") or not path:
            raise UserError(f"{url}: a verb's folder is a local folder or gs://BUCKET/FOLDER")
        try:
            storage = importlib.import_module("google.cloud.storage")
        except ImportError as error:
            raise UserError(f"{url}: cannot be reached ({error}); it needs: pip install 'ctllm-jax[gcs]'") from None
        self.url, self._prefix = f"gs://{bucket}/{path}", f"{path}/"
        self._errors = importlib.import_module("google.api_core.exceptions")
        self._retry = storage.retry.DEFAULT_RETRY.with_timeout(_ANSWER)
        with self._answering():
            self._bucket = storage.Client().bucket(bucket)

    def names(self, under: str = "") -> list[str]:
        """Names of the objects that lie in a subfolder itself ("" or one that ends with a slash)."""
        with self._answering():
            found = self._bucket.list_blobs(prefix=self._prefix + under, delimiter="/", retry=self._retry)
            names = [blob.name.removeprefix(self._prefix) for blob in found]
        return [name for name in names if name.removeprefix(under) not in ("", ".", "..")]

    def contents(self) -> dict[str, Object]:
        """Everything in the folder, in its subfolders too, by name."""
        with self._answering():
            found = list(self._bucket.list_blobs(prefix=self._prefix, retry=self._retry))
        sums = {blob.name.removeprefix(self._prefix): Object(blob.size, blob.crc32c) for blob in found}
        return {name: about for name, about in sums.items() if not {"", ".", ".."} & {*name.split("/")}}

    def read(self, name: str) -> bytes | None:
        """An object's content; None where there is none."""
        with self._answering(), contextlib.suppress(self._errors.NotFound):
            return self._blob(name).download_as_bytes(timeout=_ANSWER, retry=self._retry)
        return None

    def generation(self, name: str) -> int:
        """Which one the object is: another number after each write, 0 where there is none."""
        with self._answering():
            found = self._bucket.get_blob(self._prefix + name, timeout=_ANSWER, retry=self._retry)
        return found.generation if found else 0

    def write(self, name: str, content: bytes, expected: int | None = None) -> int:
        """Writes an object, whole or not at all, and returns its generation.

        Args:
          name: within the folder.
          content: all of it.
          expected: the generation that is to be replaced, 0 for none at all; None: whatever is there. Such a write is
            tried once: an attempt whose answer is lost would stand in its own successor's way.

        Raises:
          Changed: there is another one.
        """
        blob, retry = self._blob(name), self._retry if expected is None else None
        with self._answering():
            blob.upload_from_string(
                content, "application/octet-stream", if_generation_match=expected, timeout=_ANSWER, retry=retry
            )
        return blob.generation

    def download(self, name: str, path: pathlib.Path) -> None:
        """Makes a file hold what an object holds, whole or not at all.

        Raises UserError where there is no such object, or no room on this machine's disk.
        """
        with atomic_file(path) as temporary, self._answering():
            try:
                self._blob(name).download_to_filename(str(temporary), timeout=_ANSWER, retry=self._retry)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(f"{path.parent}: no room here for {self.url}/{name} ({error.strerror})") from None
                raise

    def upload(self, name: str, path: pathlib.Path) -> None:
        """Makes an object hold what a file holds, whole or not at all; of one that grows what it holds now.

        Large files go in pieces, each within the time of an answer.
        """
        with open(path, "rb") as file, self._answering():
            size = os.fstat(file.fileno()).st_size
            blob = self._bucket.blob(self._prefix + name, chunk_size=_PIECE)
            blob.upload_from_file(file, size=size, timeout=_ANSWER, retry=self._retry)

    def delete(self, name: str, expected: int | None = None) -> None:
        """Deletes the object of a generation (None: whatever is there), if it is still there."""
        with self._answering(), contextlib.suppress(self._errors.NotFound, self._errors.PreconditionFailed):
            self._blob(name).delete(if_generation_match=expected, timeout=_ANSWER, retry=self._retry)

    def _blob(self, name: str) -> Any:
        return self._bucket.blob(self._prefix + name)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """What the client says of a request, in our words; NotFound of an object goes through."""
        try:
            yield
        except self._errors.PreconditionFailed as error:
            raise Changed(str(error)) from error
        except (self._errors.Forbidden, self._errors.Unauthorized, self._errors.NotFound) as error:
            raise UserError(f"{self.url}: {first_line(error)}") from error
        except UserError:
            raise
        except Exception as error:  # of the client, the library below it, or Google's authentication
            if type(error).__name__ == "DefaultCredentialsError":
                raise UserError(f"{self.url}: no credentials ({first_line(error)})") from error
            raise Unreachable(f"{self.url} does not answer ({first_line(error)})") from error


class Claim:
    """The right of one job to write a folder; held from the beginning on, by an object of that folder.

    The holder writes it anew every ten seconds. Whoever comes and finds it waits until it has changed (the other is
    alive: a UserError) or 45 seconds have passed (it is not, and the claim is taken over); no two clocks are compared.
    A holder that was killed on this very machine is recognised at once. A holder that comes back to find another in its
    place, after an outage of its own, ends its process. Until it does, at most a beat later, both may write.
    """

    def __init__(self, url: str, verb: str = "train"):
        """Takes the claim; `verb` is who waits for it, as messages have it.

        Raises:
          UserError: another job has it, or the storage refuses.
          Unreachable: the storage does not answer.
        """
        self._folder, self._verb, self._failing = BucketFolder(url), verb, False
        about = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        self._owner, self._content = about["owner"], json.dumps(about).encode()
        self._generation = self._take()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives the claim up, so that the next job need not wait."""
        self._leaving.set()
        self._thread.join()
        with contextlib.suppress(Unreachable, UserError):
            self._folder.delete(CLAIM, self._generation)

    def _take(self) -> int:
        expected = 0
        while True:
            with contextlib.suppress(Changed):
                return self._folder.write(CLAIM, self._content, expected)
            expected = self._folder.generation(CLAIM)
            holder = self._holder()
            if holder.get("owner") == self._owner:  # an answer was lost
                return expected
            if expected and not _has_died_here(holder):
                self._watch(holder, expected)

    def _watch(self, holder: dict, generation: int) -> None:
        """Returns when the holder has been silent long enough."""
        who, until = f"process {holder.get('pid')} on {holder.get('host')}", time.monotonic() + _SILENCE
        print(f"{self._verb}: {self._folder.url} was last held by {who}: checking whether it is alive", file=sys.stderr)
        while time.monotonic() < until:
            time.sleep(1.0)
            if (now := self._folder.generation(CLAIM)) == 0:
                return
            if now != generation:
                raise UserError(
                    f"{self._folder.url}: another job is working here ({who}); wait until it ends, or stop it"
                )

    def _keep(self) -> None:
        while not self._leaving.wait(_BEAT):
            try:
                self._beat()
                self._failing = False
            except (Unreachable, UserError) as error:
                if not self._failing:
                    print(
                        f"{self._verb}: {error}; the run goes on, its claim is not renewed until it does",
                        file=sys.stderr,
                    )
                self._failing = True

    def _beat(self) -> None:
        try:
            self._generation = self._folder.write(CLAIM, self._content, self._generation)
        except Changed:
            self._generation = self._folder.generation(CLAIM)
            holder = self._holder()
            if holder.get("owner", self._owner) != self._owner:
                who = f"process {holder.get('pid')} on {holder.get('host')}"
                processes.exit_lost(f"{self._folder.url} has been taken over by another job ({who})")

    def _holder(self) -> dict:
        """Who has the claim by now; empty where nobody has, or nobody can be made out."""
        try:
            value = json.loads(self._folder.read(CLAIM) or b"{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


def _machine() -> str:
    """Names this start of this machine, and the namespace that its process numbers are of."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return uuid.uuid4().hex


def _has_died_here(holder: dict) -> bool:
    return holder.get("machine") == _machine() and not os.path.exists(f"/proc/{holder.get('pid')}")
