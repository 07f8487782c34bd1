"""What becomes of a JobSet: how its pods stand, their output, restarts, the end; all of it goes into the job's log.

`python -m launch.pods ID` writes it down until the JobSet has ended, and deletes that. It needs no terminal; one at a
time holds the job's lock. Where it is gone (this machine was switched off), whoever asks for the job starts it again.
"""

import base64
import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import ROOT
from ctllm_jax.common.status import EXIT_MISTAKE, EXIT_RESUME
from launch import jobs
from launch.jobs import Job
from launch.jobset import ECHOES
from launch.kubectl import Cluster
from launch.process import Output, Process, Running
from launch.resumes import Resumes

_TICK = 0.1  # seconds between looks at the output
_SOON, _LATER = 0.5, 5.0  # seconds between looks at the cluster: while pods come and go, and when they run
_EVENTS = 15.0  # seconds between looks at its warnings, while pods wait
_REST = 10.0  # seconds that output may take to come after the end
_ENDED = re.compile(rb"launch: ended with status (\d+)(?: after (\d+) s)?")  # the last line of `launch.jobset`'s script
_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_JOBSET = "jobset.sigs.k8s.io"  # before the labels that JobSet gives to pods
_NEXT = {  # why pods wait: the next step
    "ImagePull": "is --image right, and may the nodes read it?",
    "ErrImage": "is --image right, and may the nodes read it?",
    "InvalidImageName": "is --image right?",
    "uota": "ask for more under IAM & Admin > Quotas, or `kubectl describe resourcequota`; or ask for less",
    "out of resources": "there is no capacity: another zone, --spot, or wait longer with --queue_minutes",
    "node affinity": "no node is like that: do --accelerator, --topology and --spot fit a node pool?",
    "nsufficient": "the nodes are taken or too small: is there a node pool free that fits?",
}


@dataclasses.dataclass(frozen=True)
class Pod:
    """A pod as Kubernetes has it.

    Attributes:
      name: in the output: the process's number in the job, and its place: 3 slice-1-1.
      id: Kubernetes' own name, another one in each attempt.
      status: of its process, once that has ended.
      waits: why its process has not started; empty once it has.
    """

    name: str
    id: str
    attempt: int
    status: int | None
    waits: str


@dataclasses.dataclass(frozen=True)
class JobSetStatus:
    """A JobSet as Kubernetes has it.

    Attributes:
      there: whether it is there.
      end: Completed, Failed, or empty.
      why: what JobSet says of a failure.
      attempt: how often all pods were started again; `counted`: those that count.
      pods: also those of earlier attempts that are ending.
    """

    there: bool
    end: str
    why: str
    attempt: int
    counted: int
    pods: Sequence[Pod]

    def waiting(self, count: int) -> tuple[int, str]:
        """(how many of the attempt's pods have started, why the first of the others has not)."""
        now = [pod for pod in self.pods if pod.attempt == self.attempt]
        started = sum(not pod.waits for pod in now)
        why = next((f"{pod.name} waits: {pod.waits}" for pod in now if pod.waits), self.why or "no more pods yet")
        return started, "" if started >= count else why


def cluster(job: Job) -> Cluster:
    return Cluster(job.handle["context"], job.handle["namespace"], job.handle["wait"])


def fetch_status(job: Job) -> JobSetStatus:
    """How a job stands; raises UserError where kubectl does."""
    found = json.loads(cluster(job).run(cluster(job).get(job.id)))["items"]
    pods = [_pod(item, job.handle["hosts"]) for item in found if item["kind"] == "Pod"]
    made = next((item for item in found if item["kind"] == "JobSet"), None)
    if made is None:
        return JobSetStatus(False, "", "", max((pod.attempt for pod in pods), default=0), 0, pods)
    status = made.get("status", {})
    true = {
        entry["type"]: entry.get("message", "") for entry in status.get("conditions", ()) if entry["status"] == "True"
    }
    end = next((name for name in ("Completed", "Failed") if name in true), "")
    why = true.get("Failed", "it is suspended: it waits in its queue" if "Suspended" in true else "")
    return JobSetStatus(True, end, why, status.get("restarts", 0), status.get("restartsCountTowardsMax", 0), pods)


