"""Jobs of several processes: joining them, noticing when one is gone, deciding together, letting one go first.

JAX's coordination service, which runs in process 0, is what they talk over. It ends the others by itself when one is
silent for `_JAX_SILENCE` seconds, with an abort (status 134). `job` is quicker, says who it was, and ends with a status
of its own, on every kind of device: a collective that waits for a dead process may fail, but may also wait for ever.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctllm_jax.common.errors import Unanswered, UserError, first_line
from ctllm_jax.common.status import EXIT_LOST, EXIT_MISTAKE, status_of
from ctllm_jax.common.stderr import write_past_stderr

T = TypeVar("T")

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_MEETING = 5.0  # minutes that a process waits for the others at the start
_BEAT = 5.0  # seconds between two signs of life
_SILENCE = 20.0  # seconds without one after which a process counts as gone
_JAX_SILENCE = 60  # JAX notices after half of it at the earliest: later than _SILENCE + 2 * _BEAT
_VERDICT = _SILENCE + 3 * _BEAT  # by then it is known whether one is gone
_GRACE = 3.0  # seconds that a failed process has to print its error
_SIGNS, _MESSAGES, _BOARDS = "ctllm/signs/", "ctllm/news/", "ctllm/boards/"  # keys at the service, one a process each
_CALLS = (  # what its client must know
    "blocking_key_value_get",
    "key_value_delete",
    "key_value_dir_get",
    "key_value_increment",
    "key_value_set",
    "key_value_try_get",
)


def join() -> None:
    """Joins the other processes of the job; call before anything else asks for devices.

    Addresses come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; without them JAX looks for the
    job itself, as it can on TPU pods and under SLURM.

    Raises:
      UserError: only some of the variables are set, there is no such job, or this JAX is too new for us.
      SystemExit: with EXIT_LOST, the others could not be joined; where they have not come within _MEETING this process
        ends by itself, for JAX would abort it.
    """
    given = [name for name in (_ADDRESS, _COUNT, _INDEX) if name in os.environ]
    if given and len(given) < 3:
        raise UserError(f"{', '.join(given)} set, but a job needs {_ADDRESS}, {_COUNT} and {_INDEX}")
    client()
    try:
        place = (os.environ[_ADDRESS], int(os.environ[_COUNT]), int(os.environ[_INDEX])) if given else ()
        longer = int(60 * _MEETING) + 60  # than ours
        with _meeting():
            jax.distributed.initialize(*place, initialization_timeout=longer, heartbeat_timeout_seconds=_JAX_SILENCE)
    except ValueError as error:
        raise UserError(f"could not join a job of several processes: {error}") from None
    except RuntimeError as error:
        print(f"ctllm: error: could not join a job of several processes: {error}", file=sys.stderr)
        sys.exit(EXIT_LOST)
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # JAX has put a handler of its own there


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """Ends this process with EXIT_LOST, saying where it waited and what to look at, where the block takes too long."""
    met = threading.Event()

    def watch() -> None:
        if not met.wait(60 * _MEETING):
            write_past_stderr(f"ctllm: error: {_not_met()}")
            os._exit(EXIT_LOST)

    threading.Thread(target=watch, name="meeting", daemon=True).start()
    try:
        yield
    finally:
        met.set()


def _not_met() -> str:
    """Why this process may not have met the others, by what can be seen from here."""
    from jax._src import distributed

    state = distributed.global_state
    address, index = state.coordinator_address, state.process_id
    if address is None:
        return f"JAX has not found the other processes within {_MEETING:g} minutes"
    text = f"process {index} has not met the others within {_MEETING:g} minutes at {address}"
    if index == 0:
        return f"{text}, where it waits for them: have all been started, and can they reach this address and port?"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        return (
            f"{text}, which cannot be reached from here ({error}): does process 0 run, is that its host's name here, "
            "and does the network between the hosts (firewall, security group) let that port through?"
        )
    return f"{text}, which answers: have all the others been started?"


def client():
    """The coordination service's client; None outside a job. JAX keeps it among what may change without notice.

    Raises:
      UserError: it has changed.
    """
    try:
        from jax._src import distributed

        found = distributed.global_state.client
        missing = [] if found is None else [name for name in _CALLS if not hasattr(found, name)]
    except (ImportError, AttributeError) as error:
        missing = [first_line(error)]
    if missing:
        raise UserError(
            f"jax {jax.__version__} lacks what the processes of a job talk through in this version of ctllm "
            f"({', '.join(missing)}); use jax 0.10 to 0.12, or one process"
        )
    return found


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Joins the job and, inside the block, keeps watch over it.

    When a process is gone (killed, its host lost), every other one says which and ends with EXIT_LOST within a minute.
    A process that leaves the block by an error tells the others, and ends without waiting for them.

    Raises:
      UserError, SystemExit: as `join`.
    """
    join()
    watch = _Watch(client(), jax.process_index())
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        watch.failed(error)
        raise
    finally:
        watch.close()


