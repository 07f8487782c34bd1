"""A job that this process holds together: recorded, written to its log, in the background if that is wanted."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.status import EXIT_MISTAKE
from ctllm_jax.verbs import Option
from launch.jobs import Job, launcher, new_id
from launch.process import Output, Process, say
from launch.supervise import STOPS, handled, interruptible, supervise
from launch.target import Payload

DETACH = {"detach": Option("--detach", "go on in the background once it is set up; `attach` shows it", False)}


def hold(
    target: str,
    payload: Payload,
    revision: str,
    start: Callable[[], Sequence[Process]],
    restarts: int,
    detach: bool = False,
    finish: Callable[[], None] = lambda: None,
) -> int:
    """Runs a job as `launch.supervise` does, under a name by which other terminals find it.

    With `detach` the launcher goes on in the background, and this returns 0 once it has the first attempt's processes
    to start. `finish` is called when the job has ended, however that was; further signals do not end it.

    Raises:
      UserError: as `supervise`.
    """
    job = Job(new_id(payload.verb), target, (payload.verb, *payload.arguments), revision, time.time(), {})
    output, status, here = None, 1, True
    with _deaf():  # that is, in the end: what was made for the job must not stay
        try:
            with interruptible():
                first = [start()] if detach else []  # what can go wrong goes wrong here, where it is seen
                with _deaf():  # there are two of us for a moment, and only one may finish the job
                    here = not detach or not _in_background(job)
                if not here:
                    shows = f"`ctllm launch attach {job.id}` shows it"
                    print(f"launch: {job.id} runs in the background; {shows}", file=sys.stderr)
                    return 0
                job = dataclasses.replace(job, handle=launcher())
                job.save()
                output = Output(None if detach else job.log)
                output.say(f"job {job.id}")
                status = supervise(lambda: first.pop() if first else start(), restarts, output=output)
                return status
        except UserError:
            status = EXIT_MISTAKE
            raise
        except KeyboardInterrupt:
            status = 130
            raise
        finally:
            try:
                if here:
                    finish()
            finally:
                if output:
                    _write_end(dataclasses.replace(job, status=status))
                    output.close()


def _deaf() -> contextlib.AbstractContextManager[None]:
    """Stops are not heard inside the block, but in blocks within that do hear them."""
    return handled(STOPS, lambda *_: None)


def _write_end(job: Job) -> None:
    try:
        job.save()
    except OSError as error:  # the shell still learns the status
        say(f"job {job.id} ended with status {job.status}, which could not be written down: {error}")


def _in_background(job: Job) -> bool:
    """Goes on twice: True in this process, False in one without a terminal that writes to the job's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return True
    os.setsid()
    if os.fork():
        os._exit(0)
    with open(os.devnull) as nothing, job.log.open("ab") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return False
