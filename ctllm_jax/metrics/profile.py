"""Profiles of chosen steps, asked for in the config or, while the run goes on, by a signal: kill -USR1 PID.

They lie in RUN/profile/step-N, one folder each, as TensorBoard's profile plugin and XProf read them. Tracing does not
change what is computed.
"""

import pathlib
import signal
import sys

import jax

_ON_SIGNAL = 5  # steps of a profile that a signal asks for


class Profiler:
    """Traces the steps of the config's range (process 0), and the next few after SIGUSR1 (the process that gets it).

    Use as a context manager: inside, SIGUSR1 is taken. A profile that fails says so and lets the run go on.
    """

    def __init__(self, run_dir: pathlib.Path, steps: tuple[int, ...]):
        """`steps`: (first, last) step to trace, or empty."""
        self._folder = pathlib.Path(run_dir) / "profile"
        self._steps = steps if jax.process_index() == 0 else ()
        self._asked = False
        self._last: int | None = None  # of the steps that are being traced

    def __enter__(self) -> "Profiler":
        self._before = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, *exc_info) -> None:
        signal.signal(signal.SIGUSR1, self._before)
        if self._last is not None:
            self.stop()

    def due(self, step: int) -> bool:
        """Whether tracing is to start before this step is dispatched."""
        return self._last is None and (self._asked or self._in_range(step))

    def over(self, step: int) -> bool:
        """Whether tracing is to stop now that this step is finished."""
        return self._last is not None and step >= self._last

    def start(self, step: int) -> None:
        """Starts to trace, before `step` is dispatched."""
        last = self._steps[1] if self._in_range(step) else step + _ON_SIGNAL - 1
        process = f"-process-{jax.process_index()}" if jax.process_index() else ""
        folder = self._folder / f"step-{step}{process}"
        self._asked = False
        try:
            jax.profiler.start_trace(folder)
        except Exception as error:  # another profiler at work, a full disk: the run is worth more
            self._steps = ()
            print(f"train: no profile of step {step}: {error}", file=sys.stderr, flush=True)
            return
        self._last = last
        print(f"train: profiling steps {step} to {last} into {folder}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Writes what was traced."""
        last, self._last = self._last, None
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            print(f"train: the profile up to step {last} could not be written: {error}", file=sys.stderr, flush=True)

    def _in_range(self, step: int) -> bool:
        return bool(self._steps) and self._steps[0] <= step <= self._steps[1]

    def _ask(self, *_) -> None:
        self._asked = True
