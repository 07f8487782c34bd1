"""A job as Kubernetes objects: a JobSet, the code and the variables that its pods find, what runs in a pod.

A TPU slice is one child Job with a pod a host, GPU and CPU hosts together are one. Facts: accelerators, topologies and
chips of a host are those of https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and of xpk's table
(AI-Hypercomputer/xpk, src/xpk/core/system_characteristics.py, June 2026); the JobSet's fields and rules those of
sigs.k8s.io/jobset/api/jobset/v1alpha2 from 0.10 on, the first that can tell exit statuses apart.
"""

import base64
import dataclasses
import functools
import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.status import EXIT_LOST, EXIT_MISTAKE, EXIT_RESUME
from launch.hosts import Plan

_TPUS = {  # {accelerator: dimensions of its topologies}
    "tpu-v4-podslice": 3,
    "tpu-v5-lite-podslice": 2,
    "tpu-v5p-slice": 3,
    "tpu-v6e-slice": 2,
    "tpu7x": 3,
}
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,34}[a-z0-9])?")  # a pod's name adds up to 27 characters, and may have 63
_PORT = 8476  # of the coordinator; a pod has an address of its own
_PART = 700 << 10  # bytes of the archive in a ConfigMap, which may have 1 MiB
_LEFT = 86400  # seconds after its end that a JobSet stays where no launcher deletes it
ECHOES = (EXIT_LOST, 134, 143)  # statuses that come of another one's end

# What runs in a pod, as `sh /ctllm/run`: beside it lies the archive in parts.
_RUN = r"""#!/bin/sh
# One process of {job}: {revision}
ship=$(cd "$(dirname "$0")" && pwd)
if ! cd; then
  echo "launch: the image sets no HOME that is there"
  exit 2
fi
status=
child=
asked=
again=
life=

# Kubernetes asks again when a Job fails, and a process that is asked twice ends without its save.
# shellcheck disable=SC2317 # the trap calls it
ask() {{
  if [ -z "$asked" ] && [ -n "$child" ]; then kill -TERM "$child"; fi
  asked=yes
  again=yes
}}
trap ask TERM

# shellcheck disable=SC2317 # the trap calls it
profile() {{ # what stands before the process passes it on, everything else ignores it
  again=yes
  if [ -n "$child" ]; then kill -URG "$child"; fi
}}
trap profile URG

await() {{ # sets status; a signal to this script ends the waiting, not the process, and 127 may be of a wait too many
  again=yes
  status=127
  while [ -n "$again" ]; do
    again=
    wait "$child"
    code=$?
    if [ "$code" -ne 127 ]; then status=$code; fi
  done
  child=
}}

end() {{
  echo "launch: ended with status $1$life"
  case $1 in {echoes}) sleep 3 ;; esac # who failed by itself is to be seen first
  exit "$1"
}}

prepare() {{
  if [ ! -d {source} ]; then cat "$ship"/code.* | sh -c {unpack} || return 1; fi
{install}
}}
prepare &
child=$!
await
if [ -n "$asked" ]; then end {resume}; fi
if [ "$status" -ne 0 ]; then
  echo "launch: could not get ready"
  end "$status"
fi

mkdir -p {folder}
home=$(pwd)
export PYTHONPATH={path} PYTHONUNBUFFERED=1{environment}
cd {folder} || end 2
began=$(date +%s)
{command} &
child=$!
if [ -n "$asked" ]; then kill -TERM "$child"; fi
await
life=" after $(($(date +%s) - began)) s"
end "$status"
"""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The hosts of a job.

    Attributes:
      kind: what Kubernetes calls each of the groups: slice, host.
      groups: TPU slices; 1 of GPU and CPU hosts.
      hosts: of a group, each with one process.
      selector: labels of the nodes.
      resource: what a host has of accelerators: {name for Kubernetes: count}.
    """

    kind: str
    groups: int
    hosts: int
    selector: Mapping[str, str]
    resource: Mapping[str, int]

    @property
    def processes(self) -> int:
        """Of the whole job."""
        return self.groups * self.hosts

    @property
    def tpu(self) -> bool:
        """Whether its hosts have TPUs."""
        return self.kind == "slice"

    @property
    def gpu(self) -> bool:
        """Whether its hosts have GPUs."""
        return "nvidia.com/gpu" in self.resource


def shape(options: Mapping[str, Any]) -> Shape:
    """What the options ask for.

    Raises:
      UserError: an accelerator or topology that is none, flags that do not belong together.
    """
    name, topology = options["accelerator"], options["topology"]
    spot = {"cloud.google.com/gke-spot": "true"} if options["spot"] else {}
    if not name.startswith("tpu"):
        for flag in ("topology", "slices", "chips"):
            if options[flag]:
                raise UserError(f"launch gke: --{flag} is for TPUs: give --accelerator={next(iter(_TPUS))} or its like")
        if options["gpus"] and not name:
            raise UserError("launch gke: --gpus needs --accelerator=NAME, as GKE names it: nvidia-h100-80gb, ...")
        labels = {"cloud.google.com/gke-accelerator": name} if name else {}
        gpus = {"nvidia.com/gpu": options["gpus"] or 8} if name else {}
        return Shape("host", 1, options["nodes"] or 1, {**labels, **spot}, gpus)
    for flag in ("nodes", "gpus"):
        if options[flag]:
            raise UserError(f"launch gke: --{flag} is not for TPUs: give --topology and --slices")
    if name not in _TPUS:
        raise UserError(f"launch gke: --accelerator={name}: no such TPU; there are: {', '.join(_TPUS)}")
    like = "x".join(["4"] * _TPUS[name])
    if not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2})+", topology) or topology.count("x") + 1 != _TPUS[name]:
        raise UserError(f"launch gke: --topology={topology}: a slice of {name} is given as {like}")
    chips = math.prod(map(int, topology.split("x")))
    per_host = options["chips"] or min(chips, 4)
    if chips % per_host:
        raise UserError(
            f"launch gke: --topology={topology}: {chips} chips are not a multiple of the {per_host} of a host"
        )
    if chips == per_host and options["slices"] > 1:  # GKE tells the pods of several hosts alone where the others are
        raise UserError(
            f"launch gke: --slices={options['slices']}: slices of one host are not joined; take a larger one"
        )
    labels = {"cloud.google.com/gke-tpu-accelerator": name, "cloud.google.com/gke-tpu-topology": topology}
    return Shape("slice", options["slices"] or 1, chips // per_host, {**labels, **spot}, {"google.com/tpu": per_host})


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the objects of one job are made of.

    Attributes:
      job_id: the job's name in our records, a label of all its objects.
      name: the JobSet's, with which the names of the others begin.
    """

    job_id: str
    name: str
    plan: Plan
    shape: Shape
    options: Mapping[str, Any]

    @functools.cached_property
    def archive(self) -> list[bytes]:
        """The shipped code as a .tar.gz, in parts that a ConfigMap can hold. Made once: git writes the time into it."""
        data = self.plan.place.code.archive()
        return [data[start : start + _PART] for start in range(0, len(data), _PART)]


