"""What a cluster does with a JobSet, its pods as processes here: `fake_cluster.py FOLDER JobSet.NAME`, by fake_kubectl.

As Kubernetes' Job controller and JobSet's have it: https://kubernetes.io/docs/concepts/workloads/controllers/job/ (pod
failure policy) and https://jobset.sigs.k8s.io/docs/tasks/failure_policy/; with a pod's grace period, and what a kubelet
does when a ConfigMap is missing. GKE's part for TPUs is played by JAX's own variables.
"""

import base64
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from fake_kubectl import write

LABELS = "jobset.sigs.k8s.io"
MOMENT = 1.0  # seconds that a pod which has ended is still there: the Job controller looks once a second
KEPT = ("PATH", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")  # of the test's environment


class Pod:
    """One pod: waiting for a node, for its files, running, ended."""

    def __init__(self, folder: pathlib.Path, jobset: dict, attempt: int, place: tuple[int, int], port: int):
        self._folder, self._jobset, self.attempt, self.place, self._port = folder, jobset, attempt, place, port
        (self._replicated,) = jobset["spec"]["replicatedJobs"]
        self._job = self._replicated["template"]["spec"]
        self._spec = self._job["template"]["spec"]
        (self._container,) = self._spec["containers"]
        self.name = f"{jobset['metadata']['name']}-{self._replicated['name']}-{place[0]}-{place[1]}-a{attempt}"
        self.process: subprocess.Popen | None = None
        self.status: int | None = None
        self.waits: dict | None = None
        self._kill_at = self._over = float("inf")
        self.ending = False

    def turn(self, nodes: int) -> None:
        """Starts the process as soon as that can be, and sees whether it has ended."""
        if self.process is None and not self.ending:
            self._start(nodes)
        if self.process and self.status is None:
            if time.monotonic() > self._kill_at:
                self._signal(signal.SIGKILL)
            if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                self._signal(signal.SIGKILL)  # its container is gone, and all that is in it
                status = self.process.wait()
                self.status, self._over = status if status >= 0 else 128 - status, time.monotonic()
                (self._folder / "logs" / f"{self.name}.over").touch()

    def end(self, seconds: float | None = None) -> None:
        """Asks the process to end, as a kubelet does; it has its grace period, or so many seconds."""
        grace = self._spec["terminationGracePeriodSeconds"] if seconds is None else seconds
        if self.process and self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)
            self._kill_at = min(self._kill_at, time.monotonic() + grace)
        self.ending = True

    @property
    def gone(self) -> bool:
        return self.ending and (self.process is None or time.monotonic() > self._over + MOMENT)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _start(self, nodes: int) -> None:
        number = self.place[0] * self._job["parallelism"] + self.place[1]
        if number >= nodes:
            message = f"0/{nodes} nodes are available: {nodes} Insufficient google.com/tpu."
            self.waits = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            return
        self.waits = None
        if (self._folder / "image").exists():
            return
        home, mounted, environment = self._folder / self.name, {}, {}
        home.mkdir(exist_ok=True)
        try:
            for volume in self._spec["volumes"]:
                for source in volume.get("projected", {}).get("sources", ()):
                    self._unpack(source["configMap"]["name"], home / volume["name"])
            for source in self._container.get("envFrom", ()):
                environment |= self._object("Secret", source["secretRef"]["name"])["stringData"]
        except FileNotFoundError:
            return
        for mount in self._container["volumeMounts"]:
            mounted[mount["mountPath"]] = str(home / mount["name"])
        command = [next((word.replace(path, here) for path, here in mounted.items() if word.startswith(path)), word)
                   for word in self._container["command"]]  # fmt: skip
        (self._folder / "logs").mkdir(exist_ok=True)
        with (self._folder / "logs" / self.name).open("wb") as log:
            self.process = subprocess.Popen(
                command, env=self._environment(home, number) | environment, cwd=home, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        (self._folder / "pids").mkdir(exist_ok=True)
        (self._folder / "pids" / self.name).write_text(str(self.process.pid))

    def _environment(self, home: pathlib.Path, number: int) -> dict[str, str]:
        job = {"HOME": str(home), "JOB_COMPLETION_INDEX": str(self.place[1])}
        if "google.com/tpu" in self._container["resources"]["limits"]:  # else what JAX learns from GKE's variables
            count = self._replicated["replicas"] * self._job["parallelism"]
            job |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{self._port}", "JAX_PROCESS_ID": str(number)}
            job["JAX_NUM_PROCESSES"] = str(count)
        return {name: os.environ[name] for name in KEPT if name in os.environ} | job

    def _object(self, kind: str, name: str) -> dict:
        return json.loads((self._folder / "objects" / f"{kind}.{name}").read_text())

    def _unpack(self, config_map: str, folder: pathlib.Path) -> None:
        content = self._object("ConfigMap", config_map)
        folder.mkdir(exist_ok=True)
        for key, value in content.get("binaryData", {}).items():
            assert len(base64.b64decode(value)) + len(str(content.get("data"))) < 1 << 20  # Kubernetes' limit
            (folder / key).write_bytes(base64.b64decode(value))
        for key, value in content.get("data", {}).items():
            name = self._jobset["metadata"]["name"]
            first = re.escape(f"{name}-{self._replicated['name']}-0-0.{name}:") + r"\d+"
            (folder / key).write_text(re.sub(first, f"127.0.0.1:{self._port}", value))  # the cluster's name service

    def as_object(self) -> dict:
        labels = {**self._job["template"]["metadata"]["labels"], f"{LABELS}/job-index": str(self.place[0])}
        labels |= {f"{LABELS}/replicatedjob-name": self._replicated["name"]}
        labels |= {f"{LABELS}/restart-attempt": str(self.attempt)}
        place = {"batch.kubernetes.io/job-completion-index": str(self.place[1])}
        if self.status is not None:
            state = {"terminated": {"exitCode": self.status}}
        elif self.process:
            state = {"running": {}}
        elif (self._folder / "image").exists():
            state = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "nowhere"'}}
        else:
            state = {"waiting": {"reason": "ContainerCreating"}}
        status = {"conditions": [self.waits] if self.waits else []}
        if not self.waits:
            status["containerStatuses"] = [{"name": "main", "state": state}]
        metadata = {"name": self.name, "labels": labels, "annotations": place}
        return {"kind": "Pod", "metadata": metadata, "status": status}


class Cluster:
    """The controllers of one JobSet."""

    def __init__(self, folder: pathlib.Path, path: pathlib.Path):
        self._folder, self._path, self._jobset = folder, path, json.loads(path.read_text())
        (self._replicated,) = self._jobset["spec"]["replicatedJobs"]
        self._job = self._replicated["template"]["spec"]
        self._pods: list[Pod] = []
        self._restarts = self._counted = 0
        self._condition: dict | None = None
        self._deleted = False

    def run(self) -> None:
        """Until the JobSet has been deleted, and nothing of it runs."""
        while not (self._deleted and not self._pods):
            self._obey()
            now = [pod for pod in self._pods if pod.attempt == self._restarts]
            if not self._pods and not self._deleted and not self._condition:
                self._make()
            nodes = self._folder / "nodes"
            for pod in self._pods:
                pod.turn(int(nodes.read_text()) if nodes.exists() else 1000)
            if now and not self._condition and not self._deleted:
                self._judge(now)
            self._pods = [pod for pod in self._pods if not pod.gone]
            self._show()
            time.sleep(0.03)
        uid = self._jobset["metadata"]["uid"]
        for path in [path for path in (self._folder / "objects").iterdir() if path != self._path]:
            if uid in [owner["uid"] for owner in json.loads(path.read_text())["metadata"].get("ownerReferences", ())]:
                path.unlink()
        self._path.unlink()

    def _obey(self) -> None:
        asked = self._folder / "asked" / self._path.name
        for path in sorted(asked.iterdir()) if asked.exists() else ():
            order = json.loads(path.read_text())
            path.unlink()
            self._deleted = self._deleted or order["delete"]
            for pod in self._pods:
                pod.end(1 if order["now"] else None)

    def _make(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        places = [(job, pod) for job in range(self._replicated["replicas"]) for pod in range(self._job["completions"])]
        self._pods = [Pod(self._folder, self._jobset, self._restarts, place, port) for place in places]

    def _judge(self, now: list[Pod]) -> None:
        """Acts by the pods' ends, first as the Job controller and then as JobSet's."""
        if all(pod.status == 0 for pod in now):
            self._condition = {"type": "Completed", "status": "True", "message": "jobset completed successfully"}
            return
        failed = {}
        for pod in now:
            if pod.status and pod.place[0] not in failed:  # backoffLimit 0
                failed[pod.place[0]] = ("BackoffLimitExceeded", "Job has reached the specified backoff limit")
            for index, rule in enumerate(self._job["podFailurePolicy"]["rules"]):
                assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
                if pod.status in rule["onExitCodes"]["values"]:
                    message = f"Container main for pod default/{pod.name} failed with exit code {pod.status} matching"
                    failed[pod.place[0]] = ("PodFailurePolicy", f"{message} FailJob rule at index {index}")
        for pod in now:
            if pod.place[0] in failed and pod.status is None and not pod.ending:
                pod.end()  # what is left of a failed Job
        if failed:
            self._fail(list(failed.values()))

    def _fail(self, failed: list[tuple[str, str]]) -> None:
        policy = self._jobset["spec"]["failurePolicy"]
        assert policy["restartStrategy"] == "BlockingRecreate"
        action = "RestartJobSet"
        for rule in reversed(policy["rules"]):
            for reason, message in failed:
                patterns = rule.get("onJobFailureMessagePatterns", [""])
                if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
                    action = rule["action"]
        used_up = action == "RestartJobSet" and self._counted >= policy["maxRestarts"]
        if action == "FailJobSet" or used_up:
            why = "jobset failed due to reaching max number of restarts" if used_up else "jobset failed by its policy"
            self._condition = {"type": "Failed", "status": "True", "message": why}
            for pod in self._pods:
                if pod.status is None:
                    pod.end()
            return
        self._restarts += 1
        self._counted += action == "RestartJobSet"
        for pod in self._pods:
            pod.end()

    def _show(self) -> None:
        items = [pod.as_object() for pod in self._pods]
        if not (self._deleted and not self._pods):
            status = {"restarts": self._restarts, "restartsCountTowardsMax": self._counted}
            status["conditions"] = [self._condition] if self._condition else []
            items.append({**self._jobset, "status": status})
        write(self._folder / "states" / self._path.name, items)


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    Cluster(folder, folder / "objects" / sys.argv[2]).run()
