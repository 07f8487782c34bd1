"""Answers of a model, kept so that no request is asked twice: by no benchmark, in no evaluation that shares the folder.

A request is named by a hash of all that decides its answer but the model; a folder `model_mark` holds one model's. Each
block's new answers are one file, a line an answer: its request's name, a tab, JSON. A file is named by the hash of what
it holds and appears whole. So a damaged one is known by its name, and processes may share a folder: none changes what
another wrote.

The last bits of an answer depend on what is asked together with it (see `engine`). So that a killed evaluation ends in
the bits of an undisturbed one, blocks claim requests in their order, before any is computed: a block computes what was
not known when the evaluation began and no earlier block has claimed, which no kill and no number of devices changes.
"""

import array
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import is_remote, write_atomic
from ctllm_jax.common.manifest import fingerprint
from ctllm_jax.loading import LoadedModel

VERSION = 1  # of the files, and of what the code answers to a request: with another one nothing is taken over
_UNFINISHED = ".part"  # what the name of a file ends with before it is whole
_LEFT_OVER = 3600  # seconds after which such a file is a killed writer's


class Asked(Protocol):
    """A request as the cache sees it; `engine.Request` and `encoding.Opening` are such."""

    name: bytes

    def kept(self, answer: Any) -> Any:
        """The answer as JSON."""

    def restored(self, kept: Any) -> Any:
        """The answer that was kept."""


Groups = Sequence[Sequence[Asked]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """Requests that a block has to answer.

    Attributes:
      groups: them alone, by the block's groups; each once.
      asked, missing: how many requests the block has, and how many are to be answered.
      ended: done once their answers are there. Blocks that share a request wait for it.
    """

    groups: list[list[Asked]]
    asked: int
    missing: int
    ended: concurrent.futures.Future


def named(*about: Any, ids: Sequence[int]) -> bytes:
    """The name of a request by its ids and what else decides its answer, which must be JSON-able."""
    return hashlib.sha256(json.dumps(about).encode() + array.array("i", ids).tobytes()).digest()[:16]


def model_mark(model: LoadedModel) -> str:
    """Names a model by all that decides its answers beyond their rounding: parameters, tokenizer, numerics, devices.

    A run's digest says what it was trained by; one that is trained again may end in other parameters, which are hashed.
    """
    leaves = jax.tree.leaves(model.params)
    device, *others = leaves[0].devices()
    parameters = hashlib.sha256()
    for leaf in leaves if model.step is not None else ():
        parameters.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    machine = [device.platform, device.device_kind, 1 + len(others), jax.config.jax_default_matmul_precision]
    return fingerprint([VERSION, model.digest, parameters.hexdigest(), dataclasses.asdict(model.config), machine])


class Cache:
    """The answers of one model. Claims are made in one thread, answers given in any."""

    def __init__(self, location: str | os.PathLike, mark: str):
        """Reads what is known: all of it is held in memory, some 200 bytes a request, and what was written.

        Raises:
          UserError: the location is no folder that can be written to.
        """
        if is_remote(location):
            raise UserError(f"cache {location}: must be on a local or shared file system")
        self._folder = pathlib.Path(location) / mark
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache {location}: cannot be made ({error.strerror})") from None
        if not os.access(self._folder, os.W_OK):
            raise UserError(f"cache {location}: {self._folder} cannot be written to")
        for leftover in self._folder.glob(f".*{_UNFINISHED}"):
            with contextlib.suppress(FileNotFoundError):  # it has just been finished
                if time.time() - leftover.stat().st_mtime > _LEFT_OVER:
                    leftover.unlink()
        self._known: dict[bytes, bytes | concurrent.futures.Future] = {}
        for path in sorted(self._folder.glob("*.tsv")):
            self._known.update(_read(path))

    def claim(self, groups: Groups) -> Claim:
        """What of a block's requests nobody has answered or claimed."""
        ended = concurrent.futures.Future()
        missing = []
        for group in groups:
            own = []
            for request in group:
                if request.name not in self._known:
                    self._known[request.name] = ended
                    own.append(request)
            missing += [own] if own else []
        return Claim(missing, sum(map(len, groups)), sum(map(len, missing)), ended)

    def answer(self, claim: Claim, find: Callable[[Groups], Groups]) -> None:
        """Answers a claim by `find(its groups)`, and keeps that on the disk."""
        try:
            found = find(claim.groups) if claim.groups else []
            answers = {
                request.name: json.dumps(request.kept(answer)).encode()
                for group, own in zip(claim.groups, found, strict=True)
                for request, answer in zip(group, own, strict=True)
            }
            self._write(answers)
        except BaseException as error:
            claim.ended.set_exception(error)  # or blocks that wait would do so for ever
            raise
        self._known.update(answers)
        claim.ended.set_result(None)

    def answers(self, groups: Groups) -> list[list[Any]]:
        """The answers to requests that were claimed, by this block or an earlier one."""
        return [[request.restored(self._kept(request.name)) for request in group] for group in groups]

    def remember(self, about: Any, work: Callable[[], Any]) -> Any:
        """`work()`, a JSON-able result that the model and `about`, JSON-able too, decide; or what it was before."""
        request = _Whole(named(about, ids=()))
        self.answer(self.claim([[request]]), lambda groups: [[work()]])
        return self.answers([[request]])[0][0]

    def _kept(self, name: bytes) -> Any:
        if isinstance(kept := self._known[name], concurrent.futures.Future):
            kept.result()
            kept = self._known[name]
        return json.loads(kept)

    def _write(self, answers: dict[bytes, bytes]) -> None:
        if not answers:
            return
        content = b"".join(name.hex().encode() + b"\t" + answer + b"\n" for name, answer in answers.items())
        # Whoever opens a stage around this folder must not take the file for a killed writer's.
        write_atomic(self._folder / f"{_hash(content)}.tsv", content, _UNFINISHED)


@dataclasses.dataclass(frozen=True)
class _Whole:
    """A request whose answer is JSON as it is."""

    name: bytes

    def kept(self, answer: Any) -> Any:
        return answer

    restored = kept


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _read(path: pathlib.Path) -> Iterator[tuple[bytes, bytes]]:
    """(name, answer) of a file; of one that is not what was written nothing, and it is deleted."""
    try:
        content = path.read_bytes()
        if _hash(content) != path.stem:
            print(f"{path}: damaged; left out and deleted, what it held is asked again", file=sys.stderr)
            path.unlink(missing_ok=True)
            return
    except FileNotFoundError:  # another process found the damage first
        return
    except OSError as error:
        print(f"{path}: left out ({error.strerror}); what it holds is asked again", file=sys.stderr)
        return
    for line in content.splitlines():
        name, _, answer = line.partition(b"\t")
        yield bytes.fromhex(name.decode()), answer