def jobset(spec: Spec, pod: Any) -> dict[str, Any]:
    """The JobSet, as `kubectl create` takes it; `pod` is laid over the template of its pods.

    Raises:
      UserError: a name that Kubernetes would not have.
    """
    name, hosts, options = spec.name, spec.shape, spec.options
    if not _NAME.fullmatch(name):
        raise UserError(f"launch gke: --name={name}: must be up to 36 of a-z, 0-9 and -, from a letter on")
    queue = {"kueue.x-k8s.io/queue-name": options["queue"]} if options["queue"] else {}
    # All hosts of a slice in one node pool, and no other slice there.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    rules = [
        _rule("mistake", "FailJobSet", f"exit code {EXIT_MISTAKE} matching"),
        {"name": "failure", "action": "RestartJobSet", "onJobFailureReasons": ["BackoffLimitExceeded"]},
        _rule("resume", "RestartJobSetAndIgnoreMaxRestarts", f"exit code {EXIT_RESUME} matching"),
    ]
    # Its message has the status, by which the rules above go.
    exit_codes = {"containerName": "main", "operator": "In", "values": [EXIT_MISTAKE, EXIT_RESUME]}
    child = {
        "completionMode": "Indexed",
        "parallelism": hosts.hosts,
        "completions": hosts.hosts,
        "backoffLimit": 0,  # one pod lost, all lost
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": exit_codes}]},
        "template": overlaid(_template(spec), pod),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "labels": {"ctllm-job": spec.job_id, **queue},
            "annotations": exclusive if hosts.tpu and hosts.hosts > 1 else {},
        },
        "spec": {
            "ttlSecondsAfterFinished": _LEFT,
            "failurePolicy": {
                "maxRestarts": options["restarts"],
                "restartStrategy": "BlockingRecreate",  # no slice meets the one before
                "rules": rules,
            },
            "replicatedJobs": [{"name": hosts.kind, "replicas": hosts.groups, "template": {"spec": child}}],
        },
    }


def kept_folders(made: Mapping[str, Any]) -> list[str]:
    """Where the pods of a JobSet have volumes that outlive them."""
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    volumes, mounts = pod["volumes"] or [], pod["containers"][0]["volumeMounts"] or []
    passing = {_name(volume) for volume in volumes if {"emptyDir", "ephemeral", "projected"} & volume.keys()}
    kept = [mount for mount in mounts if _name(mount) not in passing and mount.get("mountPath")]
    return [mount["mountPath"].rstrip("/") for mount in kept]


def _template(spec: Spec) -> dict[str, Any]:
    """A pod's."""
    name, hosts, options = spec.name, spec.shape, spec.options
    parts = [{"configMap": {"name": f"{name}-code-{index}"}} for index in range(len(spec.archive))]
    container = {
        "name": "main",
        "image": options["image"],
        "command": ["sh", "/ctllm/run"],
        "resources": {"limits": dict(hosts.resource)},
        # Where GKE puts NVIDIA's driver; images with CUDA know it, Python's does not.
        "env": [{"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"}] if hosts.gpu else [],
        "envFrom": [{"secretRef": {"name": f"{name}-variables"}}] if spec.plan.secrets else [],
        "volumeMounts": [
            {"name": "ship", "mountPath": "/ctllm", "readOnly": True},
            {"name": "memory", "mountPath": "/dev/shm"},  # 64 MiB without it, too few for NCCL
        ],
    }
    return {
        "metadata": {"labels": {"ctllm-job": spec.job_id}},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": options["save_seconds"],
            "nodeSelector": dict(hosts.selector),
            "containers": [container],
            "volumes": [
                {"name": "ship", "projected": {"sources": parts}},
                {"name": "memory", "emptyDir": {"medium": "Memory"}},
            ],
        },
    }


