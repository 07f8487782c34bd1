"""Dies without warning at a chosen point of a save: Python tells of every file that it is about to touch."""

import errno
import os
import signal
import sys

# Name of a point: (event, end of the path, whether the checkpoint is already committed there). Saves of step 10 are
# meant; between these points TensorStore writes the arrays, which Python is not told of.
_TMP = "/10.orbax-checkpoint-tmp"
POINTS = {
    "before the folder": ("os.mkdir", _TMP, False),
    "before the step's metadata": ("open", f"{_TMP}/_CHECKPOINT_METADATA", False),
    "before the record's folder": ("os.mkdir", f"{_TMP}/record.orbax-checkpoint-tmp", False),
    "before the record": ("open", f"{_TMP}/record.orbax-checkpoint-tmp/metadata", False),
    "with arrays on their way": ("os.mkdir", f"{_TMP}/params.orbax-checkpoint-tmp/array_metadatas", False),
    "before the arrays' sizes": ("open", f"{_TMP}/optimizer.orbax-checkpoint-tmp/array_metadatas/process_0", False),
    "before the arrays' names": ("open", f"{_TMP}/params.orbax-checkpoint-tmp/_METADATA", False),
    "before an item's marker": ("open", f"{_TMP}/optimizer.orbax-checkpoint-tmp/commit_success.txt", False),
    "before the first item's renaming": ("os.rename", f"{_TMP}/optimizer.orbax-checkpoint-tmp", False),
    "before the last item's renaming": ("os.rename", f"{_TMP}/record.orbax-checkpoint-tmp", False),
    "before the step's marker": ("open", f"{_TMP}/commit_success.txt", False),
    "before the step's renaming": ("os.rename", _TMP, False),
    "before the last checkpoint's deletion": ("shutil.rmtree", "/checkpoints/5", True),
    "in the last checkpoint's deletion": ("os.remove", "", True),
    # of a second process
    "before its arrays' sizes": ("open", f"{_TMP}/params.orbax-checkpoint-tmp/array_metadatas/process_1", False),
}


def arm(point: str) -> None:
    """From now on this process dies at the point; points after the commit count from the step's renaming on."""
    wanted, ending, committed = POINTS[point]
    renamed, deleted = not committed, 0

    def watch(event: str, values: tuple) -> None:
        nonlocal renamed, deleted
        if event not in ("os.mkdir", "open", "os.rename", "shutil.rmtree", "os.remove"):
            return
        path = os.fsdecode(values[0]) if isinstance(values[0], (str, bytes, os.PathLike)) else ""
        if event == wanted and renamed and path.endswith(ending):
            deleted += 1
            if event != "os.remove" or deleted == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.rename" and path.endswith(_TMP):
            renamed = True

    sys.addaudithook(watch)


def fill_disk_once(ending: str) -> None:
    """The next opening of a file whose path ends so fails as on a full disk."""
    pending = [ending]

    def watch(event: str, values: tuple) -> None:
        if pending and event == "open" and str(values[0]).endswith(pending[0]):
            raise OSError(errno.ENOSPC, "No space left on device", pending.pop())

    sys.addaudithook(watch)
