"""`ctllm launch list | tail | attach | profile | cancel`: what other terminals do with recorded jobs."""

import importlib
import os
import sys
import time
from collections.abc import Mapping

from absl import flags

from ctllm_jax import cli
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.status import EXIT_RESUME
from ctllm_jax.verbs import Option
from launch import jobs
from launch.jobs import Job, State
from launch.process import say
from launch.target import Target

_TICK = 0.5  # seconds between looks at a log
_ASK = 5.0  # seconds between questions to a target how its job stands
FORMS = {
    "list": "recorded jobs and how they stand",
    "tail": "ID [--lines=N] [--follow]: the end of a job's output; --follow: what comes, too. Ctrl-C ends the looking",
    "attach": "ID: a job's output to its end, and its status; Ctrl-C stops the job, as where it was launched",
    "profile": "ID: every process of a training job profiles its next steps into the run's folder, and goes on",
    "cancel": "ID [--now]: asks a job to save and end; --now: without a save",
}
_OPTIONS = {
    "list": {},
    "tail": {"lines": Option("", "", 20), "follow": Option("", "", False)},
    "attach": {},
    "profile": {},
    "cancel": {"now": Option("", "", False)},
}


def run(verb: str, arguments: list[str], targets: Mapping[str, str]) -> int:
    """Runs one of FORMS; returns the status for the shell.

    Raises:
      UserError: no such job, a flag that the verb does not have, a target that does not answer.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt()
    cli.define(_OPTIONS[verb], values)
    try:
        names = values([verb, *arguments])[1:]
    except flags.Error as error:
        raise UserError(f"launch {verb}: {error}") from None
    if verb == "list":
        return _list(targets)
    if len(names) != 1:
        raise UserError(f"launch {verb}: {FORMS[verb]}; `ctllm launch list` has the IDs")
    job = jobs.load(names[0])
    target = _target(job, targets)
    if verb == "tail":
        _show_last(job, values["lines"].value)
        return follow(job, target, from_end=True, owner=False) if values["follow"].value else 0
    if verb == "attach":
        return follow(job, target)
    state = target.state(job)
    if verb == "profile":
        return _profile(job, target, state)
    if state.status is not None:
        say(f"{job.id}: {state.text}")
        return 0
    target.cancel(job, values["now"].value)
    say(f"{job.id} has been asked to {'end' if values['now'].value else 'save and end'}")
    return 0


def _profile(job: Job, target: Target, state: State) -> int:
    if job.command[0] != "train":
        raise UserError(f"launch profile: {job.id} is a job of {job.command[0]}; only `train` takes profiles")
    if state.status is not None:
        raise UserError(f"launch profile: {job.id} does not run: {state.text}")
    target.profile(job)
    say(f"{job.id} has been asked for a profile; its output says where that lies")
    return 0


def _target(job: Job, targets: Mapping[str, str]) -> Target:
    if job.target not in targets:
        raise UserError(f"launch: {job.id} was made for target {job.target!r}, which this version does not have")
    return importlib.import_module(targets[job.target]).TARGET


def _list(targets: Mapping[str, str]) -> int:
    for job in jobs.everything():
        try:
            text = _target(job, targets).state(job).text
        except UserError as error:
            text = str(error)
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started))
        print(f"{job.id:<28} {job.target:<6} {started}  {text}")
    return 0


def _show_last(job: Job, count: int) -> None:
    try:
        with job.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 20)))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        raise UserError(f"launch tail: {job.id} has no output yet") from None
    _write(b"".join(lines[-count:] if count > 0 else []))


def follow(job: Job, target: Target, from_end: bool = False, owner: bool = True) -> int:
    """Shows a job's output until it has ended; returns its status.

    Ctrl-C of an owner cancels the job, and a second one cancels it without a save; else it only ends the looking.

    Raises:
      UserError: the target does not say how the job stands, and never has.
    """
    position = job.log.stat().st_size if from_end and job.log.exists() else 0
    asked, stops, state = float("-inf"), 0, State("")
    while True:
        try:
            over = state.status is not None
            position = _show_from(job, position)
            if over:
                break
            if time.monotonic() - asked > _ASK / (5 if stops else 1):
                before, state = state, _state(jobs.load(job.id), target, state)
                asked = time.monotonic()
                if state.text != before.text and state.status is None:
                    say(f"{job.id}: {state.text}")
            if state.status is None:
                time.sleep(_TICK)
        except KeyboardInterrupt:
            if not owner:
                return 0
            stops += 1
            say("stopping the job; it saves first, again: at once" if stops == 1 else "killing the job")
            target.cancel(job, stops > 1)
    say(f"{job.id}: {state.text}" + ("; the same command goes on" if state.status == EXIT_RESUME else ""))
    return state.status


def _state(job: Job, target: Target, before: State) -> State:
    """How a job stands; where the target has answered before and now does not, its error: it may come back."""
    try:
        return target.state(job)
    except UserError as error:
        if not before.text:
            raise
        return State(str(error))


def _show_from(job: Job, position: int) -> int:
    if not job.log.exists():
        return position
    with job.log.open("rb") as file:
        file.seek(position)
        while data := file.read(1 << 16):
            _write(data)
        return file.tell()


def _write(data: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
