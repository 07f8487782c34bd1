"""Processes of a job, as tests wait for them."""

import contextlib
import pathlib
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
WAIT = 120  # seconds that something is waited for, on a busy machine


def ended(pid: int) -> bool:
    """Whether no such process runs, within the time that a busy machine needs to end it."""
    for _ in range(WAIT * 10):
        stat = pathlib.Path(f"/proc/{pid}/stat")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if stat.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return True
    return False


def once_there(path: pathlib.Path, text: str = "", seconds: int = WAIT) -> str:
    """A file's content, as soon as it contains the text."""
    for _ in range(seconds * 20):
        with contextlib.suppress(FileNotFoundError):
            if text in (content := path.read_text()) and content:
                return content
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {text!r}")


def once_saved(workdir: pathlib.Path, step: int, seconds: int = WAIT) -> None:
    """Returns as soon as a run can be resumed at that step."""
    once_there(workdir / "checkpoints" / str(step) / "commit_success.txt", seconds=seconds)


def pids_of(workdir: pathlib.Path) -> dict[int, int]:
    """{JAX_PROCESS_ID: number} of the processes that train there."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            names = dict(entry.partition(b"=")[::2] for entry in (folder / "environ").read_bytes().split(b"\0"))
            if f"--workdir={workdir}".encode() in command and b"JAX_PROCESS_ID" in names:
                found[int(names[b"JAX_PROCESS_ID"])] = int(folder.name)
    return found
