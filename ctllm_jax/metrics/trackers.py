"""Where metrics go besides metrics.jsonl: TensorBoard's event files, Weights & Biases.

A tracker gets every line of metrics.jsonl, in a thread of its own (see log.py), and may fail without harm to the run. A
metric of a line is called KIND/NAME there, one by layer KIND/NAME/LAYER.
"""

import importlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.manifest import fingerprint
from ctllm_jax.mirror import remote_of

_PLACE = ("kind", "step", "time")  # keys that say where a line belongs


class Tracker(Protocol):
    """What the log hands its lines on to."""

    def write(self, entry: Mapping[str, Any]) -> None:
        """Takes over one line."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoard:
    """Event files in RUN/tensorboard, a new one for each process; `tensorboard --logdir=RUN` shows them."""

    def __init__(self, run_dir: str | os.PathLike, resume_step: int):
        """`resume_step`: TensorBoard forgets what earlier processes wrote of later steps."""
        self._folder, self._resume_step, self._writer = pathlib.Path(run_dir) / "tensorboard", resume_step, None

    def write(self, entry: Mapping[str, Any]) -> None:
        """Takes over one line."""
        if self._writer is None:
            self._open()
        values = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(entry)]
        summary = self._summary.Summary(value=values)
        self._add(wall_time=entry["time"], step=entry["step"], summary=summary)

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> None:
        # Imported here, in the log's thread: it takes a second where its optional libraries are installed.
        writer = importlib.import_module("tensorboardX.event_file_writer")
        self._event = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summary = importlib.import_module("tensorboardX.proto.summary_pb2")
        self._folder.mkdir(exist_ok=True)
        self._writer = writer.EventsWriter(str(self._folder / "events"), f".{os.getpid()}.{self._resume_step}")
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._add(step=self._resume_step + 1, session_log=start)

    def _add(self, **fields) -> None:
        self._writer.write_event(self._event.Event(**fields))
        self._writer.flush()


class WeightsAndBiases:
    """A run on Weights & Biases, called as the run's folder; a run that is taken up goes on there too."""

    def __init__(self, project: str, run_dir: str | os.PathLike, mark: str, settings: Mapping[str, Any]):
        """
        Args:
          project: its name there.
          run_dir: the run directory.
          mark: the run's fingerprint.
          settings: shown as the run's config.

        Raises:
          UserError: the library is not installed.
        """
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise UserError("log.wandb needs the library: pip install 'ctllm-jax[wandb]'") from None
        folder = pathlib.Path(run_dir).absolute()
        location = remote_of(folder) or str(folder)  # the same on any machine
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=fingerprint([mark, location]),
            dir=str(folder),
            resume="allow",
            config=dict(settings),
        )
        # Our own step is the axis: theirs only grows, so that steps that are made again would be dropped.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, entry: Mapping[str, Any]) -> None:
        """Takes over one line."""
        self._run.log({"step": entry["step"], **dict(_scalars(entry))})

    def close(self) -> None:
        """Waits until everything is uploaded."""
        self._run.finish()


def _scalars(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in entry.items():
        if name in _PLACE:
            continue
        if isinstance(value, list):
            for layer, item in enumerate(value):
                yield f"{entry['kind']}/{name}/{layer:02d}", item
        else:
            yield f"{entry['kind']}/{name}", value
