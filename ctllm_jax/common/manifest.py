"""A stage's folder: what it was made from, whether it is finished, what came out.

Every verb writes into a folder of its own. `stage.json` is written first and says what the folder is for (the
fingerprint of inputs, settings and format version); `manifest.json` is written last and says what is there. Hence:
a manifest means a whole result; a fingerprint that differs means another run's folder, which is never overwritten;
a stage without a manifest was cut short and is taken up again. Of some stages a part of the settings may change in the
same folder; what is there then counts as cut short.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, is_remote, place, read_json, remove_temporaries, write_json

LOCK = ".lock"  # a stage's folder is locked by it while a process works there


def fingerprint(value: Any) -> str:
    """SHA-256 (16 hex digits) of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass
class Stage:
    """One stage's folder. Invariant: `result` is set exactly when `manifest.json` is on the disk."""

    name: str
    folder: pathlib.Path
    fingerprint: str
    result: dict | None
    started: float

    @property
    def done(self) -> bool:
        """Whether an earlier run already finished exactly this stage."""
        return self.result is not None

    def refresh(self) -> bool:
        """Reads the manifest if there is one; whether the stage is finished."""
        manifest = self.folder / "manifest.json"
        if self.result is None and manifest.exists():
            self.result = read_json(manifest)["result"]
        return self.done

    def finish(self, result: Mapping[str, Any]) -> dict:
        """Publishes the result; from here on the folder counts as whole."""
        self.result = dict(result)
        write_json(
            self.folder / "manifest.json",
            {
                "stage": self.name,
                "fingerprint": self.fingerprint,
                "result": self.result,
                "seconds": round(time.time() - self.started, 1),
            },
        )
        return self.result


def open_stage(
    name: str,
    version: int,
    workdir: str | os.PathLike,
    settings: Any,
    inputs: Any,
    exclusive: bool = True,
    asked: Any = None,
) -> Stage:
    """Claims `workdir` for a stage, or finds it finished or cut short.

    Args:
      name: the stage's name.
      version: of the stage's output format; a new one does not read as the old one.
      workdir: the folder that the stage owns.
      settings: JSON-able settings that decide the result.
      inputs: JSON-able identities of what it reads (`files.file_digest`, fingerprints of earlier stages).
      exclusive: whether this process alone writes the folder, until it ends.
      asked: JSON-able settings that may change in the folder: where they alone are others than before, the stage is no
        longer finished, and said on stderr to go on. It must not take what it finds there for its own.

    Raises:
      UserError: the folder holds a stage made from something else, another process is working on it, or it is not
        on a file system.
    """
    if is_remote(workdir):
        raise UserError(f"{workdir}: a stage's folder must be on a local or shared file system; copy it afterwards")
    folder = pathlib.Path(workdir)
    made_from = {"stage": name, "version": version, "settings": settings, "inputs": inputs}
    changing = {} if asked is None else {"asked": asked}
    mark = fingerprint([name, version, settings, inputs, *changing.values()])
    claim = folder / "stage.json"
    if claim.exists():
        held = read_json(claim)
        if held.get("fingerprint") != mark:
            before = held.pop("asked", None)
            if asked is None or fingerprint([held.get(key) for key in made_from]) != fingerprint([*made_from.values()]):
                raise UserError(
                    f"{folder} holds a {held.get('stage')!r} run made from other inputs or settings "
                    f"({_difference(held, made_from)}). Choose another --workdir, or delete this folder to start over."
                )
            _lock(folder)
            print(f"{name}: {folder} goes on with other settings ({_difference(before, asked)})", file=sys.stderr)
            (folder / "manifest.json").unlink(missing_ok=True)
            write_json(claim, {**made_from, "fingerprint": mark, **changing})
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(claim, {"stage": name, "version": version, "fingerprint": mark, **made_from, **changing})
    stage = Stage(name, folder, mark, None, time.time())
    if exclusive and not stage.refresh():
        _lock(folder)
        remove_temporaries(folder)
    if stage.refresh():  # after the lock: another process may have finished just before
        print(f"{name}: already finished in {place(folder)}", file=sys.stderr)
    return stage


_locks: dict[str, int] = {}  # folder: descriptor of the lock file; the system frees it when the process ends


def _lock(folder: pathlib.Path) -> None:
    """Keeps a second process out of an unfinished folder, where two would tread on each other's files."""
    path = os.path.abspath(folder)
    if path in _locks:
        return
    descriptor = os.open(os.path.join(path, LOCK), os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: another process is working here; wait until it ends, or stop it") from None
    except OSError:
        pass  # a file system without locks
    _locks[path] = descriptor


def stage_fingerprint(folder: str | os.PathLike, name: str) -> str:
    """The fingerprint of a finished stage.

    Raises:
      UserError: the folder is not a finished stage of this name.
    """
    return read_result(folder, name)[0]


def read_result(folder: str | os.PathLike, name: str | None = None) -> tuple[str, dict]:
    """(fingerprint, result) of a finished stage, of any or of one called `name`.

    Raises:
      UserError: the folder is not such a stage.
    """
    verb = f"`ctllm {name}`" if name else "a stage"
    if not str(folder):
        raise UserError(f"no folder of {verb} to read is given")
    path = as_path(folder) / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder}: not a finished folder of {verb} (manifest.json is missing)")
    manifest = read_json(path)
    if name is not None and manifest.get("stage") != name:
        raise UserError(f"{folder}: expected a {name!r} folder, found {manifest.get('stage')!r}")
    return manifest["fingerprint"], manifest["result"]


def _difference(held: Any, wanted: Any) -> str:
    """Names the first few entries that differ between two nested JSON values, a version before all others."""
    found = []
    wanted = json.loads(json.dumps(wanted, default=list))

    def walk(a: Any, b: Any, where: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted({*a, *b} - {"fingerprint"}, reverse=True):
                walk(a.get(key), b.get(key), f"{where}.{key}" if where else key)
        elif a != b:
            found.append(f"{where}: {_short(a)} there, {_short(b)} now")

    walk(held, wanted, "")
    return "; ".join(found[:3]) or "format changed"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