def _rule(name: str, action: str, message: str) -> dict[str, Any]:
    reasons = {"onJobFailureReasons": ["PodFailurePolicy"], "onJobFailureMessagePatterns": [message]}
    return {"name": name, "action": action, **reasons}


def overlaid(base: Any, over: Any) -> Any:
    """`base` with what `over` has: keys are added or replaced, lists joined, their entries of one name laid over."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{key: overlaid(base[key], value) if key in base else value for key, value in over.items()}}
    if isinstance(base, list) and isinstance(over, list):
        ours, theirs = {_name(entry) for entry in base}, {_name(entry): entry for entry in over if _name(entry)}
        joined = [overlaid(entry, theirs[_name(entry)]) if _name(entry) in theirs else entry for entry in base]
        return joined + [entry for entry in over if _name(entry) is None or _name(entry) not in ours]
    return over


def _name(entry: Any) -> str | None:
    return entry.get("name") if isinstance(entry, dict) else None


def script(spec: Spec) -> str:
    """What every pod runs."""
    plan, hosts, options = spec.plan, spec.shape, spec.options
    place, several = plan.place, hosts.processes > 1
    variables = {name: shlex.quote(value) for name, value in plan.variables.items()}
    if options["devices"]:
        variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": options["devices"]}
    if several and not hosts.tpu:  # of a TPU's hosts JAX learns from what GKE sets there, TPU_WORKER_HOSTNAMES and more
        address = f"{spec.name}-{hosts.kind}-0-0.{spec.name}:{_PORT}"
        variables |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": hosts.processes}
        variables["JAX_PROCESS_ID"] = '"$JOB_COMPLETION_INDEX"'
    config = [f"--config={_path(f'{place.source}/{plan.config}')}"] if plan.config else []
    arguments = shlex.join([*plan.arguments, *(["--config.distributed=True"] if several else [])])
    python = _path(place.interpreter)
    before = [python, "-m", "launch.task", "''", shlex.quote(",".join(plan.secrets))]  # a cluster keeps what pods print
    words = [*before, python, "-m", "ctllm_jax.cli", plan.payload.verb, *config, arguments]
    if place.environment:
        missing = f"no {place.interpreter} in the image; leave --environment out, and one is made"
        install = f"  if [ ! -x {shlex.quote(place.interpreter)} ]; then echo {shlex.quote(missing)}; return 2; fi"
    else:
        install = f"  timeout {options['install_minutes']}m sh -c {shlex.quote(place.install())}"
    return _RUN.format(
        job=spec.job_id,
        revision=" ".join(plan.place.code.revision.split()),  # one line, whatever files are called
        echoes=" | ".join(map(str, ECHOES)),
        source=shlex.quote(place.source),
        unpack=shlex.quote(place.unpack()),
        install=install,
        resume=EXIT_RESUME,
        folder=shlex.quote(options["folder"] or "."),
        environment="".join(f" {key}={value}" for key, value in variables.items()),
        path=_path(place.source),
        command=" ".join(words).rstrip(),
    )


def _path(name: str) -> str:
    """A path for the shell that holds in any folder."""
    return shlex.quote(name) if name.startswith("/") else f'"$home"/{shlex.quote(name)}'


def files(spec: Spec, owner: str, shown: bool = False) -> list[dict[str, Any]]:
    """ConfigMaps with the archive and the script, a Secret with the variables; deleted with the JobSet that owns them.

    Args:
      owner: the JobSet's uid.
      shown: for people to read: how long each part of the archive is instead of the part, and no variable's value.
    """

    def entry(kind: str, suffix: str, content: Mapping[str, Any]) -> dict[str, Any]:
        owned = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": spec.name, "uid": owner}
        metadata = {"name": f"{spec.name}-{suffix}", "labels": {"ctllm-job": spec.job_id}, "ownerReferences": [owned]}
        return {"apiVersion": "v1", "kind": kind, "metadata": metadata, "immutable": True, **content}

    entries, secrets = [], spec.plan.secrets
    for index, part in enumerate(spec.archive):
        value = f"({len(part)} bytes)" if shown else base64.b64encode(part).decode()
        content: dict[str, Any] = {"binaryData": {f"code.{index:03}": value}}
        entries.append(entry("ConfigMap", f"code-{index}", {**content, "data": {} if index else {"run": script(spec)}}))
    if secrets:
        values = dict.fromkeys(secrets, "***") if shown else dict(secrets)
        entries.append(entry("Secret", "variables", {"type": "Opaque", "stringData": values}))
    return entries