def _pod(item: Mapping[str, Any], hosts: int) -> Pod:
    labels, status = item["metadata"]["labels"], item.get("status", {})
    place = int(item["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])
    group = int(labels[f"{_JOBSET}/job-index"])
    name = f"{group * hosts + place} {labels[f'{_JOBSET}/replicatedjob-name']}-{group}-{place}"
    state = next((entry["state"] for entry in status.get("containerStatuses", ()) if entry["name"] == "main"), {})
    ended, waits = state.get("terminated"), ""
    if not ended and "running" not in state:
        held = [entry for entry in status.get("conditions", ()) if entry["type"] == "PodScheduled"]
        why = state.get("waiting") or (held[0] if held and held[0]["status"] == "False" else {})
        waits = ": ".join(filter(None, (why.get("reason"), why.get("message")))) or "it is being made"
    attempt = int(labels[f"{_JOBSET}/restart-attempt"])
    return Pod(name, item["metadata"]["name"], attempt, ended["exitCode"] if ended else None, waits)


def describe(job: Job, seen: JobSetStatus) -> str:
    """For who asks how the job stands."""
    count = job.handle["groups"] * job.handle["hosts"]
    started, why = seen.waiting(count)
    text = f"{started} of {count} pods have started" if seen.there else "its pods are ending"
    text += f", restart {seen.counted} of {job.handle['restarts']}" if seen.counted else ""
    return text + (f"; {why}" if why and seen.there else "")


def culprit(statuses: Iterable[int]) -> int:
    """The status of the process that ended the others, from all of theirs."""
    failed = [status for status in statuses if status not in (0, EXIT_RESUME)]
    return min(failed, key=lambda status: (status in ECHOES, status != EXIT_MISTAKE), default=EXIT_RESUME)


def write_down(job: Job) -> None:
    """Has it written down what becomes of a job, unless that is being done."""
    path = jobs.jobs_folder() / f"{job.id}.lock"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if jobs.load(job.id).status is not None:
            return
        libraries = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with job.log.open("ab") as log:
            subprocess.Popen(
                [sys.executable, "-P", "-m", "launch.pods", job.id],
                env={**os.environ, "PYTHONPATH": libraries},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],  # which holds the lock until it has ended
                start_new_session=True,
            )


class Writer:
    """Writes down what becomes of one job."""

    def __init__(self, job: Job):
        self._job, self._cluster = job, cluster(job)
        self._count = job.handle["groups"] * job.handle["hosts"]
        self._output, self._selector = Output(), selectors.DefaultSelector()
        self._since = _time(job.log.stat().st_mtime) if job.log.stat().st_size else ""  # it was written before
        self._streams: dict[str, Running] = {}
        self._heard: dict[str, float] = {}  # when a pod's output last came
        self._attempts: dict[str, int] = {}  # of all pods that were seen
        self._statuses: dict[str, int] = {}
        self._attempt, self._said = 0, ""
        self._counted, self._began, self._resumes = 0, float("inf"), Resumes()
        self._lives: dict[str, float] = {}  # how long processes of this attempt ran [seconds]
        self._waits_since, self._asked, self._warning = float("inf"), float("-inf"), ""
        self._given_up = ""
        self._secrets: Mapping[str, str] | None = None  # until they are known

    def run(self) -> int:
        """Returns the job's status, when it has ended and nothing is left of it but what is to be kept."""
        pause, seen = _SOON, None
        while True:
            try:
                if self._secrets is None:
                    self._secrets = self._forwarded()
                seen = fetch_status(self._job)
                pause = _SOON if self._take(seen) or _busy(seen) else min(2 * pause, _LATER)
                if seen.end or not (seen.there or seen.pods):
                    break
            except UserError as error:  # a network that comes back, most likely
                self._say_once(str(error))
                pause = _LATER
            self._pump(pause)
        self._pump(_REST, last=True)
        return self._finish(seen)

    def _forwarded(self) -> dict[str, str]:
        """The forwarded variables, to hide their values: ours, or where they are gone the cluster's."""
        names = self._job.handle["forward"]
        if all(name in os.environ for name in names):
            return {name: os.environ[name] for name in names}
        held = json.loads(self._cluster.run(self._cluster.secret(f"{self._job.handle['name']}-variables")))
        return {name: base64.b64decode(value).decode() for name, value in held["data"].items()}

    def _take(self, seen: JobSetStatus) -> bool:
        """Acts on what was seen; says whether it was something new."""
        before = (self._attempt, self._given_up, len(self._streams), dict(self._statuses))
        for pod in seen.pods:
            self._attempts[pod.id] = pod.attempt
            if pod.status is not None:
                self._statuses.setdefault(pod.id, pod.status)
            if not pod.waits:
                self._follow(pod)
        if seen.attempt > self._attempt:
            restart = f" (restart {seen.counted} of {self._job.handle['restarts']})" if seen.counted else ""
            self._pump(2 * _TICK)  # what the ended ones said comes first
            if seen.counted == self._counted:
                self._resumes.count(max(self._lives.values(), default=time.monotonic() - self._began))
            if self._resumes.why and not self._given_up:
                self._give_up(self._resumes.why)
            else:
                self._output.say(f"starting all pods again{restart}")
            self._attempt, self._counted, self._began, self._lives = seen.attempt, seen.counted, float("inf"), {}
        if any(pod.attempt == seen.attempt and not pod.waits for pod in seen.pods):
            self._began = min(self._began, time.monotonic())
        if seen.there and not seen.end:
            self._wait(seen)
        return before != (self._attempt, self._given_up, len(self._streams), self._statuses)

    def _follow(self, pod: Pod) -> None:
        """Follows a pod's output, again where that broke off."""
        stream = self._streams.get(pod.id)
        if stream and (stream.status is None or pod.id in self._statuses):
            return
        since = _time(self._heard[pod.id]) if pod.id in self._heard else self._since
        command = tuple(self._cluster.logs(pod.id, since))
        stream = self._streams[pod.id] = Running(Process(pod.name, command, {}, secrets=self._secrets), self._output)
        for pipe in stream.streams:
            self._selector.register(pipe, selectors.EVENT_READ, (pod.id, stream))

    def _wait(self, seen: JobSetStatus) -> None:
        """Says what pods wait for, and gives the job up when that takes too long."""
        (started, why), now, limits = seen.waiting(self._count), time.monotonic(), self._job.handle
        if not why:
            self._waits_since, self._warning, self._said = float("inf"), "", ""
            return
        self._waits_since = min(self._waits_since, now)
        waited = now - self._waits_since
        limit = 60 * (limits["start_minutes"] if started else limits["queue_minutes"])
        if any(reason in why for reason in _IMAGE):
            limit = min(limit, limits["wait"])
        if waited > min(limit, _EVENTS) and now - self._asked > _EVENTS:
            self._asked = now
            with contextlib.suppress(UserError):
                self._warning = _last_warning(json.loads(self._cluster.run(self._cluster.warnings())), limits["name"])
        text = f"{started} of {self._count} pods have started; {why}"
        text += f"; {self._warning}" if self._warning and self._warning not in text else ""
        step = next((step for sign, step in _NEXT.items() if sign in text), "")
        text += f"; {step}" if step else ""
        if waited > limit and not self._given_up:
            self._give_up(f"given up after {waited / 60:.1f} minutes: {text}")
        elif waited > min(limit, _LATER):
            self._say_once(text)

    def _give_up(self, why: str) -> None:
        self._cluster.run(self._cluster.delete(self._job.handle["name"]))
        self._given_up = why
        self._output.say(why)

    def _say_once(self, text: str) -> None:
        """Says something unless it was the last that was said."""
        if text != self._said:
            self._said = text
            self._output.say(text)

    def _pump(self, seconds: float, last: bool = False) -> None:
        """Passes on output for so long; the `last` time until all have ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not (last and all(one.status is not None for one in self._streams.values())):
            for key, _ in self._selector.select(_TICK):
                pod, stream = key.data
                data = stream.pump(key.fileobj)
                if data:
                    self._heard[pod] = time.time()
                elif data == b"":
                    self._selector.unregister(key.fileobj)
            if not self._selector.get_map():
                time.sleep(_TICK)
            for pod, stream in self._streams.items():
                if stream.poll():
                    said = _ENDED.fullmatch(stream.streams[stream.popen.stdout][1].last)
                    if said:
                        self._statuses[pod] = int(said[1])
                        if self._attempts[pod] == self._attempt:
                            self._lives[pod] = float(said[2] or 0)
                    for pipe in stream.streams:
                        with contextlib.suppress(KeyError):
                            self._selector.unregister(pipe)
                    stream.drop()  # its pipes: a long job has many attempts

    def _finish(self, seen: JobSetStatus) -> int:
        for stream in self._streams.values():
            stream.drop()
        if seen.there and not self._job.handle["keep"]:
            try:
                self._cluster.run(self._cluster.delete(self._job.handle["name"]))
            except UserError as error:
                self._output.say(f"{error}; JobSet {self._job.handle['name']} is left")
        statuses = [status for pod, status in self._statuses.items() if self._attempts[pod] == self._attempt]
        if self._given_up:
            return 1
        if seen.end == "Completed":
            return 0
        if seen.end == "Failed":
            self._output.say(f"the JobSet has failed: {seen.why}")
            status = culprit(statuses)
            return status if status != EXIT_RESUME else 1
        self._output.say("the JobSet was deleted; the same command goes on")
        return EXIT_RESUME if EXIT_RESUME in statuses else 143


def _busy(seen: JobSetStatus) -> bool:
    """Whether a pod is being made, whose output could be there and gone; one without a node can take hours."""
    return any(pod.waits and not pod.waits.startswith("Unschedulable") for pod in seen.pods)


def _last_warning(events: Mapping[str, Any], name: str) -> str:
    """The last warning about something of a JobSet, but for those that pods have themselves."""
    ours = [
        event
        for event in events["items"]
        if event["involvedObject"]["name"].startswith(name) and event["reason"] != "FailedScheduling"
    ]
    last = max(ours, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "", default=None)
    return f"{last['reason']}: {' '.join(last['message'].split())[:300]}" if last else ""


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def main() -> None:
    job = jobs.load(sys.argv[1])
    status = Writer(job).run()
    dataclasses.replace(jobs.load(job.id), status=status).save()


if __name__ == "__main__":
    main()
