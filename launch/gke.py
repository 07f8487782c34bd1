"""Target `gke`: a JobSet on TPU or GPU nodes of a Kubernetes cluster, made by `kubectl` with the user's login.

The cluster keeps the job together: JobSet starts all pods again when one is lost, within a budget, and without counting
when they have saved; this machine is needed for its output alone (`launch.pods`). The pods find the code in ConfigMaps
and the forwarded variables in a Secret, both deleted with the JobSet.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.status import EXIT_MISTAKE
from ctllm_jax.verbs import Option
from launch import hosts, jobset, pods, view
from launch.held import DETACH
from launch.jobs import Job, State, new_id
from launch.kubectl import CONTEXT, Cluster, kubectl
from launch.process import say
from launch.target import Payload, Target


def run(payload: Payload, options: Mapping[str, Any], dry_run: bool) -> int:
    """Makes the JobSet and shows its output; see `Target`.

    Raises:
      UserError: a flag is out of range or does not fit, kubectl refuses, what `launch.hosts.plan` raises.
    """
    for name, least in _LEAST.items():
        if options[name] < least:
            raise UserError(f"launch gke: --{name}={options[name]}: must be at least {least}")
    shape = jobset.shape(options)
    if shape.processes > 1 and not payload.distributed:
        raise UserError(f"launch gke: {payload.verb} runs in one process, not in {shape.processes}: ask for one host")
    plan, job_id = hosts.plan(payload, options), new_id(payload.verb)
    name = options["name"] or job_id
    spec = jobset.Spec(job_id, name, plan, shape, options)
    made = jobset.jobset(spec, _overlay(options["pod"]))
    _check_disk(payload, options["folder"], made)
    made = _yaml(made)
    context = options["context"] or kubectl(CONTEXT, options["wait"]).strip()
    cluster = Cluster(context, options["namespace"], options["wait"])
    if dry_run:
        _describe(cluster, spec, made, [_yaml(entry) for entry in jobset.files(spec, "UID", shown=True)])
        return 0
    owner = json.loads(cluster.run(cluster.create("--output=json"), made))["metadata"]["uid"]
    handle = {"context": context, "namespace": options["namespace"], "name": name, "forward": list(plan.secrets)}
    handle |= {"groups": shape.groups, "hosts": shape.hosts, **{key: options[key] for key in _KEPT}}
    words = (payload.verb, *payload.arguments)
    job = Job(job_id, "gke", words, plan.place.code.revision, time.time(), handle)
    job.save()
    try:
        entries = jobset.files(spec, owner)
        cluster.run(cluster.create("--output=name"), json.dumps({"apiVersion": "v1", "kind": "List", "items": entries}))
    except UserError:
        dataclasses.replace(job, status=EXIT_MISTAKE).save()
        cluster.run(cluster.delete(name))
        raise
    pods.write_down(job)
    say(f"job {job_id} is JobSet {name}; it goes on without this terminal: `ctllm launch attach {job_id}`")
    return 0 if options["detach"] else view.follow(job, TARGET)


def _overlay(path: str) -> dict[str, Any]:
    """What the user lays over the pods.

    Raises:
      UserError: no such file, or no YAML mapping.
    """
    if not path:
        return {}
    try:
        found = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"launch gke: --pod={path}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not set(found) <= {"metadata", "spec"}:
        raise UserError(f"launch gke: --pod={path}: must be a YAML mapping with `metadata`, `spec`, or both")
    return found


def _check_disk(payload: Payload, folder: str, made: Mapping[str, Any]) -> None:
    """Refuses what would write where nothing outlives the pod."""
    path = payload.disk_folder(folder)
    if path is not None and not any(path == kept or path.startswith(f"{kept}/") for kept in jobset.kept_folders(made)):
        raise UserError(
            f"launch gke: --workdir={payload.writes_to} is on the disk of a pod, and lost with it: give "
            "--workdir=gs://BUCKET/FOLDER, or a folder of a volume that --pod=FILE mounts"
        )


def _describe(cluster: Cluster, spec: jobset.Spec, made: str, files: Sequence[str]) -> None:
    """Prints every command and file."""
    code = spec.plan.place.code
    print(f"# code: {code.revision}, tree {code.tree}")
    print(f"git -C {code.root} archive --format=tar.gz {code.tree}  # the archive, in parts code.NNN")
    print(shlex.join(cluster.create("--output=json")), "# reads:", made, sep="\n")
    print(shlex.join(cluster.create("--output=name")), "# reads; UID is the JobSet's:", "---\n".join(files), sep="\n")
    print("# while it runs, every few seconds", shlex.join(cluster.get(spec.job_id)), sep="\n")
    print("# while pods wait", shlex.join(cluster.warnings()), sep="\n")
    print("# of every pod", shlex.join(cluster.logs("POD", "")), sep="\n")
    if not spec.options["keep"]:
        print("# in the end", shlex.join(cluster.delete(spec.name)), sep="\n")


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)
)


def _yaml(document: Any) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


def state(job: Job) -> State:
    """As Kubernetes has it, and as it was written down when it ended."""
    if job.status is not None:
        return State("done" if job.status == 0 else f"ended with status {job.status}", job.status)
    pods.write_down(job)
    try:
        return State(pods.describe(job, pods.fetch_status(job)))
    except UserError as error:  # it may come back
        return State(str(error))


def cancel(job: Job, now: bool) -> None:
    """Deletes the JobSet: its pods are asked to save and end; `now` they have a second."""
    cluster = pods.cluster(job)
    cluster.run(cluster.delete(job.handle["name"]))
    if now:
        cluster.run(cluster.kill(job.id))


def profile(job: Job) -> None:
    """Tells all pods that run, at once; raises UserError where one cannot be told, or none runs."""
    seen, cluster = pods.fetch_status(job), pods.cluster(job)
    running = [pod.id for pod in seen.pods if pod.attempt == seen.attempt and not pod.waits and pod.status is None]
    if not running:
        raise UserError(f"launch gke: {job.id}: {pods.describe(job, seen)}; none runs")
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda pod: cluster.run(cluster.profile(pod)), running))


_LEAST = {"nodes": 0, "slices": 0, "gpus": 0, "chips": 0, "queue_minutes": 0, "start_minutes": 0, "save_seconds": 1}
_KEPT = ("restarts", "wait", "keep", "queue_minutes", "start_minutes")  # options that the record has

TARGET = Target(
    "a JobSet on TPU or GPU nodes of a Kubernetes cluster (GKE)",
    {
        "accelerator": Option("--accelerator=NAME", "as GKE names it: tpu-v6e-slice, nvidia-h100-80gb; else CPUs", ""),
        "topology": Option("--topology=AxB[xC]", "of a TPU slice, in chips", ""),
        "slices": Option("--slices=N", "TPU slices, each a node pool (1)", 0),
        "chips": Option("--chips=N", "TPU chips of a host (4, or all of a smaller slice)", 0),
        "nodes": Option("--nodes=N", "GPU or CPU hosts (1)", 0),
        "gpus": Option("--gpus=N", "GPUs of a host (8)", 0),
        "spot": Option("--spot", "cheaper, and may be taken away", False),
        "image": Option("--image=IMAGE", "of the container; has Python 3.11 to 3.13", "python:3.12"),
        "name": Option("--name=NAME", "of the JobSet; else the job's", ""),
        "namespace": Option("--namespace=NAME", "of Kubernetes", "default"),
        "context": Option("--context=NAME", "of kubectl; else the current one", ""),
        "queue": Option("--queue=NAME", "of Kueue, where the cluster has it", ""),
        "pod": Option("--pod=FILE", "YAML laid over the pods: service account, volumes, tolerations, ...", ""),
        "save_seconds": Option("--save_seconds=S", "that a pod has to save in, when it is asked to end (120)", 120),
        "queue_minutes": Option("--queue_minutes=M", "how long pods may wait for nodes (1440)", 1440.0),
        "start_minutes": Option("--start_minutes=M", "how long the others may, once one has started (15)", 15.0),
        "keep": Option("--keep", "do not delete the JobSet in the end", False),
        **{name: option for name, option in hosts.OPTIONS.items() if name not in ("port", "wait")},
        "wait": Option("--wait=SECONDS", "how long the cluster has to answer, and a missing image (60)", 60),
        **DETACH,
    },
    run,
    state,
    cancel,
    profile,
)