class _Watch:
    """A thread that gives signs of life and hears what became of the others; process 0's also counts the signs."""

    def __init__(self, client, index: int):
        self._client, self._index = client, index
        self._seen: dict[str, tuple[str, float]] = {}  # {key: (sign, when it was new)}
        self._leaving, self._signing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="job watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the watch; no sign of this process is waited for from now on."""
        with self._signing, contextlib.suppress(jax.errors.JaxRuntimeError):
            self._leaving.set()
            self._client.key_value_delete(f"{_SIGNS}{self._index}")
            self._client.key_value_set(f"{_MESSAGES}{self._index}", "it leaves", allow_overwrite=True)
        self._thread.join()  # a thread that is inside JAX when Python ends aborts the process

    def failed(self, error: BaseException) -> None:
        """Tells the others of an error here, and makes sure that this process ends in spite of them."""
        summary = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, jax.errors.JaxRuntimeError):  # perhaps only because another process is gone
            print(f"process {self._index}: {summary}; waiting to hear of the others", file=sys.stderr, flush=True)
            self._thread.join(_VERDICT)  # it ends this process where another one is gone
        self._leaving.set()
        self._broadcast(f"process {self._index} failed ({summary})")
        # As Python ends, JAX and Orbax wait for the others, who are not coming.
        exit_timer = threading.Timer(_GRACE * (2 if self._index == 0 else 1), os._exit, (status_of(error),))
        exit_timer.daemon = True
        exit_timer.start()

    def _broadcast(self, message: str) -> None:
        for index in range(jax.process_count()):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one told it first, or process 0 is gone
                self._client.key_value_set(f"{_MESSAGES}{index}", message)

    def _run(self) -> None:
        while True:
            try:
                self._sign()
                if self._index == 0:
                    self._count_signs()
                message = self._client.blocking_key_value_get(f"{_MESSAGES}{self._index}", int(_BEAT * 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):  # no news
                    continue
                message = f"process 0 is gone ({first_line(error)})"
            else:  # who fails by itself says more than we can; process 0 ends last, so that all hear it
                self._leaving.wait(2 * _GRACE if self._index == 0 else _GRACE + 1)
            if not self._leaving.is_set():
                exit_lost(message)
            return

    def _sign(self) -> None:
        with self._signing:
            if not self._leaving.is_set():
                sign = str(time.monotonic())  # any that differs from the one before
                self._client.key_value_set(f"{_SIGNS}{self._index}", sign, allow_overwrite=True)

    def _count_signs(self) -> None:
        now = time.monotonic()
        signs = dict(self._client.key_value_dir_get(_SIGNS))  # without those who have left
        for key, sign in signs.items():
            if self._seen.get(key, ("", 0.0))[0] != sign:
                self._seen[key] = (sign, now)
        gone = sorted(int(key.rpartition("/")[2]) for key in signs if now - self._seen[key][1] > _SILENCE)
        if gone:
            who = f"process {gone[0]} is" if len(gone) == 1 else f"processes {', '.join(map(str, gone))} are"
            self._broadcast(f"{who} gone (no sign of life for {_SILENCE:.0f} s)")


def exit_lost(message: str) -> None:
    """Ends this process with EXIT_LOST, whatever its threads are waiting for; `message` says why.

    Process 0 gives the others a moment to do the same: with it goes what they talk over, and JAX aborts them.
    """
    index = jax.process_index()
    if index == 0 and jax.process_count() > 1:
        time.sleep(_GRACE)
    advice = "start the job again and it goes on from its last checkpoint"
    write_past_stderr(f"ctllm: error: {message}; process {index} ends: {advice}")
    os._exit(EXIT_LOST)


def post(board: str, text: str) -> None:
    """Puts a word of this process where the others can read it, in place of its last; nothing in a job of one."""
    if (service := client()) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone: the job's watch says so
            service.key_value_set(f"{_BOARDS}{board}/{jax.process_index()}", text, allow_overwrite=True)


def posted(board: str) -> dict[int, str]:
    """{process: its last word}; empty in a job of one."""
    words = []
    if (service := client()) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            words = service.key_value_dir_get(f"{_BOARDS}{board}/")
    return {int(key.rpartition("/")[2]): text for key, text in words}


class Vote:
    """Whether any process of the job wants something; all get the same answer from the same call."""

    def __init__(self, mesh: Mesh):
        self._pending = None
        if jax.process_count() > 1:
            spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._ballots = [
                jax.make_array_from_callback((mesh.size,), spread, lambda _, vote=vote: np.array([vote], np.int32))
                for vote in (0, 1)
            ]
            self._count = jax.jit(lambda ballots: ballots.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, vote: bool) -> bool:
        """Casts this process's vote and returns the outcome of the call before, so that no device is waited for.

        A job of one process gets its own vote back at once.
        """
        if jax.process_count() == 1:
            return vote
        before, self._pending = self._pending, self._count(self._ballots[vote])
        return before is not None and bool(before)


def votes(*answers: bool) -> np.ndarray:
    """What every process says [processes, questions]; all must ask at the same point."""
    if jax.process_count() == 1:
        return np.array([answers], bool)
    return np.asarray(multihost_utils.process_allgather(np.array(answers, bool)))


def together(action: Callable[[], T]) -> T:
    """Does something in all processes; where it fails in one it fails in all, so that none waits for another.

    Raises:
      UserError: it failed in another process, by an error for the user to mend.
      Unanswered: it failed in another process, by an error after which the job may be started again.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as failure:
        error = failure
    failed, mistaken = votes(error is not None, status_of(error) == EXIT_MISTAKE).T
    if error is not None:
        raise error
    if failed.any():
        kind = UserError if mistaken.any() else Unanswered
        raise kind(f"process {int(failed.argmax())} failed, and says why")
    return result


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Process 0 runs the block, then the others do: for work on a shared folder that must not race."""
    if jax.process_count() > 1 and jax.process_index() > 0:
        multihost_utils.sync_global_devices("first process first")
    try:
        yield
    finally:  # an error must not leave the others waiting: they go on and meet it themselves
        if jax.process_count() > 1 and jax.process_index() == 0:
            multihost_utils.sync_global_devices("first process first")
